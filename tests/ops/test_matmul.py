"""Matmul engines: the same product from each, packed copies that follow the weight, choices that can be explained."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastlora
from fastlora.ops import matmul as engines
from fastlora.ops.matmul import ENGINES, LINEAR, ONEDNN, PACKED, MatmulEngines

NAMES = [LINEAR, *([] if engines.onednn_reason() else [ONEDNN, PACKED])]


@pytest.fixture(autouse=True)
def no_override(monkeypatch):
    monkeypatch.setenv("FASTLORA_CPU_ENGINE", "")
    monkeypatch.setattr(ENGINES, "override", "")


def low_precision_error(x, W, b):
    exact = F.linear(x.double(), W.double(), None if b is None else b.double())
    return exact, (F.linear(x, W, b).double() - exact).abs().amax() if exact.numel() else 0.0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape,N", [((7, 20), 12), ((2, 3, 5), 1), ((1, 33), 17), ((0, 8), 4), ((9,), 4)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_products(name, dtype, shape, N, with_bias):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g).to(dtype)
    W = torch.randn(N, shape[-1], generator=g).to(dtype)
    b = torch.randn(N, generator=g).to(dtype) if with_bias else None
    mine = MatmulEngines()
    exact, error = low_precision_error(x, W, b)
    y = mine.forward(x, W, b, name)
    assert y.shape == exact.shape and y.dtype == dtype
    tolerance = 4 * error + 4 * torch.finfo(dtype).eps * exact.abs().max() if exact.numel() else 0
    assert exact.numel() == 0 or (y.double() - exact).abs().max() <= tolerance
    dy, into = torch.randn(6, N, generator=g).to(dtype), torch.randn(6, shape[-1], generator=g).to(dtype)
    for start in (None, into):
        exact = dy.double() @ W.double() + (0 if start is None else start.double())
        plain = dy @ W + (0 if start is None else start)
        got = mine.backward(dy, W, name, into=None if start is None else start.clone())
        tolerance = 4 * (plain.double() - exact).abs().max() + 4 * torch.finfo(dtype).eps * exact.abs().max()
        assert (got.double() - exact).abs().max() <= tolerance


@pytest.mark.skipif(PACKED not in NAMES, reason="this torch has no oneDNN linear")
def test_packed_copy_follows_in_place_edits_loads_and_new_memory():
    mine, layer, x = MatmulEngines(), nn.Linear(16, 8).requires_grad_(False), torch.randn(4, 16)

    def check():
        y, dx = mine.forward(x, layer.weight, None, PACKED), mine.backward(x[:, :8].contiguous(), layer.weight, PACKED)
        torch.testing.assert_close(y, F.linear(x, layer.weight))
        torch.testing.assert_close(dx, x[:, :8] @ layer.weight)

    check()
    assert mine.packed_bytes(layer.weight) >= 2 * 16 * 8 * 4
    with torch.no_grad():
        layer.weight.mul_(2.0)
    check()
    with torch.no_grad():
        layer.weight[0, 1] += 1.0  # one element: only the version tells
    check()
    layer.load_state_dict(nn.Linear(16, 8).state_dict())
    check()
    layer.weight.data = torch.randn(8, 16)
    check()
    layer.weight.data.sub_(1.0)  # neither the version nor the memory changes
    check()
    low = layer.to(torch.bfloat16).weight
    torch.testing.assert_close(mine.forward(x.bfloat16(), low, None, PACKED), F.linear(x.bfloat16(), low))
    assert mine.packed_bytes() == mine.packed_bytes(low) > 0


EDITS = {
    "a row": lambda w: w.data[5].zero_(),
    "columns": lambda w: w.data[:, 1:5].zero_(),
    "odd columns negated": lambda w: w.data[:, 1::2].neg_(),
    "two rows change places": lambda w: w.data.copy_(w.data[[1, 0, *range(2, len(w))]]),
    "transposed": lambda w: w.data.copy_(w.data.t().clone()),
    "by NumPy": lambda w: w.detach().numpy().__setitem__((7, 3), 3.0),
    "the last bit": lambda w: w.data.view(torch.int32)[-1, -1].bitwise_xor_(1 << 20),
    "foreach": lambda w: torch._foreach_add_([w.data], 0.01),
}


@pytest.mark.skipif(PACKED not in NAMES, reason="this torch has no oneDNN linear")
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("layout", ["whole", "odd address", "transposed"])
def test_packed_copies_follow_edits_that_torch_does_not_count(monkeypatch, edit, layout):
    torch.manual_seed(0)
    mine, x, memory = MatmulEngines(), torch.randn(4, 96), torch.randn(96 * 96 + 1)
    W = {"whole": memory[:-1], "odd address": memory[1:], "transposed": memory[:-1]}[layout].view(96, 96)
    W = nn.Parameter(W.t() if layout == "transposed" else W, requires_grad=False)
    mine.forward(x, W, None, PACKED), mine.backward(x, W, PACKED)
    EDITS[edit](W)
    for _ in range(2):
        torch.testing.assert_close(mine.forward(x, W, None, PACKED), x @ W.t())
        torch.testing.assert_close(mine.backward(x, W, PACKED), x @ W)
        monkeypatch.setattr(engines, "onednn_pack", None)  # the second time nothing has changed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_model_that_asks_for_packing_runs_in_dtypes_that_onednn_has_no_product_for(dtype):
    torch.manual_seed(0)
    options = fastlora.LoraConfig(r=2, target_modules=["0"], prepack=True)
    model = fastlora.inject(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 3)), options, accelerate_frozen=True)
    plain = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 3)).to(dtype)
    x = torch.randn(4, 16)
    model(x).sum().backward()
    model.to(dtype)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "lora" not in k})
    y = model(x.to(dtype))
    y.sum().backward()
    assert torch.equal(y, plain(x.to(dtype)))  # B is zero
    assert model[0].lora_B.default.weight.grad.abs().sum() > 0


@pytest.mark.skipif(PACKED not in NAMES, reason="this torch has no oneDNN linear")
def test_packed_copy_is_freed_with_its_weight():
    mine, W = MatmulEngines(), torch.randn(8, 16)
    mine.forward(torch.randn(4, 16), W, None, PACKED)
    assert mine.packed_bytes() > 0
    del W
    gc.collect()
    assert mine.packed_bytes() == 0


def test_auto_never_packs_a_trainable_weight_and_unpacked_never_packs():
    mine = MatmulEngines()
    x, W = torch.randn(64, 128), nn.Parameter(torch.randn(128, 128))
    mine.forward(x, W, None)
    assert mine.packed_bytes() == 0 and not mine.choices(W)
    frozen = W.detach()
    mine.forward(x, frozen, None, "unpacked")
    assert mine.packed_bytes() == 0
    (choice,) = mine.choices(frozen).values()
    assert PACKED not in choice.seconds and LINEAR in choice.seconds


def test_choice_is_made_once_per_shape_bucket_and_drops_what_lost(monkeypatch):
    timed = []

    def fake(candidates, run):
        timed.append(tuple(candidates))
        for name in candidates:
            run(name)
        return engines.Choice(LINEAR, dict.fromkeys(candidates, 1.0))

    monkeypatch.setattr(engines, "_time", fake)
    mine, W = MatmulEngines(), torch.randn(16, 16)
    for rows in (33, 40, 63):
        mine.forward(torch.randn(rows, 16), W, None)
    assert len(timed) == 1
    mine.forward(torch.randn(64, 16), W, None)
    assert len(timed) == 2
    assert mine.packed_bytes() == 0


def test_override_by_environment_and_by_name(monkeypatch):
    monkeypatch.setenv("FASTLORA_CPU_ENGINE", "mkl")
    with pytest.raises(ValueError, match="FASTLORA_CPU_ENGINE or engine: expected one of .*'mkl'"):
        MatmulEngines().forward(torch.randn(2, 3), torch.randn(4, 3), None)
    monkeypatch.setenv("FASTLORA_CPU_ENGINE", "onednn")
    monkeypatch.setattr(engines, "onednn_reason", lambda: "this torch has no mkldnn::_linear_pointwise")
    with pytest.raises(RuntimeError, match="'onednn' was asked for and cannot run: this torch has no mkldnn"):
        MatmulEngines().forward(torch.randn(2, 3), torch.randn(4, 3), None)
    monkeypatch.setenv("FASTLORA_CPU_ENGINE", "")
    x, W = torch.randn(2, 3), torch.randn(4, 3)
    assert torch.equal(MatmulEngines().forward(x, W, None), F.linear(x, W))  # auto is safe without the private operator


def block():
    torch.manual_seed(0)
    m = nn.Sequential()
    m.add_module("fc1", nn.Linear(12, 24))
    m.add_module("act", nn.GELU())
    m.add_module("fc2", nn.Linear(24, 12))
    m.add_module("head", nn.Linear(12, 3))
    return m


def accelerated(**kwargs):
    config = fastlora.LoraConfig(
        r=2, target_modules=["fc1"], modules_to_save=["head"], init_lora_weights=False, **kwargs
    )
    return fastlora.inject(block(), config, accelerate_frozen=True)


@pytest.mark.parametrize("prepack", ["auto", True, False])
def test_accelerate_frozen_keeps_numbers_and_gradients(prepack):
    if prepack is True and PACKED not in NAMES:
        pytest.skip("this torch has no oneDNN linear")
    torch.manual_seed(1)
    plain = fastlora.inject(
        block(), fastlora.LoraConfig(r=2, target_modules=["fc1"], modules_to_save=["head"], init_lora_weights=False)
    )
    fast = accelerated(prepack=prepack)
    fast.load_state_dict(plain.state_dict())
    assert type(fast.fc2) is fastlora.nn.FrozenLinear and type(fast.head) is nn.Linear
    x = torch.randn(5, 12, requires_grad=True)
    results = []
    for m in (plain, fast, copy.deepcopy(fast)):
        y = m(x)
        parameters = [p for p in m.parameters() if p.requires_grad]
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *parameters])])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_unfreezing_restores_the_plain_path():
    fast = accelerated()
    fast.fc2.requires_grad_(True)
    x = torch.randn(5, 12)
    fast(x).sum().backward()
    hidden = fast.act(fast.fc1(x)).detach()
    want = torch.autograd.grad(fast.head(F.linear(hidden, fast.fc2.weight, fast.fc2.bias)).sum(), fast.fc2.weight)[0]
    torch.testing.assert_close(fast.fc2.weight.grad, want)


def test_frozen_operator_checks():
    x, W, b = torch.randn(3, 4, 8, requires_grad=True), torch.randn(6, 8), torch.randn(6)
    torch.library.opcheck(torch.ops.fastlora.frozen_linear.default, (x, W, b, LINEAR))
    torch.library.opcheck(torch.ops.fastlora.frozen_linear_backward.default, (torch.randn(3, 4, 6), W, LINEAR))
    wide = [t.detach().double() for t in (x, W, b)]
    assert torch.autograd.gradcheck(
        lambda x: torch.ops.fastlora.frozen_linear(x, *wide[1:], LINEAR), wide[0].requires_grad_()
    )
    assert torch.autograd.gradgradcheck(lambda x: torch.ops.fastlora.frozen_linear(x, *wide[1:], LINEAR), wide[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.ops.fastlora.frozen_linear(x, W, b, "auto").dtype == torch.bfloat16


def test_compiled_without_a_graph_break():
    fast = accelerated()
    x = torch.randn(5, 12)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), fast(x))


def test_explain_names_engine_and_memory():
    fast = accelerated(prepack=True) if PACKED in NAMES else accelerated()
    fast(torch.randn(5, 12)).sum().backward()
    shown = str(fastlora.explain(fast))
    assert "fc2" in shown and (PACKED not in NAMES or "packed" in shown)
    assert ENGINES.packed_bytes() >= 0


def test_a_frozen_layer_leaves_the_operator_once_the_plain_linear_has_won(monkeypatch):
    def plain_wins(candidates, run):
        return engines.Choice(LINEAR, dict.fromkeys(candidates, 1.0))

    monkeypatch.setattr(engines, "_time", plain_wins)
    monkeypatch.setattr(ENGINES, "_choices", {})
    fast, x = accelerated(), torch.randn(5, 12, requires_grad=True)
    nodes = []
    for _ in range(2):
        y = fast.fc2(torch.randn(5, 24, requires_grad=True))
        nodes.append(type(y.grad_fn).__name__)
        y.sum().backward()
        fast(x).sum().backward()
    assert "FrozenLinear" in nodes[0] and nodes[1] == "AddmmBackward0"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(6, 8), (2, 3, 8), (1, 2, 3, 8)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("adapt", [True, False])
def test_an_activation_may_change_the_output_in_place(monkeypatch, name, shape, with_bias, adapt):
    monkeypatch.setattr(ENGINES, "override", name)
    base = nn.Sequential(nn.Linear(8, 4, bias=with_bias), nn.ReLU(inplace=True), nn.Linear(4, 4))
    model = copy.deepcopy(base)
    targets = ["0"] if adapt else ["2"]
    fastlora.inject(model, fastlora.LoraConfig(r=2, target_modules=targets), accelerate_frozen=True)
    x = torch.randn(shape, requires_grad=True)
    y = model(x)
    torch.testing.assert_close(y, base(x))
    mine, theirs = (torch.autograd.grad(out.square().sum(), x)[0] for out in (y, base(x)))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.skipif(PACKED not in NAMES, reason="this torch has no oneDNN linear")
def test_packed_layers_of_a_model_follow_loads_merges_and_moves(monkeypatch):
    torch.manual_seed(0)
    model, other = accelerated(), {name: 0.5 * t for name, t in accelerated().state_dict().items()}

    def check(dtype=torch.float32):
        x, found = torch.randn(5, 12, dtype=dtype), []
        for name in (LINEAR, PACKED):
            monkeypatch.setattr(ENGINES, "override", name)
            seen = x.clone().requires_grad_()
            y = model(seen)
            y.sum().backward()
            found += [y.detach(), seen.grad]
        # The engines round differently: a few roundings of the largest number.
        tolerance = 16 * torch.finfo(dtype).eps * max(t.abs().max().item() for t in found)
        torch.testing.assert_close(found[:2], found[2:], rtol=0, atol=tolerance)

    check()
    assert ENGINES.packed_bytes(model.fc1.weight) > 0 and ENGINES.packed_bytes(model.fc2.weight) > 0
    for change in (
        lambda: model.load_state_dict(other),
        lambda: model.load_state_dict(accelerated().state_dict(), assign=True),
        lambda: fastlora.merge(model),
        lambda: fastlora.unmerge(model),
    ):
        change()
        check()
    model.to(torch.bfloat16)
    check(torch.bfloat16)
    model.to("meta")
    assert model(torch.randn(5, 12, dtype=torch.bfloat16, device="meta")).device.type == "meta"
    with pytest.raises(ValueError, match="x: is on cpu, the weight on meta"):
        model(torch.randn(5, 12, dtype=torch.bfloat16))
    assert ENGINES.packed_bytes(model.fc1.weight) == ENGINES.packed_bytes(model.fc2.weight) == 0


@pytest.mark.parametrize("shape", [(6, 8), (2, 3, 8), (1, 2, 3, 8), (8,)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "slice", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_linear_engine_keeps_the_base_model_s_bits_and_makes_no_view(monkeypatch, shape, with_bias, layout, dtype):
    monkeypatch.setattr(ENGINES, "override", LINEAR)
    base = nn.Linear(8, 4, bias=with_bias, dtype=dtype).requires_grad_(False)
    layer = fastlora.inject(nn.Sequential(copy.deepcopy(base)), fastlora.LoraConfig(r=2, target_modules=["0"]))
    x = torch.randn(shape, dtype=dtype)
    if layout == "slice":
        x = torch.randn(*shape[:-1], 19, dtype=dtype)[..., 3:11]
    elif layout == "transposed" and len(shape) > 1:
        x = torch.randn(*shape[:-2], 8, shape[-2], dtype=dtype).transpose(-1, -2)
    for seen in (x, x.detach().requires_grad_()):
        y = layer(seen)
        assert torch.equal(y, base(seen)) and not y._is_view()
    with torch.no_grad():
        y = layer(x)
        assert torch.equal(y, base(x)) and not y._is_view()
