import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlora.ops.penalty import importance_weights, weighted_penalty, weighted_penalty_grad

SHAPES = [(4, 16, 24), (1, 8, 8), (7, 12, 5), (0, 6, 9)]


def factors(shapes=SHAPES, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    As = [torch.randn(r, k, generator=generator, dtype=torch.float64).to(dtype) for r, k, _ in shapes]
    Bs = [torch.randn(n, r, generator=generator, dtype=torch.float64).to(dtype) for r, _, n in shapes]
    return As, Bs


SCALES = [2.0, 0.5, 1.0, 3.0]
WEIGHTS = torch.tensor([0.9, 0.5, 0.0, 0.7], dtype=torch.float64)


def delta_norm_sq(A, B, scale=1.0):
    return weighted_penalty([A], [B], [scale], [1.0])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 6), st.integers(1, 9), st.integers(1, 9), st.floats(-3, 3), st.integers(0, 1000))
def test_delta_norm_sq_is_the_norm_of_the_update(rank, columns, rows, scale, seed):
    (A,), (B,) = factors([(rank, columns, rows)], seed=seed)
    expected = torch.linalg.matrix_norm(scale * B @ A) ** 2
    torch.testing.assert_close(delta_norm_sq(A, B, scale), expected, rtol=1e-12, atol=1e-12)


def test_delta_norm_sq_by_hand():
    A, B = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [1.0]])
    # BA = [[3, 6], [1, 2]], squares sum to 50
    assert delta_norm_sq(A, B, 2.0).item() == 200.0
    assert delta_norm_sq(A, torch.zeros(2, 1)).item() == 0.0


def test_delta_norm_sq_gradients():
    (A,), (B,) = factors([(3, 5, 4)])
    A.requires_grad_(), B.requires_grad_()
    inputs = (A, B)
    assert torch.autograd.gradcheck(lambda a, b: delta_norm_sq(a, b, 1.5), inputs)
    assert torch.autograd.gradgradcheck(lambda a, b: delta_norm_sq(a, b, 1.5), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_factors_accumulate_in_fp32(dtype):
    (A,), (B,) = factors([(8, 512, 256)], dtype=dtype)
    A, B = A * 0.1, B * 0.1
    expected = delta_norm_sq(A.double(), B.double(), 2.0)
    result = delta_norm_sq(A, B, 2.0)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=0)


