"""Every native operator against its formula in float64.

Tolerances are measured, not chosen: the error of the same formula in plain torch, in the precision that the operator
works in, times 3, plus a few roundings of the largest result.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastlora import native

pytestmark = pytest.mark.skipif(
    os.environ.get("FASTLORA_BUILD") == "0", reason="FASTLORA_BUILD=0: the native library is left out on purpose"
)

ops = torch.ops.fastlora
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = [0, 1, 2, 3, 7, 33, 100]
SIZES = [1, 5, 16, 17, 63, 130]
RANKS = [0, 1, 2, 3, 5, 8, 9, 16, 17, 33]
LAYOUTS = ["contiguous", "slice", "transposed", "strided"]


@pytest.fixture(autouse=True)
def _seed_and_threads():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def make(rows: int, columns: int, dtype: torch.dtype, layout: str = "contiguous") -> torch.Tensor:
    if layout == "slice":
        return torch.randn(rows, columns + 7, dtype=dtype)[:, 3 : 3 + columns]
    if layout == "transposed":
        return torch.randn(columns, rows, dtype=dtype).t()
    if layout == "strided":
        return torch.randn(2 * rows, 3 * columns, dtype=dtype)[::2, ::3]
    return torch.randn(rows, columns, dtype=dtype)


def check(
    actual: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor, what: str, scale: torch.Tensor | None = None
) -> None:
    """Asserts that ``actual`` is as near to the float64 result as plain torch is, within a factor of 3."""
    assert actual.shape == exact.shape, what
    if exact.numel() == 0:
        return
    error = (actual.double() - exact).abs().max().item()
    allowed = 3 * (plain.double() - exact).abs().max().item()
    allowed += 4 * torch.finfo(actual.dtype).eps * (exact if scale is None else scale).abs().max().item()
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def test_library_is_loaded():
    assert native.available(), native.reason()
    assert native.reason() is None
    assert native.isa() in ("avx512", "avx2", "portable")
    for name in ("shrink", "expand_", "wgrad", "outer", "dropout"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastlora::{name}", "CPU"), name


@pytest.mark.skipif(
    shutil.which("nvcc") is None or os.environ.get("FASTLORA_CUDA") == "0", reason="built without the CUDA compiler"
)
def test_cuda_operator_is_compiled_and_registered():
    assert torch._C._dispatch_has_kernel_for_dispatch_key("fastlora::shrink", "CUDA")


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_moments(rows, dtype):
    for size in SIZES:
        y, h = make(rows, size, dtype, "slice"), make(rows, 2, dtype)
        moments = ops.expand_(y, h, [make(2, size, dtype)], [0], [0], [1.0], True)
        assert moments.dtype == torch.float64 and moments.shape == (2, size)
        exact = torch.stack([y.double().sum(0), y.double().square().sum(0)])
        plain = torch.stack([y.float().sum(0), y.float().square().sum(0)])
        error, allowed = (moments - exact).abs().max(), 3 * (plain.double() - exact).abs().max()
        assert error <= allowed + 4 * torch.finfo(torch.float32).eps * exact.abs().max()


def test_moments_where_the_mean_is_far_larger_than_the_spread():
    torch.set_num_threads(2)
    y = 1e4 + torch.randn(3000, 130)
    moments = ops.expand_(y, torch.zeros(3000, 1), [torch.zeros(1, 130)], [0], [0], [1.0], True) / 3000
    exact = y.double().var(0, correction=0)
    error = (moments[1] - moments[0].square() - exact).abs().max()
    # Plain fp32 sums lose the variance altogether; torch's two-pass variance is the measure.
    assert error <= 3 * (y.var(0, correction=0).double() - exact).abs().max() + 64 * torch.finfo(torch.float32).eps


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


def philox(counter: tuple, seed: int) -> list[np.ndarray]:
    """Philox4x32-10 on arrays of 32-bit words held in uint64."""
    mask = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = (np.asarray(word, dtype=np.uint64) for word in counter)
    key0, key1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        product0, product1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c2 = (product1 >> np.uint64(32)) ^ c1 ^ np.uint64(key0), (product0 >> np.uint64(32)) ^ c3 ^ np.uint64(key1)
        c1, c3 = product1 & mask, product0 & mask
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def test_philox_oracle_on_the_published_vectors():
    ones = 0xFFFFFFFF
    assert [int(word) for word in philox((0, 0, 0, 0), 0)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    all_ones = [int(word) for word in philox((ones,) * 4, (ones << 32) | ones)]
    assert all_ones == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 123456789012345678])
def test_dropout_mask_is_philox(seed, dtype):
    for rows, columns, projection, p in [(0, 5, 0, 0.5), (3, 1, 2, 0.5), (7, 130, 1, 0.1), (33, 67, 0, 0.9)]:
        x = make(rows, columns, dtype, LAYOUTS[columns % 4])
        out = ops.dropout(x, torch.tensor(seed), projection, p)
        m, k = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
        words = np.stack(philox((k // 4, m, np.zeros_like(m), np.full_like(m, projection)), seed))
        bits = np.take_along_axis(words, (k % 4)[None], axis=0)[0]
        keep = torch.from_numpy(bits >= np.uint64(round(p * 2**32)))
        check(out, x.double() * keep / (1 - p), x * keep / (1 - p), f"p={p}")
        assert torch.equal(out != 0, keep & (x != 0))


def test_dropout_with_probability_zero_changes_no_bit():
    x = torch.randn(9, 21)
    assert torch.equal(ops.dropout(x, torch.tensor(3), 0, 0.0), x)


def big_calls(dtype):
    """Calls large enough to be split over threads."""
    x, A, h = make(700, 130, dtype), make(33, 130, dtype), make(700, 37, dtype)
    wide, B = make(700, 3 * 130, dtype), [make(130, 11, dtype) for _ in range(3)]
    dy, seed = list(wide.split(130, 1)), torch.tensor(5)

    def expand():
        y = wide.clone()
        return y, ops.expand_(y, h, [factor.t() for factor in B], [0, 11, 22], [0, 130, 260], [1.0] * 3, True)

    def wgrad():
        dh, dA, dB, Q = ops.wgrad(x, dy, h, B, [0, 11, 22], [2.0] * 3, 33, 4, True)
        return dh, dA, *dB, *Q

    return {
        "shrink": lambda: (ops.shrink(x, A),),
        "expand": expand,
        "wgrad": wgrad,
        "outer": lambda: (ops.outer(h, x),),
        "dropout": lambda: (ops.dropout(wide, seed, 1, 0.3),),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["shrink", "expand", "wgrad", "outer", "dropout"])
def test_threads_and_repeatability(name, dtype):
    call, results = big_calls(dtype)[name], {}
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results[threads] = call()
        for _ in range(3):
            assert all(map(torch.equal, call(), results[threads])), f"{threads} threads do not repeat"
    for threads in (2, 3):
        for one, other in zip(results[1], results[threads], strict=True):
            # Another order of about 700 fp32 additions.
            assert (one - other).abs().max() <= 64 * torch.finfo(torch.float32).eps * one.abs().max()


def x_and(**changes):
    arguments = {"x": torch.randn(4, 6), "A": torch.randn(3, 6), **changes}
    return arguments["x"], arguments["A"]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ops.shrink(*x_and(x=torch.randn(6))), "x has 1 dimensions"),
        (lambda: ops.shrink(*x_and(A=torch.randn(3, 5))), "A has 5 columns, but x has 6"),
        (lambda: ops.shrink(*x_and(A=torch.randn(3, 6).bfloat16())), "A has dtype BFloat16, but x has Float"),
        (lambda: ops.shrink(torch.ones(2, 2).double(), torch.ones(2, 2).double()), "x has dtype Double"),
        (lambda: ops.outer(torch.ones(3, 2), torch.ones(4, 2)), "d has 3 rows, but x has 4"),
        (lambda: ops.dropout(torch.ones(2, 2), torch.tensor(1), 0, 1.0), "p is 1"),
        (lambda: ops.dropout(torch.ones(2, 2), torch.ones(1), 0, 0.5), "seed has 1 dimensions"),
        (lambda: ops.dropout(torch.ones(2, 2), torch.tensor(1), -1, 0.5), "projection is -1"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


@pytest.mark.parametrize(
    "position, value, message",
    [
        (0, torch.ones(3, 4), "h has 5 rows, but y has 3"),
        (0, torch.ones(4, 5).t(), "y has column stride 5"),
        (2, [torch.ones(3, 4)], "offsets: columns 0 to 3 of h were asked for, but it has 2"),
        (2, [torch.ones(2, 5)], "columns: 0 to 5 of y were asked for, but it has 4"),
        (2, [torch.ones(2, 4).bfloat16()], "factors has dtype BFloat16, but y has Float"),
        (3, [-1], "offsets: columns -1"),
        (3, [0, 1], "offsets has 2 entries, but factors has 1"),
        (4, [1], "columns: 1 to 5"),
        (5, [], "scales has 0 entries"),
    ],
)
def test_expand_errors(position, value, message):
    arguments = [torch.ones(5, 4), torch.ones(5, 2), [torch.ones(2, 4)], [0], [0], [1.0], False]
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        ops.expand_(*arguments)


@pytest.mark.parametrize(
    "position, value, message",
    [
        (1, [torch.ones(4, 4)], "dy has 4 rows, but x has 5"),
        (1, [], "B has 1 entries, but dy has 0"),
        (2, torch.ones(5, 2), "h has 2 columns; rank \\+ probes is 3"),
        (3, [torch.ones(3, 2)], "B has 3 rows, but dy has 4"),
        (4, [1], "offsets: ranks 1 to 3 were asked for, but rank is 2"),
        (6, -1, "rank is -1"),
        (7, -1, "probes is -1"),
    ],
)
def test_wgrad_errors(position, value, message):
    arguments = [torch.ones(5, 3), [torch.ones(5, 4)], torch.ones(5, 3), [torch.ones(4, 2)], [0], [1.0], 2, 1, True]
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        ops.wgrad(*arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_schemas_and_fake_tensors(dtype):
    x, h, dy = make(6, 5, dtype), make(6, 4, dtype), [make(6, 7, dtype), make(6, 3, dtype)]
    B = [make(7, 1, dtype), make(3, 2, dtype)]
    calls = [
        (ops.shrink, (x, make(4, 5, dtype))),
        (ops.expand_, (make(6, 10, dtype), h, [b.t() for b in B], [0, 1], [0, 7], [1.0, 2.0], True)),
        (ops.expand_, (make(6, 10, dtype), h, [b.t() for b in B], [0, 1], [0, 7], [1.0, 2.0], False)),
        (ops.wgrad, (x, dy, h, B, [0, 1], [1.0, 2.0], 3, 1, True)),
        (ops.wgrad, (x, dy, h, B, [0, 1], [1.0, 2.0], 3, 1, False)),
        (ops.outer, (h, x)),
        (ops.dropout, (x, torch.tensor(4), 1, 0.5)),
    ]
    for operator, arguments in calls:
        torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.skipif("FASTLORA_CPU_ISA" in os.environ, reason="runs inside the subprocess of this very test")
@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_other_instruction_sets(isa):
    """The formulas once more, in a process that is held to an older instruction set."""
    order = ["portable", "avx2", "avx512"]
    if order.index(isa) >= order.index(native.isa()):
        pytest.skip(f"this processor's choice is {native.isa()}")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    chosen = "test_shrink or test_expand or test_moments or test_wgrad or test_outer or test_dropout or isa_is"
    environment = {**os.environ, "FASTLORA_CPU_ISA": isa}
    done = subprocess.run([*command, "-k", chosen], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.skipif("FASTLORA_CPU_ISA" not in os.environ, reason="needs FASTLORA_CPU_ISA")
def test_isa_is_the_requested_one():
    assert native.isa() == os.environ["FASTLORA_CPU_ISA"]
