"""Adapted models under torch.func, torch.export and torch.jit.trace: torch's own operators, with the same numbers."""

from __future__ import annotations

import io
import operator

import pytest
import torch
from support.helpers import config, randomise
from torch import nn
from torch.func import functional_call, grad, hessian, jvp, vmap

import fastlora


class Attention(nn.Module):
    """Separate q, k and v, which run as one operator call, beside a linear without an adapter."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = [nn.Linear(8, 8) for _ in range(4)]

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.out((q @ k.transpose(-1, -2)).softmax(-1) @ v)


class Torchs(nn.Module):
    """torch's own attention."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


MODELS = {"separate": (Attention, ["q", "k", "v"]), "torch": (Torchs, ["attention", "out_proj"])}


def adapted(kind="separate", **options):
    torch.manual_seed(0)
    made, targets = MODELS[kind]
    return randomise(fastlora.inject(made(), config(r=2, target_modules=targets), **options)).eval()


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def loss_of(model):
    return lambda parameters, x: functional_call(model, parameters, (x,)).square().sum()


def gradients(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in trained(model).items()}


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_of_each_sample(kind):
    model, x = adapted(kind), torch.randn(3, 5, 8)
    each = vmap(grad(loss_of(model)), (None, 0))(trained(model), x.unsqueeze(1))
    for i in range(3):
        for name, expected in gradients(model, x[i : i + 1]).items():
            torch.testing.assert_close(each[name][i], expected, rtol=1e-4, atol=1e-5)


def test_gradients_of_each_sample_with_dropout():
    """Every sample draws its own mask under randomness="different", the same under "same"."""
    torch.manual_seed(0)
    model = randomise(
        fastlora.inject(nn.Sequential(nn.Linear(8, 6)), config(r=2, lora_dropout=0.5, target_modules=["0"]))
    )
    x = torch.randn(1, 8).expand(6, 8)
    each = {
        how: vmap(grad(loss_of(model)), (None, 0), randomness=how)(trained(model), x) for how in ("same", "different")
    }
    for found in each["same"].values():
        assert all(torch.equal(found[0], other) for other in found)
    assert not all(torch.equal(found[0], other) for found in each["different"].values() for other in found)


def test_derivatives_in_both_modes_and_of_second_order():
    model, x = adapted(), torch.randn(2, 5, 8)
    parameters, loss = trained(model), loss_of(model)
    expected = gradients(model, x)
    torch.testing.assert_close(grad(loss)(parameters, x), expected, rtol=1e-4, atol=1e-5)
    towards = {name: torch.randn_like(p) for name, p in parameters.items()}
    slope = sum((towards[name] * expected[name]).sum() for name in parameters)
    torch.testing.assert_close(jvp(lambda p: loss(p, x), (parameters,), (towards,))[1], slope, rtol=1e-4, atol=1e-4)
    curved, place = hessian(lambda row: model(row).square().sum())(x[0]), x[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(place).square().sum(), place, create_graph=True)
    (row,) = torch.autograd.grad(slope[1, 3], place)
    torch.testing.assert_close(curved[1, 3], row, rtol=1e-4, atol=1e-4)


def test_the_model_runs_fused_again_afterwards():
    model, x = adapted(), torch.randn(3, 5, 8)
    before = model(x)
    grad(loss_of(model))(trained(model), x)
    after = model(x)
    assert torch.equal(before, after)
    assert model.q(x).grad_fn.name() == adapted().q(x).grad_fn.name() and "LoRA" in adapted().q(x).grad_fn.name()


def reread(program):
    stream = io.BytesIO()
    save, load = (torch.jit.save, torch.jit.load) if hasattr(program, "code") else (torch.export.save, None)
    save(program, stream)
    stream.seek(0)
    return load(stream) if load else torch.export.load(stream).module()


def operators(program):
    if hasattr(program, "inlined_graph"):
        return {node.kind() for node in program.inlined_graph.nodes()}
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


