"""Factors that a parametrization or pruning computes: read as they run, written by nobody."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune, weight_norm

import fastlora
from fastlora import LoraConfig

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


class Doubled(nn.Module):
    def forward(self, w):
        return 2 * w


def doubled(factors):
    parametrize.register_parametrization(factors, "weight", Doubled())


def pruned(factors):
    """What is trained after it changes is seen by the next call alone."""
    prune.l1_unstructured(factors, "weight", 0.5)
    with torch.no_grad():
        factors.weight_orig.add_(1)


def normed(factors):
    weight_norm(factors)
    with torch.no_grad():
        factors.weight_g.add_(1)


KINDS = {"parametrized": doubled, "pruned": pruned, "weight_norm": normed}


def adapted(kind=None, side="lora_A", **fields):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    model = fastlora.inject(model, LoraConfig(r=2, target_modules=["0", "1"], **fields))
    if kind is not None:
        KINDS[kind](getattr(model[0], side)["default"])
    return model.eval()


def loss(model, x):
    return model(x).square().sum()


EYES = {"0": torch.eye(6), "1": torch.eye(6)}
WRITERS = {
    "corda": lambda model: fastlora.initialize_corda(model, EYES),
    "lora_ga": lambda model: fastlora.initialize_lora_ga(model, [X], loss, steps=1),
    "eva": lambda model: fastlora.initialize_eva(model, EYES),
    "set_ranks": lambda model: fastlora.set_ranks(model, {"1": 3, "0": 3}),
    "set_ranks, keep": lambda model: fastlora.set_ranks(model, {"1": 3, "0": 3}, keep=True),
    "set_ranks, reinit": lambda model: fastlora.set_ranks(model, {"1": 3, "0": 3}, reinit=True),
}


@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
@pytest.mark.parametrize("verb", WRITERS)
@pytest.mark.parametrize("kind", ["parametrized", "pruned"])
def test_writers_refuse_and_leave_the_model_as_it_was(kind, verb, side):
    side = "lora_A" if verb == "eva" else side  # which writes no other
    model = adapted()
    factors = getattr(model[0], side)["default"]
    # B is still zero.
    doubled(factors) if kind == "parametrized" else prune.l1_unstructured(factors, "weight", 0.5)
    expected, state = model(X).detach(), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="adapter: the factors of 'default' are parametrized or pruned"):
        WRITERS[verb](model)
    assert torch.equal(model(X), expected)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert model[0].ranks() == model[1].ranks() == {"weight": 2}


def test_eva_looks_at_the_b_that_runs():
    model = adapted("pruned", "lora_B")
    with pytest.raises(ValueError, match=r"'0' has been trained \(B is not zero\)"):
        fastlora.initialize_eva(model, EYES)


def test_other_matrices_get_other_ranks():
    model = adapted("parametrized")
    expected = model(X).detach()
    assert torch.equal(fastlora.set_ranks(model, {"1": 3})(X), expected)
    assert model[1].ranks() == {"weight": 3}


@pytest.mark.parametrize("name", ["bias", "magnitude"])
def test_what_stands_beside_them(name):
    model = adapted(lora_bias=name == "bias", use_dora=name == "magnitude")
    parametrize.register_parametrization(model[0].lora_B["default"], name, Doubled())
    with pytest.raises(ValueError, match="adapter: the factors of 'default' are parametrized or pruned"):
        fastlora.set_ranks(model, {"0": 3})


@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
@pytest.mark.parametrize("kind", KINDS)
class TestReaders:
    def test_files_hold_what_runs(self, kind, side, tmp_path):
        model = adapted(kind, side, init_lora_weights=False)
        fastlora.save(model, tmp_path)
        base = nn.Sequential(*[nn.Linear(6, n) for n in (6, 6, 3)])
        with fastlora.disable_adapters(model):
            base.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" not in k})
        expected = model(X)
        torch.testing.assert_close(fastlora.load(base, tmp_path)(X), expected)

    def test_peft_gets_what_runs(self, kind, side):
        model = adapted(kind, side, init_lora_weights=False)
        handed = fastlora.to_peft(model)
        torch.testing.assert_close(handed(X), model(X))
        assert all(p.is_leaf for p in handed.parameters())

    def test_a_combination_is_of_what_runs(self, kind, side):
        model = adapted(kind, side, init_lora_weights=False)
        fastlora.add_weighted_adapter(model, ["default"], [1.0], adapter_name="w")
        expected = model(X)
        torch.testing.assert_close(fastlora.set_adapter(model, "w")(X), expected)
