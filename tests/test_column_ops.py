"""Columns of x as the operator's probes: what each backend makes of them, against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from op_help import BACKENDS, assert_close_as, make, oracle, run

from fastlora.ops import native, reference
from fastlora.ops.lora import lora_linear


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_outputs_and_gradients(backend, dtype, fused, p):
    for shape in (dict(), dict(M=1, r=(0, 0, 0)), dict(M=70, K=37, N=(5, 33, 17), r=(1, 8, 3)), dict(N=(9,), r=(2,))):
        case = make(k=3, picks=True, dtype=dtype, fused=fused, **shape)
        y, grads = run(case, backend, p, moments=True)
        want_y, want = oracle(case, p=p)
        low_y, low = run(case, p=p, function=reference.lora_linear)
        assert_close_as(y, want_y, low_y)
        assert_close_as(grads[: len(want)], want, low)


@pytest.mark.parametrize("backend", BACKENDS)
def test_signs_and_a_projection_without_gradient(backend):
    case = make(k=2, S=13, picks=True)
    _, grads = run(case, backend)
    per_sample = [torch.einsum("mn,mk->mnk", dy.double(), case["x"].double()) for dy in case["dy"]]
    for found, each, index in zip(grads[7:], per_sample, case["P"], strict=True):
        wanted = torch.einsum("snk,sk->nk", each[:, :, index], case["sign"].double())
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    del case["sign"]
    for p in (0.0, 0.4):
        Z = [torch.zeros(b.shape[0], 2, requires_grad=True) for b in case["B"]]
        operands = (case[name] for name in ("x", "W", "bias", "A", "B", "scale"))
        y = lora_linear(*operands, Z=Z, P=case["P"], p=p, backend=backend)
        torch.autograd.backward([y[0], y[2]], [case["dy"][0], case["dy"][2]])
        for i in (0, 2):
            wanted = reference.column_gradients(case["x"].double(), case["dy"][i].double(), case["P"][i])
            torch.testing.assert_close(Z[i].grad.double(), wanted, rtol=1e-5, atol=1e-5)
        assert not Z[1].grad.any()


def test_gradgradcheck():
    case = make(M=4, K=5, N=(3, 2), r=(2, 1), dtype=torch.float64, k=2, picks=True)
    A, B = [a.requires_grad_() for a in case["A"]], [b.requires_grad_() for b in case["B"]]

    def function(x, *factors):
        Z = [torch.zeros(b.shape[0], 2, dtype=torch.float64, requires_grad=True) for b in B]
        return lora_linear(x, case["W"], case["bias"], factors[:2], factors[2:], case["scale"], Z=Z, P=case["P"])

    inputs = (case["x"].requires_grad_(), *A, *B)
    assert torch.autograd.gradcheck(function, inputs) and torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.skipif(not native.available(), reason="the native library was not built")
@pytest.mark.parametrize("index", [-1, 20])
def test_the_kernel_refuses_a_column_that_is_not_there(index):
    case = make(k=1, picks=True)
    case["P"][1, 0] = index
    with pytest.raises(RuntimeError, match=f"P names column {index}; x has 20"):
        run(case, "native")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_are_those_of_tokens_that_do_not_add_up(dtype):
    x, dy = torch.randn(9, 6).to(dtype), [torch.randn(9, n).to(dtype) for n in (4, 7)]
    wanted = torch.stack([(g.double().square().sum(1, keepdim=True) * x.double().square()).sum(0) for g in dy])
    torch.testing.assert_close(reference.column_norms(x, dy).double(), wanted, rtol=1e-5, atol=1e-6)
