"""One table of backends. A backend turns the verbs of an adapted linear into calls of its kernels.

A backend asked for by name is used or raises with the reason; ``"auto"`` takes the first of the table that supports the
tensor, and ``choose`` says why the earlier ones did not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import grouped, native, plain, reference
from .engines import ENGINES
from .triton_backend import TritonBackend


class Layout(NamedTuple):
    """Where each projection of a group lies: ranks in h, columns in the outputs."""

    ranks: tuple[int, ...]
    offsets: tuple[int, ...]  # first column of projection i in h
    outputs: tuple[int, ...]  # index of the weight whose output holds projection i
    columns: tuple[int, ...]  # first column of projection i in that output
    widths: tuple[int, ...]

    @property
    def rank(self) -> int:
        return sum(self.ranks)

    @property
    def projections(self) -> int:
        return len(self.ranks)


def group_layout(W: Sequence[Tensor], B: Sequence[Tensor]) -> Layout:
    """Lay the projections over the concatenated rows of ``W``; a projection never straddles two weights."""
    return _layout_of(tuple([w.shape[0] for w in W]), tuple([b.shape for b in B]))


@functools.lru_cache(maxsize=4096)
def _layout_of(rows: tuple[int, ...], shapes: tuple[torch.Size, ...]) -> Layout:
    widths, ranks = tuple(n for n, _ in shapes), tuple(r for _, r in shapes)
    offsets, total = [], 0
    for r in ranks:
        offsets.append(total)
        total += r
    outputs, columns, j, used = [], [], 0, 0
    for width in widths:
        while j < len(rows) and used == rows[j]:
            j, used = j + 1, 0
        if j == len(rows) or used + width > rows[j]:
            raise ValueError(f"lora_B: rows {list(widths)} do not tile weights with {list(rows)} rows")
        outputs.append(j)
        columns.append(used)
        used += width
    if sum(widths) != sum(rows):
        raise ValueError(f"lora_B: rows {list(widths)} do not tile weights with {list(rows)} rows")
    return Layout(ranks, tuple(offsets), tuple(outputs), tuple(columns), widths)


def matmul_backward(dy: Sequence[Tensor | None], W: Sequence[Tensor], engine: str) -> Tensor | None:
    """``sum_j dy_j W_j`` over the outputs that have a gradient."""
    dx = None
    for grad, w in zip(dy, W, strict=True):
        if grad is not None:
            dx = ENGINES.backward(grad, w, engine, into=dx)
    return dx


@dataclass(frozen=True)
class Backend:
    """The verbs of one adapted group, composed from skinny kernels around the library's matmul.

    ``kernels`` supplies shrink, expand_, wgrad, outer, dropout and gradstat with the meaning that ``reference`` gives
    them. A backend with fused kernels overrides the verbs themselves.
    """

    name: str
    kernels: Any
    unsupported_reason: Callable[[torch.device, torch.dtype], str | None]

    def shrink(self, x: Tensor, A: Sequence[Tensor], P: Tensor | None, seed: Tensor | None, p: float) -> Tensor:
        """``h = [dropout(x) A_i^T ... | x P^T]``; x [M, K] -> [M, R + k]."""
        if p == 0.0:
            return self.kernels.shrink(x, torch.cat([*A, P] if P is not None else list(A)).to(x.dtype))
        parts = [self.kernels.shrink(self.kernels.dropout(x, seed, i, p), a.to(x.dtype)) for i, a in enumerate(A)]
        if P is not None:
            parts.append(self.kernels.shrink(x, P.to(x.dtype)))
        return torch.cat(parts, dim=1)

    def linear(
        self,
        x: Tensor,
        W: Sequence[Tensor],
        bias: Sequence[Tensor | None],
        h: Tensor,
        B: Sequence[Tensor],
        layout: Layout,
        scale: Sequence[float],
        moments: bool,
        engine: str,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """``y_j = x W_j^T + bias_j``, then ``y += s h B^T`` in place; returns y and its column moments."""
        outputs, sums = [], []
        for j, (w, b) in enumerate(zip(W, bias, strict=True)):
            y = ENGINES.forward(x, w, b, engine)
            mine = [i for i, output in enumerate(layout.outputs) if output == j]
            sums.append(
                self.kernels.expand_(
                    y.view(-1, w.shape[0]),
                    h,
                    [B[i].to(y.dtype).t() for i in mine],
                    [layout.offsets[i] for i in mine],
                    [layout.columns[i] for i in mine],
                    [scale[i] for i in mine],
                    moments,
                )
            )
            outputs.append(y)
        return outputs, sums if moments else []

    def linear_backward(
        self,
        dy: Sequence[Tensor | None],
        W: Sequence[Tensor],
        dh: Tensor,
        A: Sequence[Tensor],
        layout: Layout,
        seed: Tensor | None,
        p: float,
        engine: str,
    ) -> Tensor:
        """``dx = sum_j dy_j W_j + dh A``; dy_j [M, N_j] -> [M, K]."""
        dx = matmul_backward(dy, W, engine)
        if p == 0.0:
            packed = torch.cat(list(A)).to(dh.dtype)
            self.kernels.expand_(dx, dh, [packed], [0], [0], [1.0], False)
            return dx
        for i, a in enumerate(A):
            part = torch.zeros_like(dx)
            self.kernels.expand_(part, dh, [a.to(dh.dtype)], [layout.offsets[i]], [0], [1.0], False)
            dx += self.kernels.dropout(part, seed, i, p)
        return dx

    def wgrad(
        self,
        x: Tensor,
        dy: Sequence[Tensor | None],
        h: Tensor,
        B: Sequence[Tensor],
        layout: Layout,
        scale: Sequence[float],
        probes: int,
        need_dA: bool,
        seed: Tensor | None,
        p: float,
    ) -> tuple[Tensor, list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
        """dh [M, R], and dA_i, dB_i, Q_i of every projection whose dy is defined (None for the others)."""
        live = [i for i, j in enumerate(layout.outputs) if dy[j] is not None]
        slices = [dy[layout.outputs[i]].narrow(1, layout.columns[i], layout.widths[i]) for i in live]
        dh, dA_packed, dB, Q = self.kernels.wgrad(
            x,
            slices,
            h,
            [B[i].to(x.dtype) for i in live],
            [layout.offsets[i] for i in live],
            [scale[i] for i in live],
            layout.rank,
            probes,
            need_dA and p == 0.0,
        )
        dA: list[Tensor | None] = [None] * len(B)
        grads: list[list[Tensor | None]] = [[None] * len(B), [None] * len(B)]
        for position, i in enumerate(live):
            grads[0][i], grads[1][i] = dB[position], Q[position]
            if need_dA and p == 0.0:
                # Outputs of an operator must not share memory.
                mine = dA_packed.narrow(0, layout.offsets[i], layout.ranks[i])
                dA[i] = mine.clone() if len(B) > 1 else mine
            elif need_dA:
                mine = dh.narrow(1, layout.offsets[i], layout.ranks[i])
                dA[i] = self.kernels.outer(mine, self.kernels.dropout(x, seed, i, p))
        return dh, dA, grads[0], grads[1]

    def gradstat(self, x: Tensor, dy: Tensor, offsets: Sequence[int], absolute: bool = True) -> Tensor:
        """Sum of squares and of absolute values of dy^T x per run of rows: [runs, 2].

        Without ``absolute`` the second column is zero, and short runs may cost less.
        """
        return self.kernels.gradstat(x, dy, offsets, absolute)

    def grouped_forward(
        self,
        x: Tensor,
        W: Sequence[Tensor],
        bias: Sequence[Tensor | None],
        A: Sequence[Tensor],
        P: Sequence[Tensor],
        B: Sequence[Tensor],
        rows: grouped.Rows,
        layouts: Callable[[int], Layout],
        scale: Sequence[float],
        moments: bool,
        engine: str,
    ) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """``shrink`` and ``linear`` with each row's own adapter: y_j [*, N_j], h [M, width], moments by adapter.

        A, B and scale run over adapters, then projections; ``layouts(g)`` is the layout of adapter g.
        """
        outputs = [ENGINES.forward(x, w, b, engine) for w, b in zip(W, bias, strict=True)]
        y = [out.view(-1, out.shape[-1]) for out in outputs]
        seen = x.reshape(-1, x.shape[-1])
        h, sums = grouped.forward(self.kernels, y, seen, A, P, B, rows, layouts, scale, moments)
        return outputs, h, sums

    def grouped_backward(
        self,
        dy: Sequence[Tensor | None],
        x: Tensor,
        h: Tensor,
        W: Sequence[Tensor],
        A: Sequence[Tensor],
        B: Sequence[Tensor],
        rows: grouped.Rows,
        layouts: Callable[[int], Layout],
        scale: Sequence[float],
        probes: Sequence[int],
        need_dx: bool,
        need_dA: bool,
        need_dB: bool,
        engine: str,
    ) -> tuple[Tensor | None, Sequence[Tensor | None], Sequence[Tensor | None], Sequence[Tensor | None]]:
        """dx [M, K], then dA, dB and Q of every adapter and projection, None where nothing contributes."""
        dx = matmul_backward(dy, W, engine) if need_dx else None
        return dx, *grouped.backward(self.kernels, dx, dy, x, h, A, B, rows, layouts, scale, probes, need_dA)


class NativeBackend(Backend):
    """The compiled kernels: without dropout, one pass over the rows in each direction around the library's matmul."""

    def forward(
        self,
        x: Tensor,
        W: Sequence[Tensor],
        bias: Sequence[Tensor | None],
        A: Sequence[Tensor],
        P: Tensor | None,
        B: Sequence[Tensor],
        layout: Layout,
        scale: Sequence[float],
        moments: bool,
        engine: str,
    ) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """``shrink`` and ``linear`` without dropout: y_j [*, N_j], h [M, R + k] and the column moments."""
        outputs = [ENGINES.forward(x, w, b, engine) for w, b in zip(W, bias, strict=True)]
        h, sums = torch.ops.fastlora.lora_forward_.default(
            [y if y.dim() == 2 else y.view(-1, y.shape[-1]) for y in outputs],
            x if x.dim() == 2 else x.reshape(-1, x.shape[-1]),
            _readable(A),
            P,
            _readable(B),
            layout.outputs,
            layout.columns,
            scale,
            moments,
        )
        return outputs, h, sums

    def backward(
        self,
        dy: Sequence[Tensor | None],
        x: Tensor,
        h: Tensor,
        W: Sequence[Tensor],
        A: Sequence[Tensor],
        B: Sequence[Tensor],
        layout: Layout,
        scale: Sequence[float],
        probes: int,
        need_dx: bool,
        need_dA: bool,
        need_dB: bool,
        engine: str,
    ) -> tuple[Tensor | None, list[Tensor], list[Tensor], list[Tensor]]:
        """``wgrad`` and ``linear_backward`` without dropout: dx [M, K], dA_i, dB_i in the adapters' dtype, Q_i.

        Gradients of a projection whose dy is None are zero; those that are not needed are left out.
        """
        dx, live, position = None, [], []
        for grad, w in zip(dy, W, strict=True):
            position.append(-1 if grad is None else len(live))
            if grad is not None:
                live.append(grad)
                if need_dx:
                    dx = ENGINES.backward(grad, w, engine, into=dx)
        dA, dB, Q = torch.ops.fastlora.lora_backward_.default(
            dx,
            live,
            x,
            h,
            _readable(A),
            _readable(B),
            [position[j] for j in layout.outputs],
            layout.columns,
            scale,
            probes,
            need_dA,
            need_dB,
        )
        return dx, dA, dB, Q


