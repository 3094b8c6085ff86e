"""Every kernel against float64, verb by verb. Run in Triton's interpreter, and on a GPU by benchmarks/device.sh."""

from __future__ import annotations

import pytest
import torch
from fastlora.kernels import (
    expand_backward,
    linear,
    linear_backward,
    shrink,
    shrink_linear,
    shrink_linear_backward,
    signs,
    tiling,
    wgrad,
)
from fastlora.kernels.tiling import TileConfig
from support.every_verb import expected_dx_of
from support.triton_help import (
    DEVICE,
    EMPTY,
    EVEN,
    FUSED,
    INTERPRETED,
    PROBLEMS,
    SEPARATE,
    Data,
    assert_close,
    expected_dh,
    expected_h,
    wide,
)

from fastlora.ops import reference

pytestmark = pytest.mark.usefixtures("poisoned")
SMALL = TileConfig(16, 16, 16, 4, 2, band=2)
# More steps to split; a step that only the interpreter can multiply.
SHALLOW = SMALL._replace(depth=4 if INTERPRETED else 16)
KINDS = {
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
}
# Every problem in fp32; the other dtypes share its code but for the casts, so one problem does for them.
COMBINATIONS = [(p, "fp32") for p in PROBLEMS] + [("separate", "fp16"), ("separate", "bf16"), ("wide_rank", "fp16")]
problems = pytest.mark.parametrize(
    ("problem", "dtype", "factors"),
    [(PROBLEMS[p], *KINDS[kind]) for p, kind in COMBINATIONS],
    ids=[f"{p}-{kind}" for p, kind in COMBINATIONS],
)


def dropped(p: float) -> dict:
    return {"threshold": reference.keep_threshold(p), "keep_scale": 1 / (1 - p)}


@problems
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_shrink(problem, dtype, factors, p, monkeypatch):
    data = Data(problem, dtype, factors, strided=problem is SEPARATE)
    monkeypatch.setattr(tiling, "PROGRAMS", 24 if problem is SEPARATE else 1)
    extra = [] if data.P is None else [data.P]
    options = {"seed": data.seed, **dropped(p)} if p else {}
    tiles = SHALLOW if problem is SEPARATE and not p else SMALL
    h = shrink.shrink(data.x, [*data.A, *extra], len(extra), tiles=tiles, **options)
    assert h.dtype == dtype
    assert_close(h, expected_h(data, p), dtype, "h")


@problems
@pytest.mark.parametrize("missing", [False, True])
def test_shrink_backward(problem, dtype, factors, missing, monkeypatch):
    data = Data(problem, dtype, factors, strided=problem is FUSED)
    if missing and len(data.dy) == 1:
        pytest.skip("one output")
    monkeypatch.setattr(tiling, "PROGRAMS", 24)
    if missing:
        data.dy[0] = None
    layout = data.layout
    tiles = SHALLOW
    dh = shrink.shrink_backward(data.parts(), data.B, layout.offsets, data.scale, layout.rank, tiles, data.runs)
    assert dh.dtype == dtype
    assert_close(dh, expected_dh(data), dtype, "dh")


@problems
@pytest.mark.parametrize("strategy", ["fused", "tma", "library", "augmented"])
def test_linear(problem, dtype, factors, strategy, monkeypatch):
    data = Data(problem, dtype, factors, strided=problem is SEPARATE)
    # Fewer programs than tiles, so that each goes from projection to projection.
    monkeypatch.setattr(linear, "limits", lambda device: tiling.Limits((9, 0), 0, 2))
    tiles, strategy = (SMALL._replace(tma=True), "fused") if strategy == "tma" else (SMALL, strategy)
    h = expected_h(data).to(DEVICE, dtype)
    layout = data.layout
    y, moments = linear.linear(
        data.x, data.W, data.bias, h, data.B, data.places, layout.offsets, data.scale, True, strategy, tiles, data.runs
    )
    update = [torch.zeros(problem.M, n, dtype=torch.float64) for n in problem.outputs]
    for i, (b, o, s) in enumerate(zip(data.B, layout.offsets, data.scale, strict=True)):
        own = s * wide(h)[:, o : o + b.shape[1]] @ wide(b.to(dtype)).T
        for first, column, count in layout.runs_of(i):
            update[layout.outputs[i]][:, column : column + count] = own[:, first : first + count]
    for out, sums, part, w, b in zip(y, moments, update, data.W, data.bias, strict=True):
        wanted = wide(data.x) @ wide(w).T + part + (0 if b is None else wide(b))
        assert out.dtype == dtype and sums.dtype == torch.float64
        assert_close(out, wanted, dtype, "y")
        assert_close(sums, reference.counted_moments(wide(out)), torch.float32, "moments")
        assert sums[:, -1].tolist() == [len(out)] * 2


