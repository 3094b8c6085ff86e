"""The verbs of an adapted group, and what they are composed from: the matmul of the frozen weight, skinny kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import grouped
from .engines import ENGINES
from .reference import projections_of


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


def as_rows(tensor: Tensor) -> Tensor:
    """[*, K] as [M, K]."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


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


class Layouts:
    """The layout of each adapter of a batch, ``layouts(g)``: they differ in their ranks alone.

    ``starts``: of each adapter, one after another, the first columns of its projections in h and the end.
    """

    def __init__(self, W: Sequence[Tensor], B: Sequence[Tensor], starts: Sequence[int]):
        self.starts, self.projections = starts, projections_of(W, B)
        self._rows, self._B = tuple([w.shape[0] for w in W]), B

    def __call__(self, g: int) -> Layout:
        part = self._B[g * self.projections : (g + 1) * self.projections]
        return _layout_of(self._rows, tuple([b.shape for b in part]))

    def width(self, probes: Sequence[int]) -> int:
        """Columns of h: the largest rank of an adapter with its probe columns (none: ``probes`` is empty)."""
        totals = self.starts[self.projections :: self.projections + 1]
        return max((r + k for r, k in zip(totals, probes or [0] * len(totals), strict=True)), default=0)

    @property
    def ranks(self) -> tuple[tuple[int, ...], ...]:
        """Ranks of each adapter's projections."""
        n = self.projections + 1
        each = [self.starts[first : first + n] for first in range(0, len(self.starts), n)]
        return tuple([tuple([b - a for a, b in zip(own, own[1:], strict=False)]) for own in each])


def picks_columns(P: Tensor | None) -> bool:
    """Whether P are columns of x, int64 [projections, k], and not probe rows."""
    return P is not None and not P.is_floating_point()


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

    ``kernels`` supplies shrink, expand_, wgrad, outer, dropout, dropout_rows and gradstat with the meaning that
    ``reference`` gives them. A backend with fused kernels overrides the verbs themselves.
    """

    name: str
    kernels: Any
    unsupported_reason: Callable[[torch.device, torch.dtype], str | None]

    def shrink(self, x: Tensor, A: Sequence[Tensor], P: Tensor | None, seed: Tensor | None, p: float) -> Tensor:
        """``h = [dropout(x) A_i^T ... | x P^T]``; x [M, K] -> [M, R + k], or ``x[:, P]`` of an int64 P [n, k]."""
        if picks_columns(P):
            return torch.cat([self.shrink(x, A, None, seed, p), x.index_select(1, P.reshape(-1))], dim=1)
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
        if probes and len(live) < len(B) and h.shape[1] - layout.rank > probes:
            # Every projection has columns of its own: those of the live ones.
            own = [h.narrow(1, layout.rank + i * probes, probes) for i in live]
            h = torch.cat([h.narrow(1, 0, layout.rank), *own], dim=1)
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

    def column_moments(self, y: Tensor) -> Tensor:
        """Column sums of y [M, N] and of its squares: float64 [2, N]."""
        return self.kernels.column_moments(y)

    def skinny(self, dy: Tensor, columns: Tensor) -> Tensor:
        """``dy^T columns``: dy [M, N], columns [M, k] in its dtype -> [N, k] in the accumulation dtype."""
        return self.kernels.outer(columns, dy).t().contiguous()

    def grouped_forward(
        self,
        x: Tensor,
        W: Sequence[Tensor],
        bias: Sequence[Tensor | None],
        A: Sequence[Tensor],
        P: Sequence[Tensor],
        B: Sequence[Tensor],
        rows: grouped.Rows,
        layouts: Layouts,
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
        layouts: Layouts,
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
