"""FLOP counters see adapted layers: as many as of the same layers in torch's own operators."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support.helpers import config, randomise
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastlora


class Plain(nn.Module):
    """LoRA as one writes it in torch."""

    def __init__(self, layer):
        super().__init__()
        self.base = copy.deepcopy(layer)
        self.A, self.B = nn.Parameter(layer.lora_A.default.weight), nn.Parameter(layer.lora_B.default.weight)

    def forward(self, x):
        return F.linear(x, self.base.weight, self.base.bias) + F.linear(F.linear(x, self.A), self.B)


class Three(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x):
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


def counted(run, model, x):
    with FlopCounterMode(display=False) as counter:
        run(model, x)
    return counter.get_total_flops()


def forward(model, x):
    with torch.no_grad():
        model(x)


def inference(model, x):
    with torch.inference_mode():
        model(x.clone())


def step(model, x):
    model(x.clone().requires_grad_()).sum().backward()


@pytest.mark.parametrize("run", [forward, inference, step])
def test_an_adapted_group_counts_as_its_formula_in_torch(run):
    torch.manual_seed(0)
    x, ours = torch.randn(2, 5, 16), randomise(fastlora.inject(Three(), config(r=3, target_modules=["q", "k", "v"])))
    theirs = copy.deepcopy(ours)
    for name in "qkv":
        setattr(theirs, name, Plain(getattr(ours, name)))
    theirs.requires_grad_(False)
    for name in "qkv":
        getattr(theirs, name).A.requires_grad_()
        getattr(theirs, name).B.requires_grad_()
    for _ in range(2):  # the first forward runs the projections one by one
        assert counted(run, ours, x) == counted(run, theirs, x) > 2 * 10 * 16 * 32


def test_a_frozen_linear_and_a_mixed_batch_count():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    fastlora.inject(model, config(r=3, target_modules=["0"]), accelerate_frozen=True)
    fastlora.add_adapter(model, "b", config(r=5, target_modules=["0"]))
    base, x = 2 * 4 * (16 * 16 + 16 * 4), torch.randn(4, 16)
    assert counted(forward, model, x) == base + 2 * 4 * 3 * 32
    with fastlora.use_adapters(model, ["default", "b", "b", "b"]):
        assert counted(forward, model, x) == base + 2 * 4 * 5 * 32


def test_the_statistics_count():
    model = randomise(fastlora.inject(nn.Sequential(nn.Linear(16, 8)), config(r=3, target_modules=["0"])))
    x = torch.randn(4, 16)
    plain = counted(step, model, x)
    with fastlora.track(model, probes=2):
        assert counted(step, model, x) >= plain + 2 * 4 * 8 * 2
