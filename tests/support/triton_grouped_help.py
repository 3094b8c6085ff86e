"""Mixed batches for the kernels over rows of several adapters, and their answers from a loop in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from fastlora.kernels.grouped import LoraRanks, RowBatch

from fastlora.ops import reference
from support.triton_help import DEVICE, wide


@dataclass(frozen=True)
class Mixed:
    """ids of the rows, sizes of the group, ranks by adapter and projection, probe columns by adapter."""

    ids: tuple[int, ...]
    K: int
    outputs: tuple[int, ...]
    widths: tuple[int, ...]
    ranks: tuple[tuple[int, ...], ...]
    probes: tuple[int, ...]
    blocks: tuple[int, ...] = ()


def _cycle(pattern, count):
    return tuple(pattern[i * 5 % len(pattern)] for i in range(count))


CASES = {
    "separate": Mixed(_cycle((0, 2, 1, -1, 2, 0, 2), 61), 34, (33, 17), (33, 17), ((3, 1), (17, 5), (8, 2)), (4, 0, 3)),
    "fused": Mixed(
        _cycle((1, 0, 3, 3), 50), 32, (48,), (16, 16, 16), ((8,) * 3, (16,) * 3, (40, 8, 8), (8,) * 3), (8,) * 4
    ),
    "long_runs": Mixed((0,) * 37 + (1,) * 24, 32, (32,), (32,), ((1,), (2,)), (0, 1)),
    "one_row": Mixed((1,), 5, (3,), (3,), ((2,), (1,)), (1, 1)),
    "base_only": Mixed((-1,) * 9, 20, (18,), (18,), ((2,), (64,)), (0, 2)),
    "one_adapter": Mixed((0,) * 40, 24, (20,), (20,), ((70,),), (3,)),
    "empty": Mixed((), 16, (16, 8), (16, 8), ((2, 3), (1, 1)), (2, 2)),
}


INTERLEAVED = Mixed(
    _cycle((1, 0, 2, -1, 2), 41), 32, (48, 20), (24, 12, 12, 20), ((3, 1, 2, 4), (17, 0, 8, 1), (1, 1, 1, 0)),
    (4, 0, 3), (4, 1),
)  # fmt: skip


class Operands:
    """Random tensors of a mixed batch, and its segments."""

    def __init__(self, case: Mixed, dtype: torch.dtype = torch.float32, factors: torch.dtype = torch.float32):
        self.case, self.dtype = case, dtype
        M, G = len(case.ids), len(case.ranks)

        def make(rows, columns, kind=dtype):
            return torch.randn(rows, columns + 3, device=DEVICE).to(kind)[:, :columns]

        self.x, self.W = make(M, case.K), [make(n, case.K) for n in case.outputs]
        self.A = [make(r, case.K, factors) / case.K**0.5 for ranks in case.ranks for r in ranks]
        self.P = [make(k, case.K, factors).sign() for k in case.probes]
        self.B = [make(n, r, factors) for ranks in case.ranks for n, r in zip(case.widths, ranks, strict=True)]
        self.dy = [make(M, n) for n in case.outputs]
        self.y = [make(M, n) for n in case.outputs]
        n = len(case.widths)
        self.scales = [0.5 + 0.25 * i for i in range(G * n)]
        self.places, j, column = [], 0, 0
        for width in case.widths:
            if column == case.outputs[j]:
                j, column = j + 1, 0
            self.places.append((j, column))
            column += width
        ids = torch.tensor(case.ids, dtype=torch.int64)
        order, ranges = reference.build_segments(ids, G)
        self.batch = RowBatch(order.to(DEVICE), ranges.to(DEVICE), reference.segment_tiles)
        self.own = LoraRanks(case.ranks, case.probes)

    def rows(self, g: int) -> torch.Tensor:
        return (torch.tensor(self.case.ids, dtype=torch.int64) == g).nonzero()[:, 0]

    def factor(self, factors, g, i):
        return wide(factors[g * len(self.case.widths) + i].to(self.dtype))

    def factors_of_shrink(self):
        n = len(self.case.widths)
        return [f for g, P in enumerate(self.P) for f in (*self.A[g * n : g * n + n], P)]

    def slices(self, tensors):
        return [tensors[j][:, c : c + n] for (j, c), n in zip(self.places, self.case.widths, strict=True)]


def expected_h(o: Operands, probes: bool = True) -> torch.Tensor:
    h = torch.zeros(len(o.case.ids), max(o.own.widths), dtype=torch.float64)
    for g in range(len(o.case.ranks)):
        rows, n = o.rows(g), len(o.case.widths)
        stacked = torch.cat([o.factor(o.A, g, i) for i in range(n)] + [wide(o.P[g].to(o.dtype))])
        h[rows, : stacked.shape[0]] = wide(o.x)[rows] @ stacked.T
    return h


def expected_dh(o: Operands, dy) -> torch.Tensor:
    n = len(o.case.widths)
    dh = torch.zeros(len(o.case.ids), max(map(sum, o.case.ranks)), dtype=torch.float64)
    for g, ranks in enumerate(o.case.ranks):
        rows, column = o.rows(g), 0
        for i, r in enumerate(ranks):
            if dy[i] is not None:
                dh[rows, column : column + r] = o.scales[g * n + i] * wide(dy[i])[rows] @ o.factor(o.B, g, i)
            column += r
    return dh


def expected_y(o: Operands, h: torch.Tensor) -> list[torch.Tensor]:
    """``o.y`` with every adapter's update of its rows."""
    wanted, n = [wide(y) for y in o.y], len(o.case.widths)
    for g, ranks in enumerate(o.case.ranks):
        rows, column = o.rows(g), 0
        for i, r in enumerate(ranks):
            j, first = o.places[i]
            update = o.scales[g * n + i] * wide(h)[rows, column : column + r] @ o.factor(o.B, g, i).T
            wanted[j][rows, first : first + o.case.widths[i]] += update
            column += r
    return wanted


def expected_dx(o: Operands, dx: torch.Tensor, dh: torch.Tensor) -> torch.Tensor:
    """``dx`` with every adapter's part of its rows."""
    wanted, n = wide(dx), len(o.case.widths)
    for g, ranks in enumerate(o.case.ranks):
        stacked = torch.cat([o.factor(o.A, g, i) for i in range(n)])
        wanted[o.rows(g)] += wide(dh)[o.rows(g), : sum(ranks)] @ stacked
    return wanted


def expected_wgrad(o: Operands, x, dh: torch.Tensor, dy, h: torch.Tensor) -> tuple[list[torch.Tensor], ...]:
    """dA, dB, Q with an entry for each adapter and projection."""
    dA, dB, Q, n = [], [], [], len(o.case.widths)
    for g, ranks in enumerate(o.case.ranks):
        rows, column = o.rows(g), 0
        for i, r in enumerate(ranks):
            if x is not None:
                dA.append(wide(dh)[rows, column : column + r].T @ wide(x)[rows])
            grad = torch.zeros(len(rows), o.case.widths[i]).double() if dy[i] is None else wide(dy[i])[rows]
            dB.append(o.scales[g * n + i] * grad.T @ wide(h)[rows, column : column + r])
            Q.append(grad.T @ wide(h)[rows, sum(ranks) : sum(ranks) + o.case.probes[g]])
            column += r
    return dA, dB, Q