@problems
def test_shrink_beside_linear(problem, dtype, factors, monkeypatch):
    """h and y from one kernel."""
    data = Data(problem, dtype, factors)
    launched = []
    real = shrink_linear.launch
    monkeypatch.setattr(
        shrink_linear, "launch", lambda *given, **options: launched.append(1) or real(*given, **options)
    )
    monkeypatch.setattr(shrink_linear, "aligned", lambda tensors: True)
    layout = data.layout
    y, h, sums = shrink_linear.shrink_linear(
        data.x, data.W, data.bias, data.A, data.P, data.B, data.places, layout.offsets, data.scale,
        strategy="fused", tiles=SMALL, runs=data.runs,
    )  # fmt: skip
    assert bool(launched) == (problem not in (EMPTY, PROBLEMS["wide_rank"])) and not sums
    assert h.dtype == dtype
    assert_close(h, expected_h(data), dtype, "h")
    for i, (b, o, j) in enumerate(zip(data.B, layout.offsets, layout.outputs, strict=True)):
        own, part = slice(o, o + b.shape[1]), layout.columns_of(torch.arange(y[j].shape[1]).unsqueeze(0), i)[0]
        wanted = wide(data.x) @ wide(data.W[j])[part].T + data.scale[i] * wide(h)[:, own] @ wide(b.to(dtype)).T
        wanted += 0 if data.bias[j] is None else wide(data.bias[j])[part]
        assert_close(y[j][:, part], wanted, dtype, f"y[{j}], {i}")


@problems
@pytest.mark.parametrize("missing", [False, True])
def test_dh_beside_dx(problem, dtype, factors, missing, monkeypatch):
    """dx and dh from one kernel."""
    data = Data(problem, dtype, factors, strided=problem is SEPARATE)
    if missing and len(data.dy) == 1:
        pytest.skip("one output")
    if missing:
        data.dy[0] = None
    monkeypatch.setattr(shrink_linear_backward, "aligned", lambda tensors: True)
    rest = data.W, data.B, data.A, data.places, data.layout.offsets, data.scale
    both = shrink_linear_backward.shrink_linear_backward(
        data.parts(), *rest, strategy="fused", tiles=SMALL, runs=data.runs
    )
    if problem in (EMPTY, PROBLEMS["wide_rank"]):
        assert both is None
        return
    dx, dh = both
    assert dx.dtype == dh.dtype == dtype
    assert_close(dh, expected_dh(data), dtype, "dh")
    assert_close(dx, expected_dx_of(data, dh), dtype, "dx")


def test_a_bias_that_is_absent_reaches_as_far_as_the_columns():
    """Columns that interleave lie beyond their number, and what lies behind so few zeros is anything."""
    data, reached = Data(PROBLEMS["bare"], torch.float32), []
    y = [torch.zeros(data.problem.M, n) for n in data.problem.outputs]
    rest = y, [], data.places, data.layout.offsets, data.scale
    group = linear.as_group(linear.cut(data.W, data.bias, data.B, *rest), runs=data.runs)
    for i, bias in enumerate(group.bias):
        last = data.layout.runs_of(i)[-1]
        reached.append(bias.shape[0] - (last[1] + last[2] - data.layout.columns[i]))
    assert min(reached) >= 0


def spaced(tensor):
    return torch.full((*tensor.shape, 2), 7.0, dtype=tensor.dtype, device=DEVICE)[..., 0].copy_(tensor)


@pytest.mark.parametrize("problem", [SEPARATE, FUSED], ids=["separate", "fused"])
@pytest.mark.parametrize("lying", [spaced, lambda tensor: tensor[:1].expand(tensor.shape)], ids=["spaced", "expanded"])
def test_a_bias_may_lie_in_any_way(problem, lying, monkeypatch):
    """A column of a larger matrix, or one number for all columns."""
    monkeypatch.setattr(shrink_linear, "aligned", lambda tensors: True)
    data, layout = Data(problem, torch.float32), Data(problem, torch.float32).layout
    bias, options = [None if b is None else lying(b) for b in data.bias], {"strategy": "fused", "tiles": SMALL}
    rest = data.places, layout.offsets, data.scale
    y, h, _ = shrink_linear.shrink_linear(data.x, data.W, bias, data.A, None, data.B, *rest, **options)
    alone, _ = linear.linear(data.x, data.W, bias, h, data.B, *rest, **options)
    for i, (b, o, j) in enumerate(zip(data.B, layout.offsets, layout.outputs, strict=True)):
        own, part = slice(o, o + b.shape[1]), slice(layout.columns[i], layout.columns[i] + b.shape[0])
        wanted = wide(data.x) @ wide(data.W[j])[part].T + data.scale[i] * wide(h)[:, own] @ wide(b).T
        wanted += 0 if bias[j] is None else wide(bias[j])[part]
        assert_close(y[j][:, part], wanted, torch.float32, f"y[{j}], {i}, one kernel")
        assert_close(alone[j][:, part], wanted, torch.float32, f"y[{j}], {i}, two kernels")


