"""The CPU backend over the compiled library."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from .. import native
from ..layout import Layout, as_rows
from ..matmul import ENGINES, matmul_backward
from .base import Backend


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
            [as_rows(y) for y in outputs],
            as_rows(x),
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
        dx = matmul_backward(dy, W, engine) if need_dx else None
        position, live = _defined(dy)
        seen_A, seen_B = _readable(A), _readable(B)
        dA, dB, Q = torch.ops.fastlora.lora_backward_.default(
            dx,
            live,
            x,
            h,
            seen_A,
            seen_B,
            [position[j] for j in layout.outputs],
            layout.columns,
            scale,
            probes,
            need_dA,
            need_dB,
        )
        if seen_A is not A:
            dA = [grad.to(a.dtype) for grad, a in zip(dA, A, strict=False)]
        if seen_B is not B:
            dB = [grad.to(b.dtype) for grad, b in zip(dB, B, strict=False)]
        return dx, dA, dB, Q

    def grouped_forward(self, x, W, bias, A, P, B, rows, layouts, scale, moments, engine):
        """As ``Backend.grouped_forward``; without dropout one pass over the rows of all adapters."""
        if rows.keys is not None:
            return super().grouped_forward(x, W, bias, A, P, B, rows, layouts, scale, moments, engine)
        layout = layouts(0)
        outputs = [ENGINES.forward(x, w, b, engine) for w, b in zip(W, bias, strict=True)]
        h, sums = torch.ops.fastlora.lora_grouped_forward_.default(
            [y.view(-1, y.shape[-1]) for y in outputs],
            x.reshape(-1, x.shape[-1]),
            _readable(A),
            P,
            _readable(B),
            rows.order,
            rows.ranges,
            layout.outputs,
            layout.columns,
            scale,
            layouts.starts,
            moments,
        )
        return outputs, h, sums

    def grouped_backward(
        self, dy, x, h, W, A, B, rows, layouts, scale, probes, need_dx, need_dA, need_dB, engine
    ):  # fmt: skip
        """As ``Backend.grouped_backward``; without dropout one pass over the rows of all adapters."""
        if rows.keys is not None:
            return super().grouped_backward(
                dy, x, h, W, A, B, rows, layouts, scale, probes, need_dx, need_dA, need_dB, engine
            )
        layout = layouts(0)
        dx = matmul_backward(dy, W, engine) if need_dx else None
        position, live = _defined(dy)
        dA, dB, Q = torch.ops.fastlora.lora_grouped_backward_.default(
            dx,
            live,
            x,
            h,
            _readable(A),
            _readable(B),
            rows.order,
            rows.ranges,
            [position[j] for j in layout.outputs],
            layout.columns,
            scale,
            layouts.starts,
            probes,
            need_dA,
            need_dB,
        )
        return dx, dA, dB, Q


def _defined(dy: Sequence[Tensor | None]) -> tuple[list[int], list[Tensor]]:
    """The gradients that are there, and the place of each among them (-1: not there)."""
    position, live = [], []
    for grad in dy:
        position.append(-1 if grad is None else len(live))
        if grad is not None:
            live.append(grad)
    return position, live


def _readable(factors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Factors in a dtype that the kernels read."""
    if _NATIVE_DTYPES.issuperset([f.dtype for f in factors]):
        return factors
    return [f.to(torch.float32) for f in factors]


_NATIVE_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))


def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    if not native.available():
        return f"the native library is not there: {native.reason()}"
    if device.type != "cpu":
        return f"its kernels run on the CPU, the tensors are on {device.type}"
    if dtype not in _NATIVE_DTYPES:
        return f"its kernels take float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return None


def native_kernels() -> SimpleNamespace | None:
    if not native.available():
        return None
    ops = torch.ops.fastlora
    return SimpleNamespace(
        shrink=ops.shrink,
        expand_=ops.expand_,
        wgrad=ops.wgrad,
        outer=ops.outer,
        dropout=ops.dropout,
        dropout_rows=ops.dropout_rows,
        gradstat=native.gradstat,
        column_moments=lambda y: ops.expand_(y, y[:, :0], [], [], [], [], True),
    )
