"""Every native operator against its formula in float64.

Tolerances are measured, not chosen: the error of the same formula in plain torch, in the precision that the operator
works in, times 3, plus a few roundings of the largest result.
"""

from __future__ import annotations

import pytest
import torch
from support.native_help import DTYPES, LAYOUTS, RANKS, ROWS, SIZES, check, make, needs_library

pytestmark = [needs_library, pytest.mark.every_isa]

ops = torch.ops.fastlora


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_shrink(rows, dtype):
    for size in SIZES:
        for index, rank in enumerate(RANKS):
            x = make(rows, size, dtype, LAYOUTS[index % 4])
            A = make(rank, size, dtype, LAYOUTS[(index + size) % 4])
            h = ops.shrink(x, A)
            assert h.dtype == dtype and h.is_contiguous()
            check(h, x.double() @ A.double().t(), x @ A.t(), f"h for K={size}, R={rank}")


def test_shrink_with_a_depth_beyond_one_cache_block():
    x, A = make(9, 3001, torch.float32), make(10, 3001, torch.float32)
    check(ops.shrink(x, A), x.double() @ A.double().t(), x @ A.t(), "h")


@pytest.mark.parametrize("dtype", DTYPES)
def test_shrink_by_the_identity_changes_no_bit(dtype):
    x = make(37, 33, dtype)
    assert torch.equal(ops.shrink(x, torch.eye(33, dtype=dtype)), x)


def expand_problem(rows, widths, ranks, gap, y_dtype, h_dtype, layout):
    """y with unused columns around each projection, the packed h, and one factor per projection."""
    offsets, columns, rank, column = [], [], 0, gap
    for width, r in zip(widths, ranks, strict=True):
        offsets.append(rank)
        columns.append(column)
        rank, column = rank + r, column + width + gap
    y = make(rows, column, y_dtype, "slice" if layout == "slice" else "contiguous")
    h = make(rows, rank, h_dtype, layout)
    factors = [make(width, r, h_dtype).t() for width, r in zip(widths, ranks, strict=True)]
    scales = [0.5 + i for i in range(len(widths))]
    return y, h, factors, offsets, columns, scales


def plain_expand(y, h, factors, offsets, columns, scales):
    out = y.clone()
    for factor, offset, column, scale in zip(factors, offsets, columns, scales, strict=True):
        product = h[:, offset : offset + factor.shape[0]] @ factor
        out[:, column : column + factor.shape[1]] += (scale * product).to(out.dtype)
    return out


def as_double(problem):
    y, h, factors, *rest = problem
    return y.double(), h.double(), [factor.double() for factor in factors], *rest


@pytest.mark.parametrize(
    "y_dtype, h_dtype", [*zip(DTYPES, DTYPES, strict=True), *((dtype, torch.float32) for dtype in DTYPES[1:])]
)
@pytest.mark.parametrize("rows", ROWS)
def test_expand(rows, y_dtype, h_dtype):
    for index, rank in enumerate(RANKS):
        for gap in (0, 3):
            widths, ranks = [SIZES[index % 6], SIZES[(index + 3) % 6], 65], [rank, RANKS[(index + 4) % 10], 1]
            problem = expand_problem(rows, widths, ranks, gap, y_dtype, h_dtype, LAYOUTS[index % 4])
            exact, plain = plain_expand(*as_double(problem)), plain_expand(*problem)
            before, y = problem[0].clone(), problem[0]
            assert ops.expand_(*problem, False).shape == (0,)
            check(y, exact, plain, f"y for ranks {ranks}")
            if gap:
                used = torch.zeros(y.shape[1], dtype=torch.bool)
                for width, column in zip(widths, problem[4], strict=True):
                    used[column : column + width] = True
                assert torch.equal(y[:, ~used], before[:, ~used])


def test_expand_leaves_the_surroundings_of_a_slice_alone():
    wide = torch.randn(20, 70)
    before, y = wide.clone(), wide[:, 5:54]
    ops.expand_(y, torch.randn(20, 4), [torch.randn(4, 49)], [0], [0], [1.0], False)
    assert torch.equal(wide[:, :5], before[:, :5]) and torch.equal(wide[:, 54:], before[:, 54:])
    assert not torch.equal(wide[:, 5:54], before[:, 5:54])


