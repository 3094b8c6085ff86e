"""The public operator on the Triton backend: outputs and every gradient against the formula in float64."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util

import pytest
import torch
from fastlora.kernels import expand_backward, primitives, shrink_linear, shrink_linear_backward
from support.triton_grouped_help import CASES, Operands, expected_dh, expected_dx
from support.triton_grouped_help import INTERLEAVED as MIXED
from support.triton_help import BARE, DEVICE, EMPTY, FUSED, INTERLEAVED, SEPARATE, TINY, Data, assert_close, wide

from fastlora.ops import backends, reference
from fastlora.ops.backends import triton as triton_backend
from fastlora.ops.layout import AdapterBatch, GroupLayout, LoraCall
from fastlora.ops.lora import checked_linear, lora_grouped, lora_linear
from fastlora.ops.probe_ops import measured

pytestmark = pytest.mark.usefixtures("poisoned", "allowed")
PROBLEMS = {"separate": SEPARATE, "fused": FUSED, "tiny": TINY, "empty": EMPTY, "interleaved": INTERLEAVED,
            "bare": BARE}  # fmt: skip


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
    streams, blocks = range(1, 2 * len(A), 2), data.problem.blocks
    torch.manual_seed(7)
    W, bias = ([wide(t) if double else t for t in ts] for ts in (data.W, data.bias))
    if double:
        P = None if data.P is None else wide(data.P) if data.P.is_floating_point() else data.P.cpu()
        y = reference.lora_linear(x, W, bias, A, B, data.scale, Z, P, None, seed, p, streams, blocks)
    else:
        y = checked_linear(x, W, bias, A, B, data.scale, p, Z, V, data.P, None, "triton", "auto", streams, blocks)
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


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("fused", [(shrink_linear, expand_backward), (shrink_linear_backward,)], ids=["dB", "dx"])
def test_outputs_and_gradients_of_the_fused_strategies(problem, p, fused, monkeypatch):
    """h beside y with dh beside dB, and dh beside dx."""
    for module in fused:
        monkeypatch.setattr(module, "choose_strategy", lambda *size: "fused")
        monkeypatch.setattr(module, "aligned", lambda tensors: True, raising=False)
    data = Data(problem, torch.float32)
    found, wanted = run(data, p, False), run(data, p, True)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_close(found[name], value, torch.float32, name)


@pytest.mark.parametrize("fused", [(), (shrink_linear, shrink_linear_backward)], ids=["library", "fused"])
@pytest.mark.parametrize("problem", [SEPARATE, INTERLEAVED], ids=["separate", "interleaved"])
def test_a_weight_that_lies_transposed(problem, fused, monkeypatch):
    """Multiplied by as it lies, and in a kernel that reads its rows as a copy."""
    for module in fused:
        monkeypatch.setattr(module, "choose_strategy", lambda *size: "fused")
        monkeypatch.setattr(module, "aligned", lambda tensors: True)
    data = Data(problem, torch.float32)
    data.W = [w.t().contiguous().t() for w in data.W]
    found, wanted = run(data, 0.0, False), run(data, 0.0, True)
    for name, value in wanted.items():
        assert_close(found[name], value, torch.float32, name)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize(("dtype", "p"), [(torch.float32, 0.0), (torch.float32, 0.4), (torch.float16, 0.0)])
def test_columns_of_x_in_the_place_of_probe_rows(problem, dtype, p):
    data = Data(dataclasses.replace(problem, probes=3), dtype, torch.float32)
    index = torch.arange(3 * len(problem.widths), device=DEVICE).view(-1, 3) * 5
    data.P = index % max(data.x.shape[1], 1)
    found, wanted = run(data, p, False), run(data, p, True)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_close(found[name], value, dtype, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_columns_of_the_gradient_and_their_norms(dtype):
    data = Data(SEPARATE, dtype, torch.float32)
    x, sizes = data.x, data.problem.outputs
    index = torch.arange(3 * len(sizes), device=DEVICE) * 5 % x.shape[1]
    picked, y = x.index_select(1, index), torch.cat(data.dy, dim=1) * 0.0
    Z = [torch.zeros(n, 3, device=DEVICE, requires_grad=True) for n in sizes]
    norms = [torch.zeros(x.shape[1], device=DEVICE, requires_grad=True) for _ in sizes]
    dy = torch.cat(data.dy, dim=1)
    measured(y, sizes, "triton", picked, Z, x, norms).backward(dy)
    expected = reference.column_norms(wide(x), [wide(g) for g in data.dy])
    for i, (grad, z) in enumerate(zip(data.dy, Z, strict=True)):
        wanted = reference.column_gradients(wide(x), wide(grad), index[3 * i : 3 * i + 3].cpu())
        assert_close(z.grad, wanted, dtype, f"Q[{i}]")
        assert_close(norms[i].grad, expected[i], dtype, f"norms[{i}]")


def test_a_projection_without_gradient():
    data = Data(SEPARATE, torch.float32)
    A = [a.clone().requires_grad_() for a in data.A]
    x = data.x.clone().requires_grad_()
    y = lora_linear(x, data.W, data.bias, A, data.B, data.scale, backend="triton")
    y[2].backward(data.dy[2])
    wanted = wide(data.dy[2]) @ (wide(data.W[2]) + data.scale[2] * wide(data.B[2]) @ wide(data.A[2]))
    assert_close(x.grad, wanted, torch.float32, "dx")
    assert (A[0].grad == 0).all() and A[2].grad.abs().sum() > 0


def run_grouped(o, p, double):
    """Outputs and gradients of x, A, B, Z and V of a mixed batch, by the backend or by the formula in float64."""
    torch.manual_seed(7)
    probes = [k for ranks, k in zip(o.case.ranks, o.case.probes, strict=True) for _ in ranks]
    acc, device = (torch.float64, "cpu") if double else (torch.float32, DEVICE)

    def leaves(tensors):
        return [(wide(t.to(o.dtype)) if double else t.clone()).requires_grad_() for t in tensors]

    x, A, B = leaves([o.x])[0], leaves(o.A), leaves(o.B)
    Z = [torch.zeros(b.shape[0], k, dtype=acc, device=device).requires_grad_() for b, k in zip(B, probes, strict=True)]
    groups = [(g, n) for g in range(len(o.case.ranks)) for n in o.case.outputs]
    V = [torch.zeros(2, n + 1, dtype=torch.float64, device=device).requires_grad_() for _, n in groups]
    bias, own = [None] * len(o.W), {"blocks": o.case.blocks}
    batch = AdapterBatch(
        [str(g) for g in range(len(o.case.ranks))], torch.tensor(o.case.ids, dtype=torch.int64, device=DEVICE)
    )
    if double:
        seed = torch.randint(2**62, (), dtype=torch.int64, device=DEVICE)
        keys = batch.keys(o.x, seed, 0).cpu() if any(p) else None
        P, ids = [wide(t) for t in o.P], batch.ids.cpu()
        y = reference.lora_grouped(x, [wide(w) for w in o.W], bias, A, B, o.scales, ids, Z, P, (), keys, p, **own)
    else:
        y = lora_grouped(x, o.W, bias, A, B, o.scales, batch, p=p, Z=Z, V=V, P=o.P, backend="triton", **own)
    torch.autograd.backward(y, [wide(g) if double else g for g in o.dy])
    found = {"dx": x.grad} | {f"y[{j}]": out.detach() for j, out in enumerate(y)}
    if double:
        V = [reference.column_moments(out.detach()[o.rows(g)]) for g in range(len(o.case.ranks)) for out in y]
    for name, tensors in (("dA", A), ("dB", B), ("Q", Z)):
        found |= {f"{name}[{i}]": torch.zeros_like(t) if t.grad is None else t.grad for i, t in enumerate(tensors)}
    return found | {f"moments[{i}]": v if double else v.grad[:, :-1] for i, v in enumerate(V)}


@pytest.mark.parametrize("case", ["separate", "fused", "base_only", "empty", "interleaved"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_rows_of_several_adapters(case, p):
    o = Operands({**CASES, "interleaved": MIXED}[case])
    some = [p if g % 2 == 0 else 0.0 for g in range(len(o.case.ranks))]
    found, wanted = run_grouped(o, some, False), run_grouped(o, some, True)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_close(found[name], value, torch.float32, name)


def test_an_output_of_a_mixed_batch_without_gradient():
    o = Operands(CASES["separate"])
    A, B = ([t.clone().requires_grad_() for t in tensors] for tensors in (o.A, o.B))
    x, batch = (
        o.x.clone().requires_grad_(),
        AdapterBatch(["a", "b", "c"], torch.tensor(o.case.ids, dtype=torch.int64, device=DEVICE)),
    )
    y = lora_grouped(x, o.W, [None, None], A, B, o.scales, batch, backend="triton")
    y[1].backward(o.dy[1])
    dh = expected_dh(o, [None, o.dy[1]])
    assert_close(x.grad, expected_dx(o, wide(o.dy[1]) @ wide(o.W[1]), dh), torch.float32, "dx")
    assert (B[0].grad == 0).all() and (A[2].grad == 0).all() and B[1].grad.abs().sum() > 0


def test_gradstat_of_the_backend():
    x, dy = torch.randn(20, 9, device=DEVICE), torch.randn(20, 30, device=DEVICE)[:, 3:20]
    offsets = (0, 5, 20)
    found = backends.BACKENDS["triton"].gradstat(x, [dy], offsets)
    assert_close(found[0], reference.gradstat(wide(x), wide(dy), offsets), torch.float32, "gradstat")


def test_the_cpu_is_refused_by_name():
    reason = type(backends.BACKENDS["triton"])().unsupported_reason(torch.device("cpu"), torch.float32)
    assert "cpu" in reason and "GPU" in reason


@pytest.mark.skipif(DEVICE == "cpu", reason="two devices")
def test_mixed_devices_are_named():
    data = Data(SEPARATE, torch.float32)
    with pytest.raises(ValueError, match="lora_A"):
        backends.BACKENDS["triton"].shrink(data.x, [a.cpu() for a in data.A], None, None, 0.0)


def reason(monkeypatch, capability=(9, 0), version="3.7.0", found=True):
    """Why the backend would not run on a GPU of this capability beside this Triton."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if found else None)
    triton_backend._missing.cache_clear()
    try:
        return triton_backend.unsupported_reason(torch.device("cuda"), torch.bfloat16)
    finally:
        triton_backend._missing.cache_clear()


