"""Many adapters in one batch: both native passes against a loop over the adapters in float64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from support.native_grouped_help import (
    DISTRIBUTIONS,
    DTYPES,
    RANKS,
    close,
    draw_ids,
    loop_backward,
    loop_forward,
    make,
    strided,
)
from support.native_help import interleaved_columns

from fastlora.ops import native, reference

pytestmark = pytest.mark.skipif(
    os.environ.get("FASTLORA_BUILD") == "0", reason="FASTLORA_BUILD=0: the native library is left out on purpose"
)

SIZES = [0, 1, 2, 12, 37, 133]
LAYOUTS = ["contiguous", "slice", "transposed"]


@pytest.fixture(autouse=True)
def _seed_and_threads():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def check_forward(batch) -> torch.Tensor:
    """h, y and the moments of one forward; base-only rows of y keep their bits."""
    base = [y[batch.ids < 0].clone() for y in batch.y]
    exact_h, exact_y = loop_forward(batch)
    h, moments = batch.forward()
    depth = batch.x.shape[1]
    close(h, exact_h, depth, "h")
    assert not h[batch.ids < 0].any()
    for y, exact, kept in zip(batch.y, exact_y, base, strict=True):
        close(y, exact, depth + batch.width, "y")
        assert torch.equal(y[batch.ids < 0], kept)
    assert len(moments) == batch.adapters * len(batch.y)
    for i, sums in enumerate(moments):
        rows = batch.y[i % len(batch.y)][batch.ids == i // len(batch.y)]
        exact = reference.column_moments(rows)
        # A sum may cancel: its terms, whose squares' sum is in the second row, set the scale.
        scale = (exact[1] * max(len(rows), 1)).sqrt().clamp(min=1)
        assert ((sums - exact).abs() <= 32 * torch.finfo(torch.float32).eps * torch.stack([scale, exact[1]])).all()
    return h


def check_backward(batch, h: torch.Tensor) -> None:
    """dx and every gradient of one backward; base-only rows of dx keep their bits, absent adapters get zeros."""
    base = batch.dx[batch.ids < 0].clone()
    exact_dx, *exact = loop_backward(batch, h)
    found = batch.backward(h)
    close(batch.dx, exact_dx, sum(dy.shape[1] for dy in batch.dy) + batch.width, "dx")
    assert torch.equal(batch.dx[batch.ids < 0], base)
    assert len(found[2]) == (len(batch.A) if any(batch.probes) else 0)
    terms = len(batch.ids) * max(batch.width, 1)
    for name, tensors, targets in zip("ABQ", found, exact, strict=True):
        for tensor, target in zip(tensors, targets[: len(tensors)], strict=True):
            close(tensor, target, terms, f"d{name}")
    assert all(t.dtype == like.dtype for t, like in zip(found[0] + found[1], batch.A + batch.B, strict=True))
    assert all(t.dtype == torch.float32 for t in found[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_distributions(distribution, rows, dtype):
    for adapters in (1, 8, 32, 128):
        ids = draw_ids(distribution, rows, adapters)
        batch = make(ids, adapters, 23, [18, 7], [3, 1, 5, 0], dtype, fused=adapters == 8, probes=(0, 4))
        check_backward(batch, check_forward(batch))


@pytest.mark.parametrize("rank", RANKS)
def test_ranks(rank):
    for dtype, ranks in ((torch.float32, [rank]), (torch.float32, [rank, 2, 0, 9]), (torch.bfloat16, [4, rank])):
        batch = make(draw_ids("uniform", 50, 4), 4, 65, [33, 20], ranks, dtype, fused=True, probes=(2, 0))
        check_backward(batch, check_forward(batch))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapter", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fused", [False, True])
def test_strides_and_dtypes_of_factors(fused, layout, adapter, dtype):
    batch = make(draw_ids("zipf", 71, 5), 5, 130, [64, 40, 9], [8, 3, 0, 5], dtype, adapter, fused, (1, 0), layout)
    h = check_forward(batch)
    wide = torch.full((len(batch.ids), h.shape[1] + 3), torch.nan, dtype=dtype)
    wide[:, 1:-2] = h
    check_backward(batch, wide[:, 1:-2])


def interleaved(samples: torch.Tensor, tokens: int) -> torch.Tensor:
    return samples.repeat(tokens)


ORDERS = {
    "per sample": lambda: torch.tensor([2, 0, -1, 2, 1]).repeat_interleave(19),
    "tokens first": lambda: interleaved(torch.tensor([2, 0, -1, 2, 1]), 19),
    "long and short runs": lambda: torch.cat([torch.full((30,), 1), torch.arange(40) % 3, torch.full((25,), 2)]),
    "single rows": lambda: torch.tensor([0, 2, 1, 1, 0, 2, -1, 0]),
    "every second": lambda: torch.where(torch.arange(90) % 2 == 0, 0, torch.randint(-1, 3, (90,))),
    "long run, then spaced": lambda: torch.cat([torch.zeros(13, dtype=torch.int64), interleaved(torch.arange(3), 14)]),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ORDERS)
def test_orders_of_rows(name, dtype):
    for fused in (True, False):
        batch = make(ORDERS[name](), 3, 40, [24, 17], [4, 2, 7], dtype, fused=fused, probes=(2, 0, 1))
        check_backward(batch, check_forward(batch))


@pytest.mark.parametrize("dtype", DTYPES)
def test_contiguous_ranges_without_an_order(dtype):
    ids = torch.tensor([3] * 30 + [-1] * 4 + [0] * 1 + [2] * 41 + [-1])
    for layout in LAYOUTS:
        batch = make(ids, 5, 40, [24, 17], [4, 2, 7], dtype, probes=(2, 0, 1), layout=layout, direct=True)
        assert batch.order.numel() == 0
        check_backward(batch, check_forward(batch))


@pytest.mark.parametrize("name", ORDERS)
def test_segments_that_the_library_built(name):
    batch = make(ORDERS[name](), 3, 40, [24, 17], [4, 2, 7], probes=(2, 0, 1))
    batch.order, batch.ranges = torch.ops.fastlora.build_segments(batch.ids, 3)
    check_backward(batch, check_forward(batch))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direct", [False, True], ids=["scattered", "runs"])
def test_projections_that_interleave_are_those_of_sorted_columns(direct, dtype):
    widths, blocks = [24, 12, 6], 6
    ids = draw_ids("uniform", 80, 4)
    batch = make(ids.sort()[0] if direct else ids, 4, 40, widths, [3, 17, 5, 20], dtype, torch.float32, True,
                 probes=(2, 0, 1), direct=direct)  # fmt: skip
    columns, order = interleaved_columns(widths, blocks)
    dy, start, before = strided(80, sum(widths), dtype), strided(80, sum(widths), dtype), batch.dx.clone()
    results = []
    for places, own in ((batch.columns, order), (columns, list(range(len(order))))):
        batch.columns, batch.y, batch.dy = places, [start[:, own].clone()], [dy[:, own]]
        batch.dx.copy_(before)
        h, moments = batch.forward()
        found, back = batch.backward(h), torch.tensor(own).argsort()
        parts = [t for part in found for t in part]
        results.append([h, batch.y[0][:, back], *[m[:, back] for m in moments], batch.dx.clone(), *parts])
    for one, other in zip(*results, strict=True):
        close(other, one.double(), 128, "interleaved")


def test_no_adapters_no_rows_no_ranks():
    for ids, adapters, ranks in (([-1] * 5, 0, [3]), ([], 3, [3]), ([], 0, [3]), ([0, 1, 1, -1], 2, [0])):
        batch = make(torch.tensor(ids, dtype=torch.int64), adapters, 6, [4, 3], ranks)
        check_backward(batch, check_forward(batch))


def test_routing():
    """Adapter g multiplies by g + 1 in whole numbers: any row that meets another adapter is off."""
    ids = draw_ids("uniform", 133, 8)
    batch = make(ids, 8, 16, [12], [2], layout="contiguous")
    batch.x = torch.randint(-3, 4, batch.x.shape).float()
    batch.dy = [torch.randint(-3, 4, (133, 12)).float()]
    batch.y, batch.dx, batch.scales = [torch.zeros(133, 12)], torch.zeros(133, 16), [1.0] * 8
    batch.A = [torch.full((2, 16), float(g + 1)) for g in range(8)]
    batch.B = [torch.full((12, 2), float(10 * (g + 1))) for g in range(8)]
    h, _ = batch.forward()
    factor = (ids + 1).float()
    assert torch.equal(h, (factor * batch.x.sum(1))[:, None].expand(-1, 2))
    assert torch.equal(batch.y[0], (20 * factor**2 * batch.x.sum(1))[:, None].expand(-1, 12))
    dA, dB, _ = batch.backward(h)
    dh = 10 * factor * batch.dy[0].sum(1)
    assert torch.equal(batch.dx, (2 * dh * factor)[:, None].expand(-1, 16))
    for g in range(8):
        mine = ids == g
        assert torch.equal(dA[g], (dh[mine] @ batch.x[mine])[None].expand(2, -1))
        assert torch.equal(dB[g], (batch.dy[0][mine].t() @ h[mine]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_others_are_never_read(dtype):
    """Rows of another adapter, and those without one, may hold NaN."""
    ids = draw_ids("uniform", 133, 6)
    batch = make(ids, 6, 40, [24, 17], [4, 2, 7], dtype, probes=(2, 0, 1))
    poisoned = (ids == 3) | (ids == -1)
    clean = loop_forward(batch)
    for tensor in (batch.x, *batch.dy):
        tensor[poisoned] = torch.nan
    h, moments = batch.forward()
    close(h[~poisoned], clean[0][~poisoned], 40, "h")
    assert all(m.isfinite().all() for i, m in enumerate(moments) if i // 2 != 3)
    h[ids == -1] = torch.nan
    kept = batch.dx[ids == -1].clone()
    gradients = batch.backward(h)
    assert torch.equal(batch.dx[ids == -1], kept)
    assert batch.dx[~poisoned].isfinite().all() and batch.dx[ids == 3].isnan().all()
    for tensors in gradients:
        assert all(t.isfinite().all() for i, t in enumerate(tensors) if i // 2 != 3)
        assert all(t.isnan().all() for i, t in enumerate(tensors) if i // 2 == 3 and t.numel())


def test_gradients_that_are_not_needed():
    batch = make(draw_ids("zipf", 80, 4), 4, 12, [8, 6], [2, 3], probes=(2, 0))
    h, start = batch.forward()[0], batch.dx.clone()
    dA, dB, Q = batch.backward(h)
    after = batch.dx.clone()
    only = {(a, b): batch.backward(h, (a, b), dx=False) for a in (True, False) for b in (True, False)}
    for (need_A, need_B), found in only.items():
        assert all(map(torch.equal, found[0], dA if need_A else [])) and len(found[0]) == need_A * len(dA)
        assert all(map(torch.equal, found[1], dB if need_B else [])) and len(found[1]) == need_B * len(dB)
        assert all(map(torch.equal, found[2], Q))
    assert batch.backward(h, probes=[0] * 4)[2] == []
    batch.dx.copy_(start)
    batch.backward(h, (False, False))
    assert torch.equal(batch.dx, after)


def test_projection_without_a_gradient_gets_zeros():
    batch = make(draw_ids("zipf", 80, 4), 4, 12, [8, 6], [2, 3], probes=(2, 0))
    h = batch.forward()[0]
    batch.outputs, batch.dy = [-1, 0], batch.dy[1:]
    check_backward(batch, h)
    assert not any(t.any() for tensors in batch.backward(h) for t in tensors[::2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_schemas_and_fake_tensors(dtype):
    batch = make(
        draw_ids("uniform", 9, 3), 3, 5, [7, 3], [1, 2, 4], dtype, torch.float32, probes=(2, 0), layout="slice"
    )
    h, ops, utils = batch.forward()[0], torch.ops.fastlora, ("test_schema", "test_faketensor")
    for moments in (True, False):
        arguments = (batch.y, batch.x, batch.A, batch.P, batch.B, *batch.where(), moments)
        torch.library.opcheck(ops.lora_grouped_forward_.default, arguments, test_utils=utils)
    for dx in (batch.dx, None):
        for probes in (batch.probes, [0] * 3):
            arguments = (dx, batch.dy, batch.x, h, batch.A, batch.B, *batch.where(), probes, True, dx is None)
            torch.library.opcheck(ops.lora_grouped_backward_.default, arguments, test_utils=utils)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"order": torch.arange(4)}, "order has 4 entries; accepted: 0, or the 5 rows of x"),
        ({"order": torch.tensor([0, 1, 2, 3, 5])}, "order: row 5 at position 4; x has 5"),
        ({"order": torch.tensor([0, -1, 2, 3, 4])}, "order: row -1 at position 1"),
        ({"order": torch.arange(5).int()}, "order has dtype Int"),
        ({"ranges": torch.tensor([[0, 6], [0, 0]])}, "ranges: adapter 0 has positions 0 to 6 of 5"),
        ({"ranges": torch.tensor([[3, 2], [0, 0]])}, "ranges: adapter 0 has positions 3 to 2"),
        ({"ranges": torch.tensor([[0, 3], [2, 5]])}, "ranges: adapters 0 and 1 overlap at position 2"),
        ({"ranges": torch.zeros(2, 3, dtype=torch.int64)}, "ranges has 3 columns"),
        ({"ranges": torch.zeros(3, 2, dtype=torch.int64)}, "A has 2 entries; 3 adapters of 1 projections need 3"),
        ({"B": [torch.ones(4, 2)]}, "B has 1 entries, but A has 2"),
        ({"scales": [1.0]}, "scales has 1 entries, but A has 2"),
        ({"columns": []}, "columns has 0 entries, but outputs has 1"),
        ({"columns": [1]}, "columns: 1 to 5 were asked for, but there are 4"),
        ({"outputs": [-1]}, "outputs: -1"),
        ({"outputs": [1]}, "outputs: 1 was asked for, of 1"),
        ({"A": [torch.ones(2, 5), torch.ones(2, 6)]}, "A has 5 columns, but x has 6"),
        ({"P": [torch.ones(1, 6)]}, "P has 1 entries; accepted: 0, or one for each of the 2 adapters"),
        ({"P": [torch.ones(1, 5)] * 2}, "P has 5 columns, but x has 6"),
        ({"starts": [0, 2]}, "starts has 2 entries; 2 adapters of 1 projections need 4"),
        ({"starts": [1, 3, 0, 2]}, "starts: adapter 0 begins at 1"),
        ({"starts": [0, 2, 0, 3]}, "A is 2 x 6 and B 4 x 2 for adapter 1, projection 0, but its rank is 3"),
        ({"y": [torch.ones(4, 4)]}, "y has 4 rows, but x has 5"),
    ],
)
def test_forward_errors(change, message):
    batch = make(torch.tensor([0, 1, 1, -1, 0]), 2, 6, [4], [2])
    for name, value in change.items():
        setattr(batch, name, value)
    before = [y.clone() for y in batch.y]
    with pytest.raises(RuntimeError, match=message):
        batch.forward()
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, batch.y, strict=True))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dx": torch.ones(5, 7)}, "dx has 7 columns, but x has 6"),
        ({"dy": [torch.ones(4, 4)]}, "dy has 4 rows, but x has 5"),
        ({"dy": [torch.ones(5, 4).half()]}, "dy has dtype Half"),
        ({"probes": [0]}, "probes has 1 entries for 2 adapters"),
        ({"probes": [0, -1]}, "probes has -1"),
        ({"probes": [0, 2]}, "h has 3 columns, but adapter 1 has 2 ranks and 2 probes"),
        ({"outputs": [-2]}, "outputs: -2"),
        ({"ranges": torch.tensor([[0, 3], [2, 5]])}, "overlap"),
    ],
)
def test_backward_errors(change, message):
    batch = make(torch.tensor([0, 1, 1, -1, 0]), 2, 6, [4], [2], layout="contiguous")
    for name, value in change.items():
        setattr(batch, name, value)
    before = batch.dx.clone()
    with pytest.raises(RuntimeError, match=message):
        batch.backward(strided(5, 3, torch.float32))
    assert torch.equal(batch.dx, before)


@pytest.mark.skipif("FASTLORA_CPU_ISA" in os.environ, reason="runs inside the subprocess of this very test")
@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_other_instruction_sets(isa):
    order = ["portable", "avx2", "avx512", "avx512_bf16"]
    if order.index(isa) >= order.index(native.isa()):
        pytest.skip(f"this processor's choice is {native.isa()}")
    files = [__file__, __file__.replace(".py", "_rows.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "FASTLORA_CPU_ISA": isa}
    chosen = [*command, "-k", "orders or ranks or routing or alone or threads"]
    done = subprocess.run(chosen, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
