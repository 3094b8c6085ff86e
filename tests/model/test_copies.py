"""Copies of a model whose weights torch's parametrizations compute, and what is made in inference mode."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fastlora
from fastlora import LoraConfig
from fastlora.nn.linear import adapted_layers

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(2, 5, 8, generator=GENERATOR)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return torch.softmax(self.q_proj(x) @ self.k_proj(x).mT, -1) @ self.v_proj(x)


class Torchs(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attn(x, x, x, need_weights=False)[0]


class Others(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.conv = nn.Embedding(11, 8), nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.conv((x + self.words(torch.arange(x.shape[1]))).mT).mT


MODELS = {"linear": lambda: nn.Sequential(nn.Linear(8, 8)), "siblings": Attention, "torch": Torchs, "others": Others}


def adapted(kind):
    torch.manual_seed(0)
    targets = {"others": ["words", "conv"]}.get(kind, "all-linear")
    return fastlora.inject(MODELS[kind](), LoraConfig(r=2, target_modules=targets, init_lora_weights=False))


def normed(model):
    """Every weight is computed, also the one that torch's attention has for its layer."""
    for layer in adapted_layers(model).values():
        if "weight" in layer._parameters:
            parametrizations.weight_norm(layer)
    if hasattr(model, "attn"):
        parametrizations.weight_norm(model.attn, "in_proj_weight")
    return model


def run(model, tracked=False):
    if tracked:
        tracker = fastlora.track(model, every=1)
    model(X).square().sum().backward()
    if tracked:
        tracker.step()
    return model.zero_grad() or model


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: torch.optim.swa_utils.AveragedModel(model).module])
@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_with_computed_weights_that_ran_is_copied(kind, tracked, make):
    model = run(normed(adapted(kind)), tracked and kind != "others")
    other = make(model)
    torch.testing.assert_close(other(X), model(X))
    assert not any(layer.probes for layer in adapted_layers(other).values())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    assert not torch.allclose(other(X), model(X))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert own.isdisjoint(p.untyped_storage().data_ptr() for p in other.parameters())
    for path, layer in adapted_layers(other).items():
        assert parametrize.is_parametrized(layer) == parametrize.is_parametrized(adapted_layers(model)[path])


def learned(model):
    """Outside of inference mode, whatever was made inside takes part in training and is written to."""
    model.requires_grad_().zero_grad()
    model(X).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.load_state_dict(model.state_dict())
    return not any(t.is_inference() for t in (*model.parameters(), *model.buffers()))


COVARIANCES = {"0": torch.eye(8)}
MADE = {
    "add_weighted_adapter": lambda model: fastlora.set_adapter(
        fastlora.add_weighted_adapter(model, ["default"], [1.0], adapter_name="w"), "w"
    ),
    "to_peft": fastlora.to_peft,
    "from_peft": lambda model: fastlora.from_peft(fastlora.to_peft(model)),
    "load_layout": lambda model: fastlora.load_layout(
        nn.Sequential(model[0]), {"0.lora_A": torch.ones(2, 8), "0.lora_B": torch.ones(8, 2)}, "loralib", lora_alpha=2
    ),
    "initialize_corda": lambda model: fastlora.initialize_corda(model, COVARIANCES),
    "initialize_eva": lambda model: fastlora.initialize_eva(model, COVARIANCES),
    "add_adapter": lambda model: fastlora.set_adapter(
        fastlora.add_adapter(model, "b", LoraConfig(r=2, target_modules=["0"])), "b"
    ),
    "set_ranks": lambda model: fastlora.set_ranks(model, {"0": 3}),
    "merge": lambda model: fastlora.unmerge(fastlora.merge(model)),
    "merge_and_unload": fastlora.merge_and_unload,
}


@pytest.mark.parametrize("verb", MADE)
def test_what_is_made_in_inference_mode_learns(verb):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8))
    if verb != "load_layout":
        model = fastlora.inject(model, LoraConfig(r=2, target_modules=["0"], bias="all"))
    with torch.inference_mode():
        made = MADE[verb](model)
    assert learned(made)
