"""The operator against the float64 formula: forward, every gradient, every statistic."""

from __future__ import annotations

import pytest
import torch
from op_help import BACKENDS, assert_close_as, make, oracle, run

from fastlora.ops import reference
from fastlora.ops.lora import lora_linear

CASES = {
    "group": {},
    "one": {"N": (7,), "r": (3,)},
    "rank 1": {"N": (7,), "r": (1,)},
    "rank 0": {"N": (7,), "r": (0,)},
    "fused": {"fused": True},
    "fused uneven": {"fused": True, "N": (16, 4, 4), "r": (1, 2, 9)},
    "wide": {"M": 65, "K": 130, "N": (64, 33, 17), "r": (8, 16, 17)},
    "one row": {"M": 1},
    "no rows": {"M": 0},
    "odd": {"M": 3, "K": 5, "N": (1, 3), "r": (1, 1)},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_forward_and_gradients(name, dtype, backend, p):
    case = make(dtype=dtype, k=3, **CASES[name])
    y, grads = run(case, backend, p)
    want_y, want = oracle(case, p=p)
    low_y, low = run(case, function=reference.lora_linear, p=p)
    assert_close_as(y, want_y, low_y)
    assert_close_as(grads, want, low)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_float64_is_exact(p):
    case = make(dtype=torch.float64, k=2)
    y, grads = run(case, p=p)
    want_y, want = oracle(case, p=p)
    for a, e in zip([*y, *grads], [*want_y, *want], strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_float16(backend, p):
    case = make(dtype=torch.float16, k=2)
    y, grads = run(case, backend, p)
    want = sum(oracle(case, p=p), [])
    assert_close_as([*y, *grads], want, sum(run(case, function=reference.lora_linear, p=p), []))


def test_float64_goes_through_the_reference():
    case = make(dtype=torch.float64)
    with pytest.raises(RuntimeError, match="'native' was asked for and cannot run: .*"):
        run(case, "native")
    assert run(case, "auto")[0][0].dtype == torch.float64


@pytest.mark.parametrize("backend", BACKENDS)
def test_probe_leaf_collects_projected_weight_gradient(backend):
    case = make(k=4)
    _, grads = run(case, backend)
    Q = grads[1 + 3 + 3 :]
    for q, dy in zip(Q, case["dy"], strict=True):
        G = dy.double().T @ case["x"].double()
        torch.testing.assert_close(q.double(), G @ case["P"].double().T, rtol=1e-5, atol=1e-5)


def test_probes_do_not_change_outputs_or_gradients():
    case = make(k=4)
    with_probes, without = run(case), run(case, probes=False)
    assert all(torch.equal(a, b) for a, b in zip(with_probes[0], without[0], strict=True))
    for a, b in zip(with_probes[1], without[1], strict=False):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_probes_see_the_undropped_input():
    case = make(k=4, M=200)
    _, grads = run(case, p=0.5)
    G = case["dy"][0].double().T @ case["x"].double()
    torch.testing.assert_close(grads[7].double(), G @ case["P"].double().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fused", [True, False])
def test_moment_leaf_collects_column_sums(backend, fused):
    case = make(M=41, fused=fused)
    case["bias"] = [None if b is None else b + 300.0 for b in case["bias"]]  # mean far from zero: E y² - (E y)² cancels
    y, grads = run(case, backend, moments=True)
    for out, sums in zip(y, grads[7:], strict=True):
        assert float(sums[0, -1]) == 41
        mean, square = sums[:, :-1] / 41
        expected = out.double().var(dim=0, unbiased=False)
        torch.testing.assert_close(square - mean.square(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sample_signs_give_per_sample_projections(backend):
    case = make(M=12, k=3, S=4)
    _, grads = run(case, backend)
    x, sign = case["x"].double().view(4, 3, -1), case["sign"].double()
    for q, dy in zip(grads[7:], case["dy"], strict=True):
        per_sample = torch.einsum("stn,stk->snk", dy.double().view(4, 3, -1), x)
        expected = torch.einsum("snk,pk,sp->np", per_sample, case["P"].double(), sign)
        torch.testing.assert_close(q.double(), expected, rtol=1e-5, atol=1e-5)


def test_gradient_of_one_output_only():
    case = make(k=2)
    x, A, B = (
        case["x"].requires_grad_(),
        [a.requires_grad_() for a in case["A"]],
        [b.requires_grad_() for b in case["B"]],
    )
    y = lora_linear(x, case["W"], case["bias"], A, B, case["scale"])
    dx, da0, da2, db2 = torch.autograd.grad(y[2], [x, A[0], A[2], B[2]], case["dy"][2], allow_unused=True)
    want = run(case, function=reference.lora_linear, dtype=torch.float64, probes=False)
    only = [torch.zeros_like(case["dy"][0]), torch.zeros_like(case["dy"][1]), case["dy"][2]]
    _, want = oracle({**case, "dy": only}, probes=False)
    for got, expected in ((dx, want[0]), (da0, want[1]), (da2, want[3]), (db2, want[6])):
        torch.testing.assert_close(
            torch.zeros_like(expected) if got is None else got.double(), expected, rtol=1e-5, atol=1e-5
        )


def test_trainable_weight_and_bias_get_their_gradient():
    case = make(fused=True)
    W, bias = case["W"][0].requires_grad_(), case["bias"][0].requires_grad_()
    y = lora_linear(case["x"], [W], [bias], case["A"], case["B"], case["scale"])[0]
    dW, db = torch.autograd.grad(y, [W, bias], case["dy"][0])
    torch.testing.assert_close(dW, case["dy"][0].T @ case["x"])
    torch.testing.assert_close(db, case["dy"][0].sum(0))


def test_saved_for_backward_is_x_and_h_only():
    case = make(k=4)
    x = case["x"].requires_grad_()
    parameters = {
        t.data_ptr() for t in (*case["W"], *[b for b in case["bias"] if b is not None], *case["A"], *case["B"])
    }
    B = [b.requires_grad_() for b in case["B"]]
    sizes = []

    def pack(tensor):
        if tensor.numel() and tensor.data_ptr() not in parameters:
            sizes.append(tuple(tensor.shape))
        return tensor

    Z = [torch.zeros(b.shape[0], 4, requires_grad=True) for b in B]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        lora_linear(x, case["W"], case["bias"], case["A"], B, case["scale"], Z=Z, P=case["P"])
    assert sizes == [(13, 20), (13, 3 + 0 + 5 + 4)]


def test_dropout_mask_is_a_function_of_seed_projection_row_and_column():
    x, seed = torch.ones(9, 11, dtype=torch.float64), torch.tensor(2**61 + 12345)
    whole = reference.dropout(x, seed, 1, 0.25)
    assert set(whole.unique().tolist()) == {0.0, 1 / 0.75}
    assert torch.equal(reference.dropout(x[:4], seed, 1, 0.25), whole[:4])
    assert torch.equal(reference.dropout(x[:, :6], seed, 1, 0.25), whole[:, :6])
    assert not torch.equal(reference.dropout(x, seed, 0, 0.25), whole)
    kept = (reference.dropout(torch.ones(400, 250), seed, 0, 0.25) != 0).double().mean()
    assert abs(float(kept) - 0.75) < 5 * (0.75 * 0.25 / 100_000) ** 0.5


def test_philox_known_answers():
    """The vectors of Random123's kat_vectors for philox4x32, 10 rounds."""
    ff, zero = 0xFFFFFFFF, 0
    vectors = [
        ((zero,) * 4, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ff,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0_A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, seed, expected in vectors:
        words = reference.philox(torch.tensor(seed), *(torch.tensor(c) for c in counter))
        assert tuple(int(w) for w in words) == expected


def test_unknown_backend_and_bad_input_are_named():
    case = make()
    args = (case["W"], case["bias"], case["A"], case["B"], case["scale"])
    with pytest.raises(ValueError, match="backend: expected one of .*, got 'cuda-magic'"):
        lora_linear(case["x"], *args, backend="cuda-magic")
    with pytest.raises(ValueError, match="x: expected last dimension 20"):
        lora_linear(case["x"][:, :19], *args)
    with pytest.raises(ValueError, match="x: has dtype torch.float64"):
        lora_linear(case["x"].double(), *args)
    with pytest.raises(ValueError, match="x: is on meta"):
        lora_linear(case["x"].to("meta"), *args)
