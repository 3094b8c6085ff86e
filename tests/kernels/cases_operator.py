"""The public operator on the Triton backend: outputs and every gradient against the formula in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from kernel_support import DEVICE, EMPTY, FUSED, SEPARATE, TINY, Data, assert_close, wide

from fastlora import backends, reference
from fastlora.functional import lora_linear

pytestmark = pytest.mark.usefixtures("poisoned", "allowed")
PROBLEMS = {"separate": SEPARATE, "fused": FUSED, "tiny": TINY, "empty": EMPTY}


@pytest.fixture
def allowed(monkeypatch):
    """The backend without its refusal of the CPU, where the interpreter runs."""
    own = backends.BACKENDS["triton"]
    if DEVICE == "cpu":
        own = dataclasses.replace(own, unsupported_reason=lambda device, dtype: None)
    monkeypatch.setitem(backends.BACKENDS, "triton", own)


def run(data, p, double):
    """Outputs and gradients of x, A, B, Z and V, computed by the backend or by the formula in float64."""
    torch.manual_seed(7)

    def leaf(tensor):
        if tensor is None:
            return None
        kept = wide(tensor) if double else tensor.clone()
        return kept.requires_grad_()

    if double:
        A, B = ([wide(t.to(data.dtype)).requires_grad_() for t in ts] for ts in (data.A, data.B))
    else:
        A, B = ([leaf(t) for t in ts] for ts in (data.A, data.B))
    x = leaf(data.x)
    acc = torch.float64 if double else torch.float32
    device = "cpu" if double else DEVICE
    probes = data.problem.probes
    Z = [torch.zeros(n, probes, dtype=acc, device=device, requires_grad=True) for n in data.problem.widths if probes]
    V = [torch.zeros(2, n + 1, dtype=torch.float64, device=device, requires_grad=True) for n in data.problem.outputs]
    seed = torch.randint(2**62, (), dtype=torch.int64, device=DEVICE).cpu() if p else None
    torch.manual_seed(7)
    W, bias = ([wide(t) if double else t for t in ts] for ts in (data.W, data.bias))
    if double:
        P = None if data.P is None else wide(data.P)
        y = reference.lora_linear(x, W, bias, A, B, data.scale, Z, P, None, seed, p)
    else:
        y = lora_linear(x, W, bias, A, B, data.scale, p=p, Z=Z, V=V, P=data.P, backend="triton")
    torch.autograd.backward(y, [wide(g) if double else g for g in data.dy])
    moments = [reference.column_moments(out.detach()) for out in y] if double else [v.grad[:, :-1] for v in V]
    found = {"dx": x.grad} | {f"y[{j}]": out.detach() for j, out in enumerate(y)}
    found |= {f"moments[{j}]": m for j, m in enumerate(moments)}
    for name, leaves in (("dA", A), ("dB", B), ("Q", Z)):
        found |= {f"{name}[{i}]": t.grad for i, t in enumerate(leaves)}
    return found


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize(("dtype", "p"), [(torch.float32, 0.0), (torch.float32, 0.4), (torch.float16, 0.0)])
def test_outputs_and_gradients(problem, dtype, p):
    data = Data(problem, dtype, torch.float32)
    found, wanted = run(data, p, False), run(data, p, True)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_close(found[name], value, dtype, name)


def test_a_projection_without_gradient():
    data = Data(SEPARATE, torch.float32)
    A = [a.clone().requires_grad_() for a in data.A]
    x = data.x.clone().requires_grad_()
    y = lora_linear(x, data.W, data.bias, A, data.B, data.scale, backend="triton")
    y[2].backward(data.dy[2])
    wanted = wide(data.dy[2]) @ (wide(data.W[2]) + data.scale[2] * wide(data.B[2]) @ wide(data.A[2]))
    assert_close(x.grad, wanted, torch.float32, "dx")
    assert (A[0].grad == 0).all() and A[2].grad.abs().sum() > 0


def test_gradstat_of_the_backend():
    x, dy = torch.randn(20, 9, device=DEVICE), torch.randn(20, 30, device=DEVICE)[:, 3:20]
    offsets = (0, 5, 20)
    found = backends.BACKENDS["triton"].gradstat(x, dy, offsets)
    assert_close(found, reference.gradstat(wide(x), wide(dy), offsets), torch.float32, "gradstat")


def test_the_cpu_is_refused_by_name():
    reason = type(backends.BACKENDS["triton"])().unsupported_reason(torch.device("cpu"), torch.float32)
    assert "cpu" in reason and "GPU" in reason


@pytest.mark.skipif(DEVICE == "cpu", reason="two devices")
def test_mixed_devices_are_named():
    data = Data(SEPARATE, torch.float32)
    with pytest.raises(ValueError, match="lora_A"):
        backends.BACKENDS["triton"].shrink(data.x, [a.cpu() for a in data.A], None, None, 0.0)
