"""What torch asks of an operator: opcheck, gradcheck, compile, autocast, checkpoints, and how often it is called."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_help import make, run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastlora.ops import native
from fastlora.ops.lora import lora_linear


class Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removesuffix(".default")
        self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def test_one_operator_forward_and_one_backward():
    case = make(k=2)
    x, A, B = (
        case["x"].requires_grad_(),
        [a.requires_grad_() for a in case["A"]],
        [b.requires_grad_() for b in case["B"]],
    )
    with Counter() as forward:
        y = lora_linear(x, case["W"], case["bias"], A, B, case["scale"])
    with Counter() as backward:
        torch.autograd.grad(y, [x, *A, *B], case["dy"])
    assert forward.calls == {"fastlora.lora_linear": 1}
    assert backward.calls == {"fastlora.lora_linear_backward": 1}


@pytest.mark.skipif(not native.available(), reason="counts calls of the native kernels")
def test_native_kernels_run_once_per_group():
    case = make()
    x, A, B = (
        case["x"].requires_grad_(),
        [a.requires_grad_() for a in case["A"]],
        [b.requires_grad_() for b in case["B"]],
    )
    with torch.profiler.profile() as profile:
        y = lora_linear(x, case["W"], case["bias"], A, B, case["scale"], backend="native")
        torch.autograd.grad(y, [x, *A, *B], case["dy"])
    counts = {e.key: e.count for e in profile.key_averages()}
    assert {k: v for k, v in counts.items() if k.startswith("fastlora::") and k.endswith("_")} == {
        "fastlora::lora_forward_": 1,
        "fastlora::lora_backward_": 1,
    }
    assert not {"aten::cat", "aten::clone", "aten::narrow", "aten::contiguous"} & set(counts)
    assert counts.get("aten::linear") == 3


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("picks", [False, True])
def test_opcheck(p, picks):
    case = make(k=2, S=13, picks=picks)
    seed = torch.tensor(7) if p else None
    x, A, B = (
        case["x"].requires_grad_(),
        [a.requires_grad_() for a in case["A"]],
        [b.requires_grad_() for b in case["B"]],
    )
    Z = [torch.zeros(b.shape[0], 2, requires_grad=True) for b in B]
    V = [torch.zeros(2, w.shape[0] + 1, dtype=torch.float64, requires_grad=True) for w in case["W"]]
    probes = ([case["P"]], [case["sign"]])
    args = (x, case["W"], case["bias"], A, B, Z, V, *probes, seed, [], [], case["scale"], [p], "auto", "auto")
    torch.library.opcheck(torch.ops.fastlora.lora_linear.default, args)
    h = torch.randn(13, 8 + (6 if picks else 2))
    back = (case["dy"], case["x"].detach(), h, case["W"], [a.detach() for a in A], [b.detach() for b in B], [2])
    torch.library.opcheck(
        torch.ops.fastlora.lora_linear_backward.default,
        (*back, seed, [], [], case["scale"], [p], [True] * 6, "auto", "auto"),
    )


def test_gradcheck_and_gradgradcheck():
    case = make(M=4, K=5, N=(3, 2), r=(2, 1), dtype=torch.float64, k=2)
    inputs = [case["x"], *case["A"], *case["B"]]
    for t in inputs:
        t.requires_grad_()

    def function(x, a0, a1, b0, b1):
        return tuple(lora_linear(x, case["W"], case["bias"], [a0, a1], [b0, b1], case["scale"]))

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_create_graph_reaches_the_probe_leaf():
    case = make(k=3, dtype=torch.float64)
    x = case["x"].requires_grad_()
    Z = [torch.zeros(b.shape[0], 3, dtype=torch.float64, requires_grad=True) for b in case["B"]]
    y = lora_linear(x, case["W"], case["bias"], case["A"], case["B"], case["scale"], Z=Z, P=case["P"])
    plain = torch.autograd.grad(y, Z, case["dy"], retain_graph=True)
    again = torch.autograd.grad(y, Z, case["dy"], create_graph=True)
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(
        torch.autograd.grad(again[0].sum(), x)[0], case["dy"][0].sum(1, keepdim=True) * case["P"].double().sum(0)
    )


def test_two_backwards_of_one_graph_add_up():
    case = make(k=3)
    Z = [torch.zeros(b.shape[0], 3, requires_grad=True) for b in case["B"]]
    y = lora_linear(case["x"], case["W"], case["bias"], case["A"], case["B"], case["scale"], Z=Z, P=case["P"])
    torch.autograd.backward(y, case["dy"], retain_graph=True)
    once = Z[0].grad.clone()
    torch.autograd.backward(y, case["dy"])
    torch.testing.assert_close(Z[0].grad, 2 * once)


def test_forward_mode_raises():
    case = make()
    with torch.autograd.forward_ad.dual_level(), pytest.raises((NotImplementedError, RuntimeError)):
        x = torch.autograd.forward_ad.make_dual(case["x"], torch.ones_like(case["x"]))
        lora_linear(x, case["W"], case["bias"], [a.requires_grad_() for a in case["A"]], case["B"], case["scale"])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    case = make(k=2)
    A, B = [a.requires_grad_() for a in case["A"]], [b.requires_grad_() for b in case["B"]]
    Z = [torch.zeros(b.shape[0], 2, requires_grad=True) for b in B]

    def function(x):
        return lora_linear(x, case["W"], case["bias"], A, B, case["scale"], Z=Z, P=case["P"])

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (13, 9):
        x, dy = case["x"][:rows], [g[:rows] for g in case["dy"]]
        got = torch.autograd.grad(compiled(x), [*A, *B, *Z], dy, allow_unused=True)
        want = torch.autograd.grad(function(x), [*A, *B, *Z], dy, allow_unused=True)
        for a, b in zip(got, want, strict=True):
            assert (a is None or not a.any()) if b is None else torch.equal(a, b)


def test_autocast_runs_in_low_precision_and_returns_parameter_dtypes():
    case = make(k=2)
    A, B = [a.requires_grad_() for a in case["A"]], [b.requires_grad_() for b in case["B"]]
    Z = [torch.zeros(b.shape[0], 2, requires_grad=True) for b in B]
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(case["x"], case["W"], case["bias"], A, B, case["scale"], Z=Z, P=case["P"])
    assert all(out.dtype == torch.bfloat16 for out in y)
    torch.autograd.backward(y, [g.bfloat16() for g in case["dy"]])
    assert all(t.grad.dtype == torch.float32 for t in (*A, *B, *Z))
    low = {key: [t if t is None else t.bfloat16() for t in case[key]] for key in ("W", "bias", "A", "B", "dy")}
    want, grads = run({**case, **low, "x": case["x"].bfloat16()})
    assert all(torch.equal(a, b) for a, b in zip(y, want, strict=True))
    torch.testing.assert_close(A[0].grad, grads[1].float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_checkpoint(reentrant, p):
    case = make(k=2)

    def gradients(wrap):
        A, B = [a.detach().requires_grad_() for a in case["A"]], [b.detach().requires_grad_() for b in case["B"]]
        Z = [torch.zeros(b.shape[0], 2, requires_grad=True) for b in B]
        x = case["x"].detach().requires_grad_()
        torch.manual_seed(3)
        y = wrap(
            lambda x: tuple(lora_linear(x, case["W"], case["bias"], A, B, case["scale"], p=p, Z=Z, P=case["P"])), x
        )
        torch.autograd.backward(y, case["dy"])
        return [t.grad for t in (x, *A, *B, *Z)]

    plain = gradients(lambda f, x: f(x))
    again = gradients(lambda f, x: checkpoint(f, x, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True) if b is not None)


def test_functional_call():
    import fastlora

    layer = fastlora.nn.Linear(6, 4, r=2, init_lora_weights=False)
    other = {name: torch.randn_like(p) for name, p in layer.named_parameters()}
    x = torch.randn(3, 6)
    a, b = other["lora_A.default.weight"], other["lora_B.default.weight"]
    expected = F.linear(x, other["weight"], other["bias"]) + 4.0 * x @ a.T @ b.T
    torch.testing.assert_close(torch.func.functional_call(layer, other, x), expected)
