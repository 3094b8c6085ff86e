"""Rows of several adapters: every kernel against a loop over adapters in float64."""

from __future__ import annotations

import pytest
import torch
from fastlora.kernels import grouped, wgrad
from fastlora.kernels.tiling import TileConfig
from support.triton_grouped_help import (
    CASES,
    Mixed,
    Operands,
    expected_dh,
    expected_dx,
    expected_h,
    expected_wgrad,
    expected_y,
)
from support.triton_help import DEVICE, INTERPRETED, assert_close, wide

from fastlora.ops import reference

pytestmark = pytest.mark.usefixtures("poisoned")
SMALL = TileConfig(16, 16, 16, 4, 2, band=2)


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
    wanted = expected_y(o, h)
    moments = grouped.grouped_expand_(o.y, h, o.W, o.B, o.batch, o.own, o.places, o.scales, True, SMALL)
    for j, y in enumerate(o.y):
        assert_close(y, wanted[j], o.dtype, "y")
        for g in range(len(o.case.ranks)):
            own = reference.counted_moments(wide(y)[o.rows(g)])
            assert_close(moments[g * len(o.y) + j], own, torch.float32, "moments")


@problems
def test_linear_backward(name, kind):
    o = Operands(CASES[name], *KINDS[kind])
    dh = expected_dh(o, o.slices(o.dy)).to(DEVICE, o.dtype)
    dx = grouped.grouped_linear_backward_(o.x.clone(), dh, o.A, o.batch, o.own, SMALL)
    assert_close(dx, expected_dx(o, o.x, dh), o.dtype, "dx")


@problems
@pytest.mark.parametrize("variant", ["all", "no dA", "missing dy"])
def test_wgrad(name, kind, variant, monkeypatch):
    o = Operands(CASES[name], *KINDS[kind])
    monkeypatch.setattr(grouped, "choose_split", lambda *sizes: 2)
    dy = o.slices(o.dy)
    if variant == "missing dy":
        dy[-1] = None
    dh, h = expected_dh(o, o.slices(o.dy)).to(DEVICE, o.dtype), expected_h(o).to(DEVICE, o.dtype)
    x = None if variant == "no dA" else o.x
    if x is None and all(part is None for part in dy):
        pytest.skip("nothing wanted")
    dA, dB, Q = grouped.grouped_wgrad(x, dh, dy, h, o.case.widths, o.batch, o.own, o.scales, tiles=SMALL)
    for name, found, wanted in zip("ABQ", (dA, dB, Q), expected_wgrad(o, x, dh, dy, h), strict=True):
        assert len(found) == len(wanted)
        for at, (one, other) in enumerate(zip(found, wanted, strict=True)):
            assert_close(one, other, torch.float32, f"{name}[{at}]")


def test_the_grid_stays_within_its_limit(monkeypatch):
    """Parts times adapters are one axis of wgrad's grid; beyond it the adapters alone are too many."""
    o, grids = Operands(CASES["long_runs"]), []
    dh, h, dy = expected_dh(o, o.slices(o.dy)).float().to(DEVICE), expected_h(o).float().to(DEVICE), o.slices(o.dy)
    real = wgrad.launch
    monkeypatch.setattr(
        wgrad, "launch", lambda kernel, grid, *rest, **own: [grids.append(grid), real(kernel, grid, *rest, **own)]
    )
    monkeypatch.setattr(grouped, "choose_split", lambda *sizes: 8)
    monkeypatch.setattr(grouped, "GRID_LIMIT", 5)
    found = grouped.grouped_wgrad(o.x, dh, dy, h, o.case.widths, o.batch, o.own, o.scales, tiles=SMALL)
    assert [grid[2] for grid in grids] == [4]
    for some, others in zip(found, expected_wgrad(o, o.x, dh, dy, h), strict=True):
        for one, other in zip(some, others, strict=True):
            assert_close(one, other, torch.float32, "wgrad")
    monkeypatch.setattr(grouped, "GRID_LIMIT", 1)
    with pytest.raises(ValueError, match="adapters: 2 in one batch; the Triton backend takes at most 1"):
        grouped.grouped_shrink(o.x, o.factors_of_shrink(), o.batch, o.own, SMALL)


def test_rows_do_not_depend_on_the_rest_of_the_batch():
    """An adapter's h, y and dx are the same bits alone and among others, wherever its rows stand."""
    case = Mixed((0, 1, 1, 0, 2, -1, 1, 1) * 6, 64, (32,), (16, 16), ((8, 3), (5, 17), (40, 1)), (4, 2, 0))
    o = Operands(case)
    rows = o.rows(1)
    alone = Operands(Mixed((0,) * len(rows), 64, (32,), (16, 16), (case.ranks[1],), (2,)))
    alone.x, alone.dy, alone.W, alone.y = o.x[rows], [g[rows] for g in o.dy], o.W, [y[rows] for y in o.y]
    alone.A, alone.B, alone.P, alone.scales = o.A[2:4], o.B[2:4], o.P[1:2], o.scales[2:4]
    found = []
    for some in (o, alone):
        h = grouped.grouped_shrink(some.x, some.factors_of_shrink(), some.batch, some.own, SMALL)
        grouped.grouped_expand_(some.y, h, some.W, some.B, some.batch, some.own, some.places, some.scales, tiles=SMALL)
        dh = grouped.grouped_shrink_backward(some.slices(some.dy), some.B, some.batch, some.own, some.scales, SMALL)
        dx = grouped.grouped_linear_backward_(some.x.clone(), dh, some.A, some.batch, some.own, SMALL)
        found.append((h, *some.y, dx))
    for among, apart in zip(*found, strict=True):
        assert torch.equal(among[rows][:, : apart.shape[1]], apart)


@pytest.mark.skipif(not INTERPRETED, reason="counts the products of the interpreter")
def test_work_is_the_sum_of_own_rows_times_own_ranks(monkeypatch):
    """A rank more costs only the rows of the adapter that has it, and an adapter without rows nothing."""
    from triton.runtime import interpreter

    real, counted = interpreter.InterpreterBuilder.create_dot, []

    def counting(self, a, b, *rest, **named):
        counted.append(a.data.shape[0] * a.data.shape[1] * b.data.shape[1])
        return real(self, a, b, *rest, **named)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", counting)

    def work(ranks):
        counted.clear()
        o = Operands(Mixed((0,) * 48 + (1,) * 16, 32, (32,), (32,), tuple((r,) for r in ranks), (0,) * len(ranks)))
        h = grouped.grouped_shrink(o.x, o.factors_of_shrink(), o.batch, o.own, SMALL)
        grouped.grouped_expand_(o.y, h, o.W, o.B, o.batch, o.own, o.places, o.scales, tiles=SMALL)
        dh = grouped.grouped_shrink_backward(o.slices(o.dy), o.B, o.batch, o.own, o.scales, SMALL)
        grouped.grouped_linear_backward_(o.x, dh, o.A, o.batch, o.own, SMALL)
        return sum(counted)

    base = work((16, 16))
    assert base == 4 * 64 * 32 * 16
    assert work((16, 64)) == base + 4 * 16 * 32 * 48
    assert work((64, 16)) == base + 4 * 48 * 32 * 48
    assert work((16, 16, 128, 128)) == base