def test_autocast_does_not_lower_the_precision():
    As, Bs = factors([(8, 64, 32)], dtype=torch.float32)
    plain, plain_grads = weighted_penalty(As, Bs, [2.0], [1.0]), weighted_penalty_grad(As, Bs, [2.0], [1.0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, inside_grads = weighted_penalty(As, Bs, [2.0], [1.0]), weighted_penalty_grad(As, Bs, [2.0], [1.0])
    assert torch.equal(plain, inside)
    assert torch.equal(plain_grads[0][0], inside_grads[0][0]) and torch.equal(plain_grads[1][0], inside_grads[1][0])


def test_the_penalty_is_the_weighted_sum():
    As, Bs = factors()
    expected = sum(
        0.25 * weight * torch.linalg.matrix_norm(scale * B @ A) ** 2
        for A, B, scale, weight in zip(As, Bs, SCALES, WEIGHTS, strict=True)
    )
    torch.testing.assert_close(weighted_penalty(As, Bs, SCALES, WEIGHTS, weight=0.25), expected, rtol=1e-12, atol=0)
    listed = weighted_penalty(As, Bs, SCALES, WEIGHTS.tolist(), weight=0.25)
    torch.testing.assert_close(listed, expected, rtol=1e-12, atol=0)


# Two pairs of one shape go as one batch; their weights and scales differ.
BATCHED = ([*SHAPES, (4, 16, 24), (1, 8, 8)], [*SCALES, -1.5, 0.25], [*WEIGHTS.tolist(), 0.2, 1.0])


@pytest.mark.parametrize("form", ["delta", "decay"])
def test_gradient_by_hand_equals_autograd(form):
    shapes, scales, weights = BATCHED
    As, Bs = factors(shapes)
    for factor in As + Bs:
        factor.requires_grad_()
    weighted_penalty(As, Bs, scales, weights, weight=1e-2, form=form).backward()
    dAs, dBs = weighted_penalty_grad(As, Bs, scales, weights, weight=1e-2, form=form)
    for factor, by_hand in zip(As + Bs, dAs + dBs, strict=True):
        assert not by_hand.requires_grad
        torch.testing.assert_close(by_hand, factor.grad, rtol=1e-12, atol=1e-14)
    assert all(gradient.abs().max() > 0 for gradient in (dAs[0], dBs[0], dAs[1], dBs[1], dAs[4], dBs[5]))
    assert not dAs[2].any() and not dBs[2].any()


@pytest.mark.parametrize("weights", ["vector", "tensors", "floats"])
def test_the_gradient_of_each_matrix_is_the_formula(weights):
    shapes, scales, values = BATCHED
    As, Bs = factors(shapes)
    vector = torch.tensor(values, dtype=torch.float64)
    given = {"vector": vector, "tensors": list(vector.unbind()), "floats": values}[weights]
    dAs, dBs = weighted_penalty_grad(As, Bs, scales, given, weight=0.1)
    for A, B, s, w, dA, dB in zip(As, Bs, scales, values, dAs, dBs, strict=True):
        torch.testing.assert_close(dA, 2 * 0.1 * w * s * s * B.T @ B @ A, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(dB, 2 * 0.1 * w * s * s * B @ A @ A.T, rtol=1e-12, atol=1e-14)


def test_decay_is_weight_decay_of_the_factors():
    """SGD without momentum: the decay form moves A and B as ``weight_decay = lambda w`` does."""
    shapes, scales, weights = BATCHED
    As, Bs = factors(shapes)
    ours, theirs = ([f.clone().requires_grad_() for f in As + Bs] for _ in range(2))
    dAs, dBs = weighted_penalty_grad(ours[: len(As)], ours[len(As) :], scales, weights, weight=0.3, form="decay")
    for factor, gradient in zip(ours, dAs + dBs, strict=True):
        factor.grad = gradient
    for factor in theirs:
        factor.grad = torch.zeros_like(factor)
    torch.optim.SGD(ours, lr=0.1).step()
    groups = [{"params": [f], "weight_decay": 0.3 * w} for f, w in zip(theirs, weights * 2, strict=True)]
    torch.optim.SGD(groups, lr=0.1).step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14)


def test_low_precision_gradients_are_rounded_once():
    As, Bs = factors([(8, 96, 64)], dtype=torch.bfloat16)
    dAs, dBs = weighted_penalty_grad(As, Bs, [0.5], [0.8])
    wide_dAs, wide_dBs = weighted_penalty_grad([As[0].double()], [Bs[0].double()], [0.5], [0.8])
    assert dAs[0].dtype == dBs[0].dtype == torch.bfloat16
    for narrow, wide in ((dAs[0], wide_dAs[0]), (dBs[0], wide_dBs[0])):
        torch.testing.assert_close(narrow.double(), wide, rtol=2**-8, atol=1e-4 * wide.abs().max().item())


def test_mixed_dtypes_of_a_pair():
    As, Bs = factors([(3, 6, 5)])
    dAs, dBs = weighted_penalty_grad(As, [Bs[0].float()], [1.0], [1.0])
    assert dAs[0].dtype == torch.float64 and dBs[0].dtype == torch.float32
    expected = weighted_penalty_grad(As, [Bs[0].float().double()], [1.0], [1.0])
    torch.testing.assert_close(dAs[0], expected[0][0])


def test_importance_weights():
    importance = torch.tensor([1.0, 3.0, 4.0])
    assert importance_weights(importance).tolist() == [0.875, 0.625, 0.5]
    assert importance_weights(importance, "relative").tolist() == [0.75, 0.25, 0.0]
    assert importance_weights(importance.double()).dtype == torch.float64
    assert importance_weights(importance.bfloat16()).dtype == torch.float32
    assert importance_weights(importance.requires_grad_()).requires_grad is False


def test_the_uniform_control_has_the_mean_of_the_weights():
    importance = torch.tensor([1.0, 3.0, 4.0, 0.0], dtype=torch.float64)
    assert importance_weights(importance, "uniform").tolist() == [0.75] * 4
    assert importance_weights(importance).mean().item() == 0.75
    assert importance_weights(torch.zeros(4), "uniform").tolist() == [0.75] * 4


@pytest.mark.parametrize("normalize", ["sum", "relative"])
def test_importance_weights_at_the_edges(normalize):
    assert importance_weights(torch.zeros(3), normalize).tolist() == [1.0, 1.0, 1.0]
    assert importance_weights(torch.tensor([2.0]), normalize).tolist() == [0.0]
    huge = torch.tensor([1e308, 1e308], dtype=torch.float64)
    assert importance_weights(huge, normalize).tolist() == ([0.5, 0.5] if normalize == "sum" else [0.0, 0.0])


@pytest.mark.parametrize(
    ("importance", "error", "message"),
    [
        (torch.tensor([1.0, math.nan]), ValueError, "importance: expected finite numbers >= 0"),
        (torch.tensor([1.0, math.inf]), ValueError, "importance: expected finite numbers >= 0"),
        (torch.tensor([1.0, -1.0]), ValueError, "importance: expected finite numbers >= 0"),
        (torch.ones(2, 2), ValueError, r"importance: expected a floating vector .*, got torch.float32 \(2, 2\)"),
        (torch.ones(0), ValueError, "importance: expected a floating vector of at least one"),
        (torch.ones(2, dtype=torch.int64), ValueError, "importance: expected a floating vector .*, got torch.int64"),
        ([1.0], TypeError, "importance: expected a floating vector .*, got .1.0."),
    ],
)
def test_bad_importance(importance, error, message):
    with pytest.raises(error, match=message):
        importance_weights(importance)


def test_bad_normalise():
    with pytest.raises(ValueError, match="normalize: expected one of .'sum', 'relative', 'uniform'., got 'max'"):
        importance_weights(torch.ones(2), "max")


A, B = torch.ones(2, 3), torch.ones(4, 2)


@pytest.mark.parametrize("function", [weighted_penalty, weighted_penalty_grad])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([], [], [], []), ValueError, "As: expected one entry a matrix, .*, got As 0"),
        (([A], [B], [1.0], [1.0, 2.0]), ValueError, "As 1, Bs 1, scales 1, weights 2"),
        (([A], [B.T], [1.0], [1.0]), ValueError, r"got \(2, 3\) and \(2, 4\)"),
        (([A[0]], [B], [1.0], [1.0]), ValueError, r"\[r, K\]"),
        (([A.int()], [B], [1.0], [1.0]), ValueError, "As: expected floating tensors, got torch.int32"),
        (([None], [B], [1.0], [1.0]), TypeError, "As: expected floating tensors, got None"),
        (([A], [B], [math.nan], [1.0]), ValueError, "scales: expected a finite number"),
        (([A], [B], ["1"], [1.0]), TypeError, "scales: expected a finite number"),
        (([A], [B], [1.0], [math.inf]), ValueError, "weights: expected a finite number"),
        (([A], [B], [1.0], torch.ones(1, 1)), ValueError, "weights: expected a vector"),
        (([A], [B], [1.0], [1.0], math.nan), ValueError, "weight: expected a finite number"),
        (([A], [B], [1.0], [1.0], 1.0, "sum"), ValueError, "form: expected one of .'delta', 'decay'., got 'sum'"),
    ],
)
def test_bad_lists(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(*arguments)
