"""Rows of several adapters: every kernel against a loop over adapters in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from fastlora.kernels import grouped
from fastlora.kernels.grouped import Batch, Ranks
from fastlora.kernels.tiling import TileConfig
from kernel_support import DEVICE, assert_close, wide

from fastlora import reference

pytestmark = pytest.mark.usefixtures("poisoned")
SMALL = TileConfig(16, 16, 16, 4, 2, band=2)


@dataclass(frozen=True)
class Mixed:
    """ids of the rows, sizes of the group, ranks by adapter and projection, probe columns by adapter."""

    ids: tuple[int, ...]
    K: int
    outputs: tuple[int, ...]
    widths: tuple[int, ...]
    ranks: tuple[tuple[int, ...], ...]
    probes: tuple[int, ...]


def _cycle(pattern, count):
    return tuple(pattern[i * 7 % len(pattern)] for i in range(count))


CASES = {
    "separate": Mixed(_cycle((0, 2, 1, -1, 2, 0, 2), 61), 34, (33, 17), (33, 17), ((3, 1), (17, 5), (8, 2)), (4, 0, 3)),
    "fused": Mixed(
        _cycle((1, 0, 3, 3), 50), 32, (48,), (16, 16, 16), ((8,) * 3, (16,) * 3, (40, 8, 8), (8,) * 3), (8,) * 4
    ),
    "one_row": Mixed((1,), 5, (3,), (3,), ((2,), (1,)), (1, 1)),
    "base_only": Mixed((-1,) * 9, 20, (18,), (18,), ((2,), (64,)), (0, 2)),
    "one_adapter": Mixed((0,) * 40, 24, (20,), (20,), ((70,),), (3,)),
    "empty": Mixed((), 16, (16, 8), (16, 8), ((2, 3), (1, 1)), (2, 2)),
}
every = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


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
        self.batch = Batch(order.to(DEVICE), ranges.to(DEVICE), reference.segment_tiles)
        self.own = Ranks(case.ranks, case.probes)

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


KINDS = {"fp32": (torch.float32,) * 2, "fp16": (torch.float16, torch.float32), "bf16": (torch.bfloat16,) * 2}
COMBINATIONS = [(name, "fp32") for name in CASES] + [("separate", "fp16"), ("fused", "bf16")]
problems = pytest.mark.parametrize(("name", "kind"), COMBINATIONS, ids=["-".join(c) for c in COMBINATIONS])


@problems
def test_shrink(name, kind):
    o = Operands(CASES[name], *KINDS[kind])
    h = grouped.grouped_shrink(o.x, o.factors_of_shrink(), o.batch, o.own, SMALL)
    assert h.dtype == o.dtype
    assert_close(h, expected_h(o), o.dtype, "h")


@problems
@pytest.mark.parametrize("missing", [False, True])
def test_shrink_backward(name, kind, missing):
    o = Operands(CASES[name], *KINDS[kind])
    dy = o.slices(o.dy)
    if missing and len(dy) == 1:
        pytest.skip("one projection")
    if missing:
        dy[0] = None
    dh = grouped.grouped_shrink_backward(dy, o.B, o.batch, o.own, o.scales, SMALL)
    assert_close(dh, expected_dh(o, dy), o.dtype, "dh")


@problems
def test_expand(name, kind):
    o = Operands(CASES[name], *KINDS[kind])
    h = expected_h(o).to(DEVICE, o.dtype)
    wanted, n = [wide(y) for y in o.y], len(o.case.widths)
    for g, ranks in enumerate(o.case.ranks):
        rows, column = o.rows(g), 0
        for i, r in enumerate(ranks):
            j, first = o.places[i]
            update = o.scales[g * n + i] * wide(h)[rows, column : column + r] @ o.factor(o.B, g, i).T
            wanted[j][rows, first : first + o.case.widths[i]] += update
            column += r
    moments = grouped.grouped_expand_(o.y, h, o.W, o.B, o.batch, o.own, o.places, o.scales, True, SMALL)
    for j, y in enumerate(o.y):
        assert_close(y, wanted[j], o.dtype, "y")
        for g in range(len(o.case.ranks)):
            rows = wide(y)[o.rows(g)]
            assert_close(
                moments[g * len(o.y) + j], torch.stack([rows.sum(0), rows.square().sum(0)]), torch.float32, "moments"
            )


@problems
def test_linear_backward(name, kind):
    o = Operands(CASES[name], *KINDS[kind])
    dh = expected_dh(o, o.slices(o.dy)).to(DEVICE, o.dtype)
    wanted, n = wide(o.x), len(o.case.widths)
    for g, ranks in enumerate(o.case.ranks):
        stacked = torch.cat([o.factor(o.A, g, i) for i in range(n)])
        wanted[o.rows(g)] += wide(dh)[o.rows(g), : sum(ranks)] @ stacked
    dx = grouped.grouped_linear_backward_(o.x.clone(), dh, o.A, o.batch, o.own, SMALL)
    assert_close(dx, wanted, o.dtype, "dx")


@problems
@pytest.mark.parametrize("variant", ["all", "no dA", "missing dy"])
def test_wgrad(name, kind, variant, monkeypatch):
    o = Operands(CASES[name], *KINDS[kind])
    monkeypatch.setattr(grouped, "choose_split", lambda *sizes: 2)
    dy, n = o.slices(o.dy), len(o.case.widths)
    if variant == "missing dy":
        dy[-1] = None
    dh, h = expected_dh(o, o.slices(o.dy)).to(DEVICE, o.dtype), expected_h(o).to(DEVICE, o.dtype)
    x = None if variant == "no dA" else o.x
    if x is None and all(part is None for part in dy):
        pytest.skip("nothing wanted")
    dA, dB, Q = grouped.grouped_wgrad(x, dh, dy, h, o.case.widths, o.batch, o.own, o.scales, tiles=SMALL)
    assert len(dA) == (0 if x is None else len(o.A)) and len(dB) == len(Q) == len(o.B)
    for g, ranks in enumerate(o.case.ranks):
        rows, column = o.rows(g), 0
        for i, r in enumerate(ranks):
            at = g * n + i
            if x is not None:
                assert_close(dA[at], wide(dh)[rows, column : column + r].T @ wide(x)[rows], torch.float32, "dA")
            grad = torch.zeros(len(rows), o.case.widths[i]).double() if dy[i] is None else wide(dy[i])[rows]
            assert_close(dB[at], o.scales[at] * grad.T @ wide(h)[rows, column : column + r], torch.float32, "dB")
            probes = slice(sum(ranks), sum(ranks) + o.case.probes[g])
            assert_close(Q[at], grad.T @ wide(h)[rows, probes], torch.float32, "Q")
            column += r
