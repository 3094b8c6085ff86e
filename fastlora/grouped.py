"""Many adapters in one batch from the verbs of one: each adapter's rows are taken out, run and put back.

Backends with segmented kernels have their own; this is what the others do, and what dropout goes through.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Rows of x by adapter: those of adapter g are ``order[ranges[g, 0]:ranges[g, 1]]``.

    order int64 [M], or [0] where every adapter's rows are one run and ``ranges`` [G, 2] indexes rows themselves; ids
    int64 [M] says the same row by row, -1 for the frozen layer alone; keys int64 [M, 2] are the rows' dropout keys and
    p the adapters' probabilities, where there is dropout.
    """

    ids: Tensor
    order: Tensor
    ranges: Tensor
    keys: Tensor | None = None
    p: Sequence[float] = ()

    def each(self) -> Iterator[tuple[int, Tensor]]:
        """(adapter, its rows): indices for the adapters that have any, which takes ``ranges`` from the CPU.

        Elsewhere a mask of all rows for every adapter, since how many rows it has would have to be read back: this
        costs each adapter's rank for every row, which kernels over segments do not.
        """
        if not on_host(self.ranges.device):
            yield from ((g, self.ids == g) for g in range(self.ranges.shape[0]))
            return
        for g, (first, last) in enumerate(self.ranges.tolist()):
            if first == last:
                continue
            if self.order.numel():
                yield g, self.order[first:last]
            else:
                yield g, torch.arange(first, last, device=self.order.device)


def on_host(device: torch.device) -> bool:
    """Whether reading a tensor's values waits for nothing."""
    return device.type == "cpu"


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


def column_starts(ranks: Sequence[int], projections: int) -> list[int]:
    """Of each adapter, one after another: the first column of h of each of its projections, then its total rank."""
    starts: list[int] = []
    for first in range(0, len(ranks), projections):
        starts += [0, *itertools.accumulate(ranks[first : first + projections])]
    return starts


def forward(
    kernels: Any, y: list[Tensor], x: Tensor, A: Sequence[Tensor], P: Sequence[Tensor], B: Sequence[Tensor],
    rows: Rows, layouts: Any, scale: Sequence[float], moments: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Add every adapter's update to its rows of y_j [M, N_j] in place; h [M, width] and the moments by adapter."""
    projections = layouts.projections
    h = x.new_zeros(x.shape[0], layouts.width([p.shape[0] for p in P]))
    sums = [x.new_zeros((2, out.shape[1]), dtype=torch.float64) for _ in range(len(A) // projections) for out in y]
    for g, mine in rows.each():
        layout, part, seen = layouts(g), slice(g * projections, (g + 1) * projections), _take(x, mine)
        own = _shrink(kernels, seen, A[part], P[g] if P else None, rows, g, mine)
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


def _shrink(kernels, seen, A, P, rows: Rows, g: int, mine: Tensor) -> Tensor:
    if not _drops(rows, g):
        return kernels.shrink(seen, torch.cat([*A, P] if P is not None else list(A)).to(seen.dtype))
    keys = _keys(rows, mine)
    parts = [kernels.shrink(kernels.dropout_rows(seen, keys, i, rows.p[g]), a.to(seen.dtype)) for i, a in enumerate(A)]
    if P is not None:
        parts.append(kernels.shrink(seen, P.to(seen.dtype)))
    return torch.cat(parts, dim=1)


def _drops(rows: Rows, g: int) -> bool:
    return rows.keys is not None and rows.p[g] > 0.0


def backward(
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