def _readable(factors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Factors in a dtype that the kernels read."""
    if any(f.dtype not in _NATIVE_DTYPES for f in factors):
        return [f.to(torch.float32) for f in factors]
    return factors


_NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _native_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    if not native.available():
        return f"the native library is not there: {native.reason()}"
    if device.type != "cpu":
        return f"its kernels run on the CPU, the tensors are on {device.type}"
    if dtype not in _NATIVE_DTYPES:
        return f"its kernels take float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return None


def _python_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"its blocks are made for a CPU's cache, the tensors are on {device.type}"
    if dtype not in plain.DTYPES:
        return f"it takes float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return None


def _native_kernels() -> SimpleNamespace | None:
    if not native.available():
        return None
    ops = torch.ops.fastlora
    return SimpleNamespace(
        shrink=ops.shrink,
        expand_=ops.expand_,
        wgrad=ops.wgrad,
        outer=ops.outer,
        dropout=ops.dropout,
        gradstat=native.gradstat,
    )


BACKENDS: dict[str, Backend | TritonBackend] = {
    "triton": TritonBackend(),
    "native": NativeBackend("native", _native_kernels(), _native_reason),
    "python": Backend("python", plain, _python_reason),
    "reference": Backend("reference", reference, lambda device, dtype: None),
}


def choose(name: str, device: torch.device, dtype: torch.dtype) -> tuple[Backend | TritonBackend, dict[str, str]]:
    """The backend for a tensor and, by name, why each faster one was passed over.

    Raises ``ValueError`` for an unknown name and ``RuntimeError`` when the one asked for cannot run.
    """
    if name != "auto":
        if name not in BACKENDS:
            raise ValueError(f"backend: unknown {name!r}; accepted: 'auto', {', '.join(map(repr, BACKENDS))}")
        reason = BACKENDS[name].unsupported_reason(device, dtype)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} was asked for and cannot run: {reason}")
        return BACKENDS[name], {}
    passed: dict[str, str] = {}
    for backend in BACKENDS.values():
        reason = backend.unsupported_reason(device, dtype)
        if reason is None:
            return backend, passed
        passed[backend.name] = reason
    raise RuntimeError(f"no backend supports {dtype} on {device}: {passed}")