def test_descriptors_are_used_where_rows_are_aligned(monkeypatch):
    seen = []
    monkeypatch.setattr(
        linear, "launch", lambda kernel, grid, *rest, **options: seen.append((grid, options["TILE"].tma))
    )
    for problem, wanted in ((FUSED, True), (SEPARATE, False)):
        data = Data(problem, torch.float16)
        rest = data.places, data.layout.offsets, data.scale, False, "fused", SMALL._replace(tma=True)
        linear.linear(data.x, data.W, data.bias, data.x, data.B, *rest)
        assert seen.pop()[1] is wanted
    monkeypatch.setattr(linear_backward, "launch", linear.launch)
    for problem, wanted in ((FUSED, True), (SEPARATE, False)):
        data = Data(problem, torch.float16)
        rest = data.x, data.A, data.layout.offsets
        linear_backward.linear_backward(data.dy, data.W, *rest, strategy="fused", tiles=SMALL._replace(tma=True))
        assert seen.pop()[1] is wanted


def test_moments_do_not_cancel():
    data = Data(FUSED, torch.float32)
    bias = [torch.full_like(b, 1e4) for b in data.bias]
    h = expected_h(data).to(DEVICE, torch.float32)
    y, moments = linear.linear(
        data.x, data.W, bias, h, data.B, data.places, data.layout.offsets, data.scale, True, "fused", SMALL
    )
    mean, square = wide(moments[0])[:, :-1] / FUSED.M
    assert torch.allclose(square - mean.square(), wide(y[0]).var(0, unbiased=False), rtol=1e-3)


@problems
@pytest.mark.parametrize(
    ("strategy", "p"), [("fused", 0.0), ("fused", 0.3), ("tma", 0.0), ("library", 0.3), ("augmented", 0.0)]
)
def test_linear_backward(problem, dtype, factors, strategy, p):
    tma = strategy == "tma"
    data = Data(problem, dtype, factors, strided=problem is (SEPARATE if tma else FUSED))
    dh = torch.randn(problem.M, data.layout.rank, device=DEVICE).to(dtype)
    options = {"seed": data.seed, **dropped(p)} if p else {}
    strategy, tiles = ("fused", SMALL._replace(tma=True)) if tma else (strategy, SMALL)
    dx = linear_backward.linear_backward(
        data.dy, data.W, dh, data.A, data.layout.offsets, strategy=strategy, tiles=tiles, **options
    )
    assert dx.dtype == dtype
    assert_close(dx, expected_dx_of(data, dh, p), dtype, "dx")


@problems
@pytest.mark.parametrize(("p", "missing"), [(0.0, False), (0.3, False), (0.3, True)])
def test_wgrad(problem, dtype, factors, p, missing, monkeypatch):
    data = Data(problem, dtype, factors, strided=problem is SEPARATE)
    if missing and len(data.dy) == 1:
        pytest.skip("one output")
    monkeypatch.setattr(tiling, "PROGRAMS", 24 if problem is SEPARATE else 1)
    if missing:
        data.dy[1] = None
    layout, s = data.layout, data.problem
    dh, h = expected_dh(data).to(DEVICE, dtype), expected_h(data, p).to(DEVICE, dtype)
    options = {"seed": data.seed, **dropped(p)} if p else {}
    slices = data.slices()
    tiles = SHALLOW if problem is SEPARATE and not p else SMALL
    dA, dB, Q = wgrad.wgrad(
        data.x, dh, data.parts(), h, layout.offsets, s.ranks, data.scale, s.probes, dtype=factors, tiles=tiles,
        runs=data.runs, **options,
    )  # fmt: skip
    live = [i for i, g in enumerate(slices) if g is not None]
    rounding = dtype if dtype != torch.float32 else factors
    for i in range(len(s.ranks)):
        part = slice(layout.offsets[i], layout.offsets[i] + s.ranks[i])
        x = reference.dropout(wide(data.x), data.seed.cpu(), i, p) if p else wide(data.x)
        assert_close(dA[i], wide(dh)[:, part].T @ x, rounding, f"dA[{i}]")
    for n, i in enumerate(live):
        part = slice(layout.offsets[i], layout.offsets[i] + s.ranks[i])
        assert_close(dB[n], data.scale[i] * wide(slices[i]).T @ wide(h)[:, part], rounding, f"dB[{i}]")
        assert_close(Q[n], wide(slices[i]).T @ wide(h)[:, layout.rank :], torch.float32, f"Q[{i}]")
    assert len(dB) == len(Q) == len(live)