@pytest.mark.parametrize("dtype", DTYPES)
def test_expand_keeps_nan_and_infinity(dtype):
    y = torch.zeros(3, 40, dtype=dtype)
    y[0, 0], y[1, 20], y[2, 39] = float("nan"), float("inf"), float("-inf")
    ops.expand_(y, torch.ones(3, 1, dtype=dtype), [torch.ones(1, 40, dtype=dtype)], [0], [0], [1.0], False)
    assert y[0, 0].isnan() and y[1, 20] == float("inf") and y[2, 39] == float("-inf")
    assert (y == 1).sum() == 3 * 40 - 3


def serial_moments(y):
    """Moments about a rough mean in fp32, row after row as the kernel adds them, moved to zero in fp64."""
    number = y.shape[0]
    shift = y[:8].float().sum(0) / max(1, min(8, number))
    first, second = torch.zeros_like(shift), torch.zeros_like(shift)
    for row in y.float() - shift:
        first, second = first + row, second + row * row
    shift, first = shift.double(), first.double()
    return torch.stack([number * shift + first, second.double() + shift * (2 * first + number * shift)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_moments(rows, dtype):
    for size in SIZES:
        y, h = make(rows, size, dtype, "slice"), make(rows, 2, dtype)
        moments = ops.expand_(y, h, [make(2, size, dtype)], [0], [0], [1.0], True)
        assert moments.dtype == torch.float64 and moments.shape == (2, size)
        exact = torch.stack([y.double().sum(0), y.double().square().sum(0)])
        error, allowed = (moments - exact).abs().max(), 3 * (serial_moments(y) - exact).abs().max()
        assert error <= allowed + 4 * torch.finfo(torch.float32).eps * exact.abs().max()


def test_moments_where_the_mean_is_far_larger_than_the_spread():
    torch.set_num_threads(2)
    y = 1e4 + torch.randn(3000, 130)
    moments = ops.expand_(y, torch.zeros(3000, 1), [torch.zeros(1, 130)], [0], [0], [1.0], True) / 3000
    exact = y.double().var(0, correction=0)
    error = (moments[1] - moments[0].square() - exact).abs().max()
    # Plain fp32 sums lose the variance altogether; torch's two-pass variance is the measure.
    assert error <= 3 * (y.var(0, correction=0).double() - exact).abs().max() + 64 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("mean", [1.0, 255.0, 1e4])
def test_moments_of_narrow_values_where_the_mean_is_far_larger_than_the_spread(mean, dtype):
    y = (mean * (1 + torch.randn(3001, 130) / 256)).to(dtype)
    moments = ops.expand_(y, torch.zeros(3001, 1), [torch.zeros(1, 130)], [0], [0], [1.0], True) / 3001
    exact = y.double().var(0, correction=0)
    # fp32 sums over all rows lose up to nine tenths of it.
    assert ((moments[1] - moments[0].square()) / exact - 1).abs().max() <= 32 * torch.finfo(torch.float32).eps


def wgrad_problem(rows, depth, widths, ranks, probes, dtype, layout):
    offsets = [sum(ranks[:i]) for i in range(len(ranks))]
    rank = sum(ranks)
    wide = make(rows, sum(widths), dtype)
    dy = list(wide.split(widths, dim=1)) if layout == "slice" else [make(rows, w, dtype, layout) for w in widths]
    B = [make(w, r, dtype, layout) for w, r in zip(widths, ranks, strict=True)]
    scales = [2.0 - 0.5 * i for i in range(len(ranks))]
    x, h = make(rows, depth, dtype, layout), make(rows, rank + probes, dtype, layout)
    return x, dy, h, B, offsets, scales, rank, probes, True


def plain_wgrad(x, dy, h, B, offsets, scales, rank, probes, need_dA, dtype):
    x, h = x.to(dtype), h.to(dtype)
    dh, dB, Q = torch.zeros(x.shape[0], rank, dtype=dtype), [], []
    for grad, factor, offset, scale in zip(dy, B, offsets, scales, strict=True):
        grad, r = grad.to(dtype), factor.shape[1]
        dh[:, offset : offset + r] = scale * grad @ factor.to(dtype)
        dB.append(scale * grad.t() @ h[:, offset : offset + r])
        Q.append(grad.t() @ h[:, rank:])
    return dh, dh.t() @ x, dB, Q


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_wgrad(rows, dtype):
    for index, rank in enumerate(RANKS):
        widths = [SIZES[index % 6], 65, SIZES[(index + 2) % 6]]
        ranks, probes = [rank, RANKS[(index + 5) % 10], 1], [0, 4, 1][index % 3]
        problem = wgrad_problem(rows, SIZES[(index + 1) % 6], widths, ranks, probes, dtype, LAYOUTS[index % 4])
        actual = ops.wgrad(*problem)
        exact = plain_wgrad(*problem, torch.float64)
        plain = plain_wgrad(*problem, torch.float32)
        x, dy, h, B, *rest = problem
        # Sums of many terms may cancel: an eighth of the sum of their sizes is the scale of a rounding.
        terms = plain_wgrad(x.abs(), [g.abs() for g in dy], h.abs(), [b.abs() for b in B], *rest, torch.float64)
        for i, name in enumerate(("dh", "dA")):
            assert actual[i].dtype == torch.float32
            check(actual[i], exact[i], plain[i], f"{name} for ranks {ranks}", terms[i] / 8)
        for i, name in ((2, "dB"), (3, "Q")):
            for p in range(3):
                assert actual[i][p].dtype == torch.float32 and actual[i][p].is_contiguous()
                check(actual[i][p], exact[i][p], plain[i][p], f"{name}[{p}] for ranks {ranks}", terms[i][p] / 8)
        without = ops.wgrad(*problem[:-1], False)
        assert without[1].shape == (0, problem[0].shape[1])
        assert torch.equal(without[0], actual[0]) and all(map(torch.equal, without[2], actual[2]))


def test_wgrad_zeroes_the_ranks_of_no_projection():
    x, dy, h, B = torch.randn(40, 9), [torch.randn(40, 6)], torch.randn(40, 7), [torch.randn(6, 2)]
    dh, dA, _, _ = ops.wgrad(x, dy, h, B, [3], [1.0], 7, 0, True)
    outside = [0, 1, 2, 5, 6]
    assert not dh[:, outside].any() and not dA[outside].any()
    assert dh[:, 3:5].any() and dA[3:5].any()


def test_wgrad_without_projections():
    dh, dA, dB, Q = ops.wgrad(torch.randn(5, 3), [], torch.randn(5, 2), [], [], [], 2, 0, True)
    assert not dh.any() and dh.shape == (5, 2) and not dA.any() and dB == [] and Q == []


@pytest.mark.parametrize(
    "d_dtype, x_dtype", [*zip(DTYPES, DTYPES, strict=True), *((torch.float32, dtype) for dtype in DTYPES[1:])]
)
@pytest.mark.parametrize("rows", ROWS)
def test_outer(rows, d_dtype, x_dtype):
    for index, rank in enumerate(RANKS):
        for size in SIZES:
            d, x = make(rows, rank, d_dtype, LAYOUTS[size % 4]), make(rows, size, x_dtype, LAYOUTS[index % 4])
            actual = ops.outer(d, x)
            assert actual.dtype == torch.float32
            terms = d.double().abs().t() @ x.double().abs()  # a short sum may cancel: its terms set the scale
            check(actual, d.double().t() @ x.double(), d.float().t() @ x.float(), f"r={rank}, K={size}", terms)


def test_expand_rounds_every_value_to_bfloat16_as_torch_does():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).view(512, 128)
    for y in (every, every.nan_to_num(nan=0.5), every.clamp(0.25, 8.0)):  # tiles of odd values, and without them
        for value in (0.0, 1.0, 2.0**-9, -(2.0**-130)):
            h, factor = torch.full((512, 1), value, dtype=torch.bfloat16), torch.ones(1, 128, dtype=torch.bfloat16)
            got = y.clone()
            ops.expand_(got, h, [factor], [0], [0], [1.0], False)
            expected = (y.float() + value).to(torch.bfloat16)
            assert torch.equal(got.isnan(), expected.isnan())
            assert torch.equal(got.view(torch.int16)[~expected.isnan()], expected.view(torch.int16)[~expected.isnan()])
