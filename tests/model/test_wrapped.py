"""Models that others replicate, dispatch or offload run with their adapters, or are refused."""

from __future__ import annotations

import copy
import functools
import sys
import types

import pytest
import torch
from torch import nn

import fastlora
from fastlora import LoraConfig

X = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def config(*targets, **fields):
    return LoraConfig(r=4, target_modules=list(targets or "a"), init_lora_weights=False, **fields)


def replicas(model, monkeypatch):
    """What ``nn.DataParallel`` makes of a model, with copies on one device in place of broadcasts to several."""
    module = sys.modules["torch.nn.parallel.replicate"]

    def copies(tensors, devices, detach=False):
        return [[t.clone() for t in tensors] for _ in devices]

    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copies)
    monkeypatch.setattr(module, "_get_device_index", lambda device, *_, **__: device)
    return module.replicate(model, [0, 1])


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_replicas_of_data_parallel(backend, monkeypatch):
    model = fastlora.inject(Net(), config("a", "b", backend=backend))
    model(X).square().sum().backward()
    want = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    y = model(X)
    model.zero_grad()
    halves = [replica(x) for replica, x in zip(replicas(model, monkeypatch), X.split([2, 3]), strict=True)]
    torch.testing.assert_close(torch.cat(halves), y)
    torch.cat(halves).square().sum().backward()
    for name, parameter in model.named_parameters():
        if name in want:
            torch.testing.assert_close(parameter.grad, want[name])


def dispatched(model):
    hooks = pytest.importorskip("accelerate")
    return hooks.dispatch_model(model, {"a": "cpu", "b": "cpu"}, main_device="cpu", force_hooks=True)


def test_adapters_on_a_dispatched_model(tmp_path):
    want = fastlora.inject(Net(), config())
    fastlora.save(want, tmp_path)
    model = fastlora.load(dispatched(Net()), tmp_path)
    torch.testing.assert_close(model(X), want(X))
    assert "forward" in vars(model.a) and hasattr(model.a, "_hf_hook")  # accelerate's hooks still run
    torch.testing.assert_close(copy.deepcopy(model)(X), want(X))


def test_hooks_that_accelerate_took_off_again():
    hooks = pytest.importorskip("accelerate.hooks")
    base = dispatched(Net())
    hooks.remove_hook_from_module(base, recurse=True)
    assert "forward" in vars(base.a)  # the class's own, kept on the instance
    plain = Net()
    torch.manual_seed(1)
    want = fastlora.inject(plain, config())(X)
    torch.manual_seed(1)
    torch.testing.assert_close(fastlora.inject(base, config())(X), want)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_offloading_an_adapted_model_and_back(backend):
    accelerate = pytest.importorskip("accelerate")
    model = fastlora.inject(Net(), config(backend=backend))
    want, weight = model(X).detach(), model.a.weight.clone()
    accelerate.cpu_offload(model, execution_device="cpu")
    assert model.a.weight.is_meta
    with torch.no_grad():
        torch.testing.assert_close(model(X), want)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert torch.equal(model.a.weight, weight)
    torch.testing.assert_close(model(X), want)


class Attended(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2)

    def forward(self, x):
        return self.attn(x, x, x, need_weights=False)[0]


def test_the_owner_and_its_projection_are_called_with_hooks_too():
    hooks = pytest.importorskip("accelerate.hooks")
    torch.manual_seed(0)
    base = Attended()
    model = copy.deepcopy(base)
    for module in (model.attn, model.attn.out_proj):
        hooks.add_hook_to_module(module, hooks.ModelHook())
    torch.manual_seed(1)
    fastlora.inject(model, config("attn"))
    torch.manual_seed(1)
    want = fastlora.inject(copy.deepcopy(base), config("attn"))(X)
    assert not torch.allclose(want, base(X))
    torch.testing.assert_close(model(X), want)


def test_ejected_layers_run_with_the_hooks_of_others():
    model, hooks = fastlora.inject(Net(), config()), pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(model.a, hooks.ModelHook())
    torch.testing.assert_close(fastlora.model.eject.eject(model)(X), Net()(X))


class TestRefused:
    @pytest.mark.parametrize("way", ["function", "method", "partial"])
    def test_a_forward_that_was_replaced(self, way):
        model = Net()
        inner = model.a.forward
        model.a.forward = {
            "function": lambda x: 2 * inner(x),
            "method": types.MethodType(lambda self, x: 2 * inner(x), model.a),
            "partial": functools.partial(lambda m, x: 2 * inner(x), model.a),
        }[way]
        want = model(X)
        with pytest.raises(ValueError, match="'a' cannot be adapted: the forward of this Linear was replaced by"):
            fastlora.inject(model, config())
        assert type(model.a) is nn.Linear and torch.equal(model(X), want)
        fastlora.inject(model, config("b"))

    def test_an_attention_whose_forward_was_replaced(self):
        model = Attended()
        model.attn.forward = functools.partial(nn.MultiheadAttention.forward, model.attn)
        with pytest.raises(ValueError, match="the forward of this MultiheadAttention was replaced by"):
            fastlora.inject(model, config("attn"))

    def test_a_weight_that_is_elsewhere(self):
        model = pytest.importorskip("accelerate").cpu_offload(Net(), execution_device="cpu")
        with pytest.raises(ValueError, match="'a' cannot be adapted: accelerate has offloaded its weight"):
            fastlora.inject(model, config())