@problems
@pytest.mark.parametrize(("p", "missing"), [(0.0, False), (0.3, False), (0.0, True)])
def test_one_pass_over_dy(problem, dtype, factors, p, missing, monkeypatch):
    """dh, dA, dB and Q with dy read once, its rows and columns cut so that both sums are finished later."""
    data = Data(problem, dtype, factors, strided=problem is SEPARATE)
    if missing and len(data.dy) == 1:
        pytest.skip("one output")
    monkeypatch.setattr(tiling, "PROGRAMS", 24 if problem in (SEPARATE, EVEN) else 1)
    if missing:
        data.dy[0] = None
    layout, s = data.layout, data.problem
    h, slices = expected_h(data, p).to(DEVICE, dtype), data.slices()
    options = {"seed": data.seed, **dropped(p)} if p else {}
    dh, dA, dB, Q = expand_backward.expand_backward(
        data.x, data.parts(), h, data.B, layout.offsets, data.scale, layout.rank, s.probes,
        strategy="fused", tiles=SMALL, runs=data.runs, **options,
    )  # fmt: skip
    assert dh.dtype == dtype and all(grad.dtype == factors for grad in [*dA, *dB])
    assert_close(dh, expected_dh(data), dtype, "dh")
    rounding = dtype if dtype != torch.float32 else factors
    live = [i for i, g in enumerate(slices) if g is not None]
    assert (len(dA), len(dB), len(Q)) == (len(s.ranks), len(live), len(live))
    for i in range(len(s.ranks)):
        part = slice(layout.offsets[i], layout.offsets[i] + s.ranks[i])
        x = reference.dropout(wide(data.x), data.seed.cpu(), i, p) if p else wide(data.x)
        assert_close(dA[i], wide(dh)[:, part].T @ x, rounding, f"dA[{i}]")
    for n, i in enumerate(live):
        part = slice(layout.offsets[i], layout.offsets[i] + s.ranks[i])
        assert_close(dB[n], data.scale[i] * wide(slices[i]).T @ wide(h)[:, part], rounding, f"dB[{i}]")
        assert_close(Q[n], wide(slices[i]).T @ wide(h)[:, layout.rank :], torch.float32, f"Q[{i}]")


def test_split_sums_are_repeatable(monkeypatch):
    monkeypatch.setattr(tiling, "PROGRAMS", 64)
    data = Data(SEPARATE, torch.float32)
    tiles = SHALLOW
    first, second = (shrink.shrink(data.x, data.A, tiles=tiles) for _ in range(2))
    assert torch.equal(first, second)


def test_rows_of_an_empty_batch():
    data = Data(EMPTY, torch.float16)
    dA, dB, Q = wgrad.wgrad(
        data.x, data.x[:, :5], data.slices(), data.x[:, :7], data.layout.offsets, EMPTY.ranks, data.scale, 2
    )
    assert all((grad == 0).all() for grad in [*dA, *dB, *Q])
    assert dA[0].shape == (2, 16) and dB[1].shape == (8, 3) and Q[0].shape == (16, 2)


@pytest.mark.parametrize("step", [0, 2**31 + 5, 2**32 - 1])
@pytest.mark.parametrize("counts", [(1,), (3, 0, 130, 1), (0,)])
def test_signs_are_those_of_the_reference(counts, step):
    seed = torch.tensor(-5, device=DEVICE)
    block = torch.cat([torch.arange(count, device=DEVICE) for count in counts])
    group = torch.cat([torch.full((count,), 2**31 - 1 + g, device=DEVICE) for g, count in enumerate(counts)])
    out = signs.signs_(torch.empty(128 * sum(counts), device=DEVICE), seed, step, block, group, 2**32 - 7)
    words = [torch.full_like(block, word) for word in (step, 2**32 - 7)]
    assert torch.equal(out, reference.signs_of(seed, block, words[0], group, words[1]))
