"""Backend: the protocol forward / backward / gradstat, composed from skinny kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import layout
from ..layout import Layout, Layouts, Rows, picks_columns
from ..matmul import ENGINES, matmul_backward


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
        rows: layout.Rows,
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
        h, sums = _grouped_forward(self.kernels, y, seen, A, P, B, rows, layouts, scale, moments)
        return outputs, h, sums

    def grouped_backward(
        self,
        dy: Sequence[Tensor | None],
        x: Tensor,
        h: Tensor,
        W: Sequence[Tensor],
        A: Sequence[Tensor],
        B: Sequence[Tensor],
        rows: layout.Rows,
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
        return dx, *_grouped_backward(self.kernels, dx, dy, x, h, A, B, rows, layouts, scale, probes, need_dA)


def _take(tensor: Tensor, mine: Tensor) -> Tensor:
    """The rows of an index, or all rows with zeros outside of a mask."""
    return torch.where(mine.unsqueeze(1), tensor, 0) if mine.dtype == torch.bool else tensor.index_select(0, mine)


def _put_(tensor: Tensor, mine: Tensor, rows: Tensor) -> None:
    """Write what was made of ``_take``."""
    if mine.dtype == torch.bool:
        tensor.copy_(torch.where(mine.unsqueeze(1), rows, tensor))
    else:
        tensor.index_copy_(0, mine, rows)


def _keys(rows: Rows, mine: Tensor) -> Tensor:
    return rows.keys if mine.dtype == torch.bool else rows.keys[mine]


def _grouped_forward(
    kernels: Any, y: list[Tensor], x: Tensor, A: Sequence[Tensor], P: Sequence[Tensor], B: Sequence[Tensor],
    rows: Rows, layouts: Any, scale: Sequence[float], moments: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Add every adapter's update to its rows of y_j [M, N_j] in place; h [M, width] and the moments by adapter."""
    projections = layouts.projections
    h = x.new_zeros(x.shape[0], layouts.width([p.shape[0] for p in P]))
    sums = [x.new_zeros((2, out.shape[1]), dtype=torch.float64) for _ in range(len(A) // projections) for out in y]
    for g, mine in rows.each():
        layout, part, seen = layouts(g), slice(g * projections, (g + 1) * projections), _take(x, mine)
        own = _grouped_shrink(kernels, seen, A[part], P[g] if P else None, rows, g, mine)
        _put_(h[:, : own.shape[1]], mine, own)
        for j, out in enumerate(y):
            target = _take(out, mine)
            it = [i for i, output in enumerate(layout.outputs) if output == j]
            found = kernels.expand_(
                target,
                own,
                [B[part][i].to(out.dtype).t() for i in it],
                [layout.offsets[i] for i in it],
                [layout.columns[i] for i in it],
                [scale[part][i] for i in it],
                moments,
            )
            _put_(out, mine, target)
            if moments:
                sums[g * len(y) + j] = found
    return h, sums if moments else []


def _grouped_shrink(kernels, seen, A, P, rows: Rows, g: int, mine: Tensor) -> Tensor:
    if not _drops(rows, g):
        return kernels.shrink(seen, torch.cat([*A, P] if P is not None else list(A)).to(seen.dtype))
    keys = _keys(rows, mine)
    parts = [kernels.shrink(kernels.dropout_rows(seen, keys, i, rows.p[g]), a.to(seen.dtype)) for i, a in enumerate(A)]
    if P is not None:
        parts.append(kernels.shrink(seen, P.to(seen.dtype)))
    return torch.cat(parts, dim=1)


def _drops(rows: Rows, g: int) -> bool:
    return rows.keys is not None and rows.p[g] > 0.0


def _grouped_backward(
    kernels: Any, dx: Tensor | None, dy: Sequence[Tensor | None], x: Tensor, h: Tensor, A: Sequence[Tensor],
    B: Sequence[Tensor], rows: Rows, layouts: Any, scale: Sequence[float], probes: Sequence[int], need_dA: bool,
) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]:  # fmt: skip
    """Add ``dh A`` to each adapter's rows of dx [M, K] in place; dA, dB and Q by adapter and projection, None where
    no row or no dy contributes."""
    projections = layouts.projections
    dA: list[Tensor | None] = [None] * len(A)
    dB, Q = list(dA), list(dA)
    for g, mine in rows.each():
        layout, start = layouts(g), g * projections
        own, seen = A[start : start + projections], _take(x, mine)
        live = [i for i, j in enumerate(layout.outputs) if dy[j] is not None]
        if not live:
            continue
        grads = {j: _take(dy[j], mine) for j in {layout.outputs[i] for i in live}}
        dh, packed, found, columns = kernels.wgrad(
            seen,
            [grads[layout.outputs[i]].narrow(1, layout.columns[i], layout.widths[i]) for i in live],
            _take(h, mine)[:, : layout.rank + probes[g]],
            [B[start + i].to(x.dtype) for i in live],
            [layout.offsets[i] for i in live],
            [scale[start + i] for i in live],
            layout.rank,
            probes[g],
            need_dA and not _drops(rows, g),
        )
        for position, i in enumerate(live):
            dB[start + i], Q[start + i] = found[position], columns[position]
            if need_dA:
                dA[start + i] = _dA(kernels, seen, dh, packed, layout, i, rows, g, mine)
        if dx is not None:
            target = _take(dx, mine)
            _add_dx(kernels, target, dh, own, layout, rows, g, mine)
            _put_(dx, mine, target)
    return dA, dB, Q


def _dA(kernels, seen, dh, packed, layout, i: int, rows: Rows, g: int, mine: Tensor) -> Tensor:
    if not _drops(rows, g):
        return packed.narrow(0, layout.offsets[i], layout.ranks[i]).clone()
    part = dh.narrow(1, layout.offsets[i], layout.ranks[i])
    return kernels.outer(part, kernels.dropout_rows(seen, _keys(rows, mine), i, rows.p[g]))


def _add_dx(kernels, target, dh, A, layout, rows: Rows, g: int, mine: Tensor) -> None:
    if not _drops(rows, g):
        kernels.expand_(target, dh, [torch.cat(list(A)).to(dh.dtype)], [0], [0], [1.0], False)
        return
    for i, a in enumerate(A):
        part = torch.zeros_like(target)
        kernels.expand_(part, dh, [a.to(dh.dtype)], [layout.offsets[i]], [0], [1.0], False)
        target += kernels.dropout_rows(part, _keys(rows, mine), i, rows.p[g])
