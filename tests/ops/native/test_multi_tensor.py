"""Operators that take the small matrices of all layers at once, against their formulas in float64."""

from __future__ import annotations

import os

import pytest
import torch

from fastlora.ops import multi_tensor, native
from fastlora.ops.node import NODE, REASON
from fastlora.ops.penalty import weighted_penalty, weighted_penalty_grad

pytestmark = pytest.mark.skipif(
    os.environ.get("FASTLORA_BUILD") == "0", reason="FASTLORA_BUILD=0: the native library is left out on purpose"
)

ops = torch.ops.fastlora
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (8, 33, 50),
    (1, 1, 1),
    (3, 5, 64),
    (17, 40, 9),
    (0, 6, 7),
    (16, 300, 130),
    (5, 0, 3),
    (2, 4, 0),
    (33, 70, 65),
]


@pytest.fixture(autouse=True)
def _seed_and_threads():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def matrix(rows: int, columns: int, dtype: torch.dtype, layout: str) -> torch.Tensor:
    if layout == "slice":
        return torch.randn(rows, columns + 3).to(dtype)[:, 2 : 2 + columns]
    if layout == "transposed":
        return torch.randn(columns, rows).to(dtype).t()
    return torch.randn(rows, columns).to(dtype)


def factors(dtype, layout="contiguous", shapes=SHAPES):
    A = [matrix(r, depth, dtype, layout) for r, _, depth in shapes]
    B = [matrix(width, r, dtype, layout) for r, width, _ in shapes]
    scales = [0.25 + 0.5 * i for i in range(len(shapes))]
    return A, B, scales, torch.rand(len(shapes))


def wide(tensors):
    return [tensor.double() for tensor in tensors]


def plain(A, B, scales, weights, weight=1.0):
    """The formulas in the precision that the operator works in: their error is what is allowed."""
    value, dA, dB = 0.0, [], []
    for a, b, s, w in zip(A, B, scales, weights.tolist(), strict=True):
        a, b = a.float(), b.float()
        left, right = a @ a.T, b.T @ b
        value += w * s * s * float((left.double() * right.double()).sum())
        dA.append(2 * weight * w * s * s * (right @ a))
        dB.append(2 * weight * w * s * s * (b @ left))
    return value, dA, dB