EXPORTS = {
    "export": lambda model, x: torch.export.export(
        model, (x,), dynamic_shapes=({0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")},)
    ),
    "strict export": lambda model, x: torch.export.export(model, (x,), strict=True),
    "trace": lambda model, x: torch.jit.trace(model, (x,)),
    "trace without gradients": lambda model, x: torch.no_grad()(torch.jit.trace)(model, (x,)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("how", EXPORTS)
def test_what_was_exported_computes_the_same(how, kind):
    model, x = adapted(kind), torch.randn(2, 5, 8)
    program = EXPORTS[how](model, x)
    assert not any("fastlora" in name for name in operators(program))
    other = x.flip(0) if how == "strict export" or kind == "torch" else torch.randn(3, 7, 8)
    torch.testing.assert_close(reread(program)(other), model(other), rtol=1e-4, atol=1e-5)
    with fastlora.disable_adapters(model):
        assert not torch.allclose(reread(program)(other), model(other), atol=1e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", EXPORTS)
def test_accelerated_frozen_linears_are_exported_too(how):
    model, x = adapted(accelerate_frozen=True), torch.randn(2, 5, 8)
    assert isinstance(model.out, fastlora.nn.FrozenLinear)
    model.out.engine = "unpacked"
    program = EXPORTS[how](model, x)
    assert not any("fastlora" in name for name in operators(program))
    torch.testing.assert_close(reread(program)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_export_of_a_merged_model_and_of_another_adapter():
    model, x = adapted(), torch.randn(2, 5, 8)
    fastlora.add_adapter(model, "b", config(r=3, target_modules=["q"]))
    randomise(model)
    with fastlora.use_adapters(model, "b"):
        program, expected = torch.export.export(model, (x,)), model(x)
    torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-5)
    expected = model(x)
    assert not torch.allclose(expected, program.module()(x), atol=1e-3)
    fastlora.merge(model)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_to_onnx_and_back():
    pytest.importorskip("onnxscript")
    model, x = adapted(), torch.randn(2, 5, 8)
    program = torch.onnx.export(model, (x,), dynamo=True)
    torch.testing.assert_close(program(x)[0], model(x), rtol=1e-4, atol=1e-5)


def test_what_has_no_plain_form_is_refused():
    model, x = adapted(), torch.randn(2, 5, 8)
    ids = torch.tensor([0, 1])
    fastlora.add_adapter(model, "b", config(r=3, target_modules=["q"]))
    with fastlora.use_adapters(model, ids):
        with pytest.raises(ValueError, match="model: expected one adapter for all rows under torch.func"):
            grad(loss_of(model))(trained(model), x)
        model(x)
    with fastlora.track(model.train(), warmup=1):
        with pytest.raises(ValueError, match="model: expected no tracker to be open under torch.func"):
            grad(loss_of(model))(trained(model), x)


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("options", [{}, {"accelerate_frozen": True}])
def test_gradients_that_autograd_batches_are_those_one_by_one(kind, options):
    model, x = adapted(kind, **options), torch.randn(2, 3, 8, requires_grad=True)
    model(x)  # from the second forward on, q, k and v are one call
    with fastlora.disable_adapters(model):
        assert torch.autograd.functional.jacobian(model, x, vectorize=True).shape == (2, 3, 8, 2, 3, 8)
    leaves, weights = [x, *trained(model).values()], torch.randn(4, 2, 3, 8)
    y = model(x)
    batched = torch.autograd.grad(y, leaves, weights, is_grads_batched=True, retain_graph=True)
    for i, weight in enumerate(weights):
        single = torch.autograd.grad(y, leaves, weight, retain_graph=True)
        for many, one in zip(batched, single, strict=True):
            assert (many[i] - one).abs().max() <= 16 * torch.finfo(one.dtype).eps * one.abs().max()


def test_gradients_that_autograd_batches_under_dropout_in_a_mixed_batch_and_with_a_tracker():
    model, x = adapted(), torch.randn(2, 3, 8, requires_grad=True)
    fastlora.add_adapter(model, "b", config(r=3, target_modules=["q", "v"], lora_dropout=0.5))
    randomise(model).train()
    model(x)
    leaves = [x, *trained(model).values()]
    with fastlora.track(model, probes=2), fastlora.use_adapters(model, ["b", "default"]):
        for _ in range(2):
            y, weights = model(x), torch.randn(3, 2, 3, 8)
            batched = torch.autograd.grad(
                y, leaves, weights, is_grads_batched=True, retain_graph=True, allow_unused=True
            )
            for i, weight in enumerate(weights):
                single = torch.autograd.grad(y, leaves, weight, retain_graph=True, allow_unused=True)
                for many, one in zip(batched, single, strict=True):
                    assert (many is None) == (one is None)
                    assert many is None or torch.allclose(many[i], one, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", MODELS)
def test_decomposed_as_onnx_takes_it_only_core_operators_are_left(kind):
    """What ``torch.onnx.export(dynamo=True)`` does first: export, then decompositions; the same numbers after them."""
    model, x = adapted(kind), torch.randn(2, 5, 8)
    program = torch.export.export(model, (x,)).run_decompositions()
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    calls = {target for target in called if target is not operator.getitem}
    assert calls and all(isinstance(target, torch._ops.OpOverload) for target in calls)
    assert {target.namespace for target in calls} == {"aten"}
    written = {target for target in calls if target._schema.is_mutable}
    assert not written, "ONNX has no operator that writes into its operands"
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)
    names = {node.target for node in program.graph.nodes if node.op == "placeholder"}
    assert sum("lora_" in name for name in names) == sum("lora_" in name for name, _ in model.named_parameters())