def test_what_is_missing_is_said_with_what_to_do(monkeypatch):
    assert reason(monkeypatch) is None
    assert "compute capability 8.0" in reason(monkeypatch, capability=(7, 5))
    assert "7.5" in reason(monkeypatch, capability=(7, 5))
    old = reason(monkeypatch, version="3.2.0")
    assert "3.2.0 is installed" in old and "install triton >= 3.6" in old
    none = reason(monkeypatch, found=False)
    assert "not installed" in none and "install triton >= 3.6" in none


def test_a_backend_asked_for_by_name_raises_and_auto_says_why(monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "triton", triton_backend.TritonBackend())
    with pytest.raises(RuntimeError, match="the tensors are on cpu; move them to a GPU"):
        backends.choose("triton", torch.device("cpu"), torch.float32)
    _, passed = backends.choose("auto", torch.device("cpu"), torch.float32)
    assert "GPU" in passed["triton"]
    assert "float64" in triton_backend.unsupported_reason(torch.device("cuda"), torch.float64)


def test_devices_that_differ_are_named_before_anything_runs():
    backend, data = triton_backend.TritonBackend(), Data(SEPARATE, torch.float32)
    layout = GroupLayout(data.W, data.B)
    call = LoraCall(
        data.x, data.W, data.bias, data.A, data.B, (), (), data.scale, layout, None, None, "auto", False
    )  # fmt: skip
    with pytest.raises(ValueError, match="lora_A: is on meta, x on"):
        backend.forward(call._replace(A=[torch.empty_like(a, device="meta") for a in data.A]))
    with pytest.raises(ValueError, match="weight: is on meta"):
        backend.forward(call._replace(W=[torch.empty_like(w, device="meta") for w in data.W]))
    with pytest.raises(ValueError, match="dy: is on meta"):
        backend.gradstat(data.x, [torch.empty_like(data.dy[0], device="meta")], (0, 35))


def test_tf32_follows_the_newer_setting_of_torch():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for setting, wanted in (("tf32", "tf32"), ("ieee", "ieee")):
            matmul.fp32_precision = setting
            assert primitives.precision(torch.float32) == wanted
            assert primitives.precision(torch.bfloat16) == "ieee"
    finally:
        matmul.fp32_precision = before