def near(actual, exact, other, terms, what):
    """Within three times the plain formula's error, or a few roundings of sums of ``terms`` products."""
    if exact.numel() == 0:
        return
    eps = torch.finfo(torch.float32).eps
    allowed = 3 * (other.double() - exact).abs().max() + (4 + terms**0.5) * eps * exact.abs().max()
    error = (actual.double() - exact).abs().max()
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("layout", ["contiguous", "slice", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_penalty(dtype, layout):
    A, B, scales, weights = factors(dtype, layout)
    value = ops.penalty(A, B, scales, weights)
    assert value.dtype == torch.float32 and value.shape == ()
    exact = weighted_penalty(wide(A), wide(B), scales, weights.double())
    near(value, exact, torch.tensor(plain(A, B, scales, weights)[0]), 300, "penalty")
    same = ops.penalty(A, B, scales, weights.double())
    assert same == value
    ops.penalty(A, B, scales, weights.repeat_interleave(2)[::2])


def test_each_term_of_the_penalty_by_its_definition():
    A, B, scales, _ = factors(torch.float32)
    for i in range(len(A)):
        weights = torch.zeros(len(A), dtype=torch.float64)
        weights[i] = 0.5
        delta = scales[i] * B[i].double() @ A[i].double()
        value = ops.penalty(A, B, scales, weights)
        torch.testing.assert_close(value.double(), 0.5 * delta.square().sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "slice", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_penalty_gradient_is_added(dtype, layout):
    A, B, scales, weights = factors(dtype, layout)
    exact = weighted_penalty_grad(wide(A), wide(B), scales, weights.double(), 0.3)
    other = plain(A, B, scales, weights, 0.3)[1:]
    gradients = [[torch.randn(t.shape) for t in side] for side in (A, B)]
    before = [[t.double() for t in side] for side in gradients]
    kept = [t.clone() for t in A + B]
    assert ops.penalty_grad_(*gradients, A, B, scales, weights, 0.3) is None
    for side in range(2):
        for i, shape in enumerate(SHAPES):
            result = before[side][i] + exact[side][i]
            reference = before[side][i] + other[side][i].double()
            near(gradients[side][i], result, reference, max(shape), f"{'dA dB'.split()[side]}[{i}]")
    assert all(torch.equal(t, k) for t, k in zip(A + B, kept, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_penalty_gradient_in_low_precision_buffers(dtype):
    shapes = [(4, 30, 20), (1, 9, 33)]
    A, B, scales, weights = factors(dtype, shapes=shapes)
    dA, dB = [torch.ones_like(a) for a in A], [torch.ones_like(b) for b in B]
    exact = weighted_penalty_grad(wide(A), wide(B), scales, weights.double(), 1e-2)
    ops.penalty_grad_(dA, dB, A, B, scales, weights, 1e-2)
    for result, expected in zip(dA + dB, [*exact[0], *exact[1]], strict=True):
        rounding = torch.finfo(dtype).eps * (1 + expected).abs()
        assert ((result.double() - (1 + expected)).abs() <= rounding).all()


def test_penalty_gradient_equals_autograd_of_the_penalty():
    A, B, scales, weights = factors(torch.float32, shapes=[(3, 10, 7), (2, 4, 6)])
    As, Bs = ([t.double().requires_grad_() for t in side] for side in (A, B))
    (0.7 * weighted_penalty(As, Bs, scales, weights.double())).backward()
    dA, dB = [torch.zeros_like(a) for a in A], [torch.zeros_like(b) for b in B]
    ops.penalty_grad_(dA, dB, A, B, scales, weights, 0.7)
    for result, leaf in zip(dA + dB, As + Bs, strict=True):
        torch.testing.assert_close(result.double(), leaf.grad, rtol=1e-5, atol=1e-5)


def test_an_empty_gradient_is_left_out():
    A, B, scales, weights = factors(torch.float32, shapes=[(3, 10, 7), (2, 4, 6)])
    full = [torch.zeros_like(t) for t in A], [torch.zeros_like(t) for t in B]
    ops.penalty_grad_(*full, A, B, scales, weights, 1.0)
    dA, dB = [torch.empty(0), torch.zeros_like(A[1])], [torch.zeros_like(B[0]), torch.empty(0)]
    ops.penalty_grad_(dA, dB, A, B, scales, weights, 1.0)
    assert torch.equal(dA[1], full[0][1]) and torch.equal(dB[0], full[1][0])


@pytest.mark.parametrize("threads", [2, 3])
def test_results_do_not_depend_on_the_threads(threads):
    shapes = [(8, 400 + i, 500 - i) for i in range(40)]
    A, B, scales, weights = factors(torch.float32, shapes=shapes)
    results = []
    for count in (1, threads, threads):
        torch.set_num_threads(count)
        dA, dB = [torch.zeros_like(a) for a in A], [torch.zeros_like(b) for b in B]
        ops.penalty_grad_(dA, dB, A, B, scales, weights, 0.1)
        results.append([ops.penalty(A, B, scales, weights), ops.squared_norms(A + B), *dA, *dB])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_no_matrices():
    assert ops.penalty([], [], [], torch.zeros(0)) == 0
    ops.penalty_grad_([], [], [], [], [], torch.zeros(0), 1.0)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_squared_norms(dtype):
    tensors = [matrix(r, c, dtype, layout) for layout in ("contiguous", "transposed") for r, c, _ in SHAPES]
    tensors += [torch.randn(()).to(dtype), torch.randn(3, 4, 5).to(dtype), torch.randn(100_003).to(dtype)]
    result = ops.squared_norms(tensors)
    assert result.dtype == torch.float64
    exact = torch.stack([t.double().square().sum() for t in tensors])
    # fp32 lanes take 32 squares each before they go to float64.
    eps = torch.finfo(torch.float32 if dtype != torch.float64 else torch.float64).eps
    torch.testing.assert_close(result, exact, rtol=32 * eps if dtype != torch.float64 else 1e-13, atol=0)


def test_squared_norms_keep_what_is_not_finite():
    result = ops.squared_norms([torch.tensor([1.0, float("inf")]), torch.tensor([float("nan")]), torch.tensor([2.0])])
    assert result[0] == float("inf") and result[1].isnan() and result[2] == 4


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_resized_ranks(dtype):
    old, new = [3, 8, 1, 5, 0, 4], [5, 2, 1, 0, 3, 4]
    A = [torch.randn(r, 7).to(dtype) for r in old]
    B = [matrix(9, r, dtype, "transposed") for r in old]
    flat = torch.full((sum(new) * 7 + 1,), 9.0, dtype=dtype)
    packed = [part.view(r, 7) for part, r in zip(flat[:-1].split([7 * r for r in new]), new, strict=True)]
    to_B = [torch.full((9, r + 2), 9.0, dtype=dtype)[:, 1 : r + 1] for r in new]
    ops.resize_ranks_(packed + to_B, A + B)
    for a, b, to_a, to_b, r, r_new in zip(A, B, packed, to_B, old, new, strict=True):
        kept = min(r, r_new)
        assert torch.equal(to_a[:kept], a[:kept]) and not to_a[kept:].any()
        assert torch.equal(to_b[:, :kept], b[:, :kept]) and not to_b[:, kept:].any()
        assert (to_b._base[:, 0] == 9).all() and (to_b._base[:, -1] == 9).all()
    assert flat[-1] == 9


BAD = [
    ("penalty", lambda A, B: (A, B[:1], [1.0, 1.0], torch.ones(2)), "B has 1 entries, but A has 2"),
    ("penalty", lambda A, B: (A, B, [1.0], torch.ones(2)), "scales has 1 entries"),
    ("penalty", lambda A, B: (A, B, [1.0, 1.0], torch.ones(3)), "weights has 3 entries, but A has 2"),
    ("penalty", lambda A, B: (A, B, [1.0, 1.0], torch.ones(2).long()), "weights has 1 dimensions and dtype"),
    ("penalty", lambda A, B: (A, B[::-1], [1.0, 1.0], torch.ones(2)), r"B\[0\] has 2 columns, but A\[0\] has 3 rows"),
    ("penalty", lambda A, B: (wide(A), wide(B), [1.0, 1.0], torch.ones(2)), "A has dtype"),
    ("squared_norms", lambda A, B: ([A[0], A[0].long()],), "tensors has dtype"),
    ("resize_ranks_", lambda A, B: (A, A[:1]), "source has 1 entries, but to has 2"),
    ("resize_ranks_", lambda A, B: (A, A[::-1]), r"to\[0\] is 3 x 7, but source\[0\] is 2 x 6; only the rank may"),
    ("resize_ranks_", lambda A, B: ([A[0].t()], [A[0].t()]), r"to\[0\] has column stride 7"),
    ("resize_ranks_", lambda A, B: ([A[0]], [A[0].double()]), "source has dtype"),
]


@pytest.mark.parametrize("name, arguments, message", BAD, ids=[f"{b[0]}-{i}" for i, b in enumerate(BAD)])
def test_bad_arguments_are_named(name, arguments, message):
    A, B, _, _ = factors(torch.float32, shapes=[(3, 10, 7), (2, 4, 6)])
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, name)(*arguments(A, B))


@pytest.mark.parametrize("wrong", ["length", "shape", "dtype", "stride"])
def test_bad_gradients_are_named_and_nothing_is_added(wrong):
    A, B, scales, weights = factors(torch.float32, shapes=[(3, 10, 7), (2, 4, 6)])
    dA, dB = [torch.zeros_like(a) for a in A], [torch.zeros_like(b) for b in B]
    dB[1] = {
        "shape": torch.zeros(4, 3),
        "dtype": torch.zeros(4, 2).double(),
        "stride": torch.zeros(2, 4).t(),
        "length": dB[1],
    }[wrong]
    with pytest.raises(RuntimeError, match="dB"):
        ops.penalty_grad_(dA, dB[:1] if wrong == "length" else dB, A, B, scales, weights, 1.0)
    assert not any(t.any() for t in dA + dB)


def test_fake_tensors_have_the_shapes():
    A, B, scales, weights = factors(torch.float32, shapes=[(3, 10, 7), (2, 4, 6)])
    zeros = [torch.zeros_like(t) for t in A], [torch.zeros_like(t) for t in B]
    torch.library.opcheck(ops.penalty.default, (A, B, scales, weights))
    torch.library.opcheck(ops.penalty_grad_.default, (*zeros, A, B, scales, weights, 0.1))
    torch.library.opcheck(ops.squared_norms.default, (A + B,))
    torch.library.opcheck(ops.output_variances.default, ([torch.rand(2, 4).double()], [2], [1, 2]))
    torch.library.opcheck(ops.resize_ranks_.default, (zeros[0], A))


def test_operators_are_registered():
    assert native.available(), native.reason()
    for name in ("penalty", "penalty_grad_", "squared_norms", "output_variances", "resize_ranks_"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastlora::{name}", "CPU"), name


def test_output_variances():
    sizes = [[5], [], [3, 0, 40], [1]]
    y = [torch.randn(33, sum(runs), dtype=torch.float64) + 3.0 for runs in sizes]
    rows = torch.full((2, 1), 33.0, dtype=torch.float64)
    sums = [torch.cat([torch.stack([t.sum(0), t.square().sum(0)]), rows], dim=1) for t in y]
    sums[0] = sums[0].t().contiguous().t()
    found = ops.output_variances(sums, [len(runs) for runs in sizes], [n for runs in sizes for n in runs])
    parts = [part for t, runs in zip(y, sizes, strict=True) for part in t.split(runs, dim=1)]
    exact = torch.stack([(part - part.mean(0)).square().mean(0).sum() for part in parts])
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


def test_output_variances_are_never_negative_and_keep_what_is_not_finite():
    constant = torch.tensor([[3.0, 0.3, 3.0], [3.0, 0.03 - 1e-9, 3.0]], dtype=torch.float64)
    assert ops.output_variances([constant], [1], [2]).item() == 0.0
    for odd in (float("nan"), float("inf")):
        given = constant.clone()
        given[1, 0] = odd
        assert not ops.output_variances([given], [1], [2]).isfinite().all()
    assert ops.output_variances([torch.zeros(2, 3, dtype=torch.float64)], [1], [2]).isnan().all()  # no rows


def test_output_variances_name_bad_arguments():
    good = torch.zeros(2, 4, dtype=torch.float64)
    for arguments, message in (
        (([good], [1, 1], [3]), "runs has 2 entries"),
        (([good], [2], [3]), "runs: more than the 1 sizes"),
        (([good], [1], [3, 1]), "sizes has 2 entries"),
        (([good], [1], [4]), r"moments\[0\] is 2 x 4; its sizes make 2 x 5"),
        (([good.float()], [1], [3]), "moments has dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.output_variances(*arguments)


needs_node = pytest.mark.skipif(NODE is None, reason=REASON or "")


def sample_of(matrices=3, squares_first=True):
    """Leaves with gradients, of layers of one matrix with one to ``matrices`` columns, and averages for them."""
    means, steps = (torch.rand(2, matrices, dtype=torch.float64) for _ in range(2))
    sizes = [*range(1, matrices + 1)]
    Z = [torch.zeros(n, 3, dtype=torch.float64 if n == 2 else torch.float32, requires_grad=True) for n in sizes]
    V = [torch.zeros(2, n + 1, dtype=torch.float64, requires_grad=True) for n in sizes]
    for leaf in (*Z, *V):
        leaf.grad = torch.rand_like(leaf) + 1
    averages = means, steps.mul_(10).floor_(), torch.tensor(4)
    return averages, [*Z, *V], len(Z), [1] * matrices, sizes, squares_first


@needs_node
@pytest.mark.parametrize("odd", [None, "Q", "V"])
@pytest.mark.parametrize("squares_first", [True, False])
@pytest.mark.parametrize("weight", [None, 0.3])
@pytest.mark.parametrize("kinds", ["Q", "V", "QV"])
def test_a_sample_is_folded_in(kinds, weight, squares_first, odd):
    averages, leaves, matrices, runs, sizes, _ = sample_of(squares_first=squares_first)
    Q, V = [leaf.grad for leaf in leaves[:matrices]], [leaf.grad for leaf in leaves[matrices:]]
    if odd is not None:
        {"Q": Q, "V": V}[odd][2][1, 0] = torch.nan if odd == "Q" else torch.inf
    f = {"Q": torch.stack([0.25 * q.double().square().sum() for q in Q]), "V": torch.zeros(matrices).double()}
    for i, (v, size) in enumerate(zip(V, sizes, strict=True)):
        square = v[1, :size] / v[0, size]
        f["V"][i] = (square - (v[0, :size] / v[0, size]).square()).clamp(min=0).sum()
    order = [kind for kind in ("QV" if squares_first else "VQ") if kind in kinds]
    means, steps = (average[: len(order)].clone() for average in averages[:2])
    skipped, value = averages[2], torch.stack([f[kind] for kind in order])
    mean, step = means.clone(), steps.clone()
    if value.isfinite().all():
        step += 2
        mean += (value - mean) * (2 / step.clamp(min=1) if weight is None else weight)
    mine = leaves[:matrices] if kinds == "Q" else leaves[matrices:] if kinds == "V" else leaves
    of_V = (runs, sizes) if "V" in kinds else ([], [])
    leaves_of_Q = matrices if "Q" in kinds else 0
    native = multi_tensor.averages_of_leaves((means, steps, skipped), mine, leaves_of_Q, *of_V, squares_first)
    assert native.fold(0.25, weight, 2) and all(leaf.grad is None for leaf in mine)
    # The squares of a float32 Q are added up in float32, block by block.
    torch.testing.assert_close(means, mean, rtol=1e-6 if "Q" in kinds else 1e-12, atol=0)
    assert torch.equal(steps, step) and skipped.item() == 4 + (odd is not None and odd in kinds)


@needs_node
@pytest.mark.parametrize("what", ["none", "strides", "sparse"])
def test_a_leaf_without_plain_gradient_leaves_all_as_it_was(what):
    averages, leaves, *rest = sample_of()
    last = leaves[-1]
    last.grad = {
        "none": lambda: None,
        "strides": lambda: torch.rand(last.shape[::-1]).double().t(),
        "sparse": lambda: torch.rand_like(last).to_sparse(),
    }[what]()
    before, grads = [t.clone() for t in averages], [leaf.grad for leaf in leaves]
    assert multi_tensor.averages_of_leaves(averages, leaves, *rest).fold(0.25, 0.1, 1) is False
    assert all(map(torch.equal, averages, before))
    assert all(leaf.grad is grad for leaf, grad in zip(leaves, grads, strict=True))


@needs_node
def test_averages_of_leaves_fit_their_runs():
    averages, leaves, matrices, runs, sizes, first = sample_of()
    assert multi_tensor.averages_of_leaves(averages, [], 0, [], [], first) is None
    meta = [torch.zeros(2, 3, device="meta", requires_grad=True)]
    assert multi_tensor.averages_of_leaves(averages, meta, 1, [], [], first) is None
    for wrong in (
        (2, runs, sizes),
        (matrices, runs, sizes[:2]),
        (matrices, runs, [1, 2, 4]),
        (matrices, runs[:2], sizes),
    ):
        with pytest.raises(ValueError, match="expected leaves as runs and sizes say"):
            multi_tensor.averages_of_leaves(averages, leaves, *wrong, first)
    means, steps, skipped = averages
    for other in (means[:, :2], means[:1], torch.rand(2, 4, dtype=torch.float64)):  # of which not all can be written
        with pytest.raises(ValueError, match="expected leaves as runs and sizes say"):
            multi_tensor.averages_of_leaves((other, other.clone(), skipped), leaves, matrices, runs, sizes, first)
