"""``set_ranks(keep=True)`` keeps what was learned, whatever becomes of the scale."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from support.experts_zoo import loss_of, moe, ranks_of
from support.helpers import config, randomise
from torch import nn

import fastlora
from fastlora.nn.linear import adapted_layers

X = torch.arange(8).view(2, 4)
KEYS = ("embed", "conv", "qkv[q]", "qkv[k]", "down")


class Mixed(nn.Module):
    """An embedding, a convolution, a fused matrix and a linear."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.conv = nn.Embedding(9, 8), nn.Conv1d(8, 8, 3, padding=1)
        self.qkv, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x):
        return self.down(self.qkv(self.conv(self.embed(x).transpose(1, 2)).transpose(1, 2)).tanh())


def learned(**fields):
    split = {"qkv": {"q": 8, "k": 8, "v": 8}}
    fields = dict(dict(target_modules=["embed", "conv", "qkv", "down"], split_qkv=split, scale="per_rank"), **fields)
    if {"use_dora", "lora_bias"} & set(fields) or fields.get("init_lora_weights") == "orthogonal":
        fields["target_modules"] = ["qkv", "down"]
    return moved(fastlora.inject(Mixed().double(), config(adapter_dtype=torch.float64, **fields)))


@torch.no_grad()
def moved(model):
    """Every factor somewhere else, and what stands beside it."""
    for name, p in model.named_parameters():
        if ".lora_" in name:
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype), alpha=0.2)
    return model


def deltas(model):
    return {path: layer.delta() for path, layer in adapted_layers(model).items()}


FIELDS = [
    {},
    dict(use_rslora=True),
    dict(alpha_pattern={"down": 3, "qkv[k]": -5, "conv": 0}),
    dict(use_dora=True),
    dict(lora_bias=True),
    dict(lora_bias=True, alpha_pattern={"qkv[q]": 20}),
    dict(init_lora_weights=False),
    dict(init_lora_weights="orthogonal"),
    dict(scale="constant", lora_bias=True, alpha_pattern={"qkv[k]": 20}, rank_pattern={"qkv[k]": 0}),
]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_what_grows_computes_what_it_did(fields):
    model = learned(**fields)
    keys = [row.key for row in fastlora.summary(model).rows]
    before, y = deltas(model), model(X).detach()
    fastlora.set_ranks(model, {key: 6 for key in KEYS if key in keys}, keep=True)
    torch.testing.assert_close(deltas(model), before)
    torch.testing.assert_close(model(X), y)
    grown = {row.key: row.rank for row in fastlora.summary(model).rows}
    assert all(grown[key] == (6 if key in KEYS else 4) for key in keys)
    model(X).square().mean().backward()
    assert model.down.lora_B["default"].weight.grad[:, 4:].any()
    assert "embed" not in keys or model.embed.lora_A["default"].weight.grad[4:].any()


@pytest.mark.parametrize("fields", FIELDS[:3], ids=str)
def test_what_shrinks_keeps_the_first_columns(fields):
    model = learned(**fields)
    layers = adapted_layers(model)
    kept = {path: [s * b[:, :3] @ a[:3] for a, b, s in layer.pairs()] for path, layer in layers.items()}
    fastlora.set_ranks(model, dict.fromkeys([row.key for row in fastlora.summary(model).rows], 3), keep=True)
    for path, layer in layers.items():
        torch.testing.assert_close([s * b @ a for a, b, s in layer.pairs()], kept[path])


def test_a_bias_of_slices_that_lose_the_largest_scale():
    model = learned(lora_bias=True, alpha_pattern={"qkv[q]": 20})
    bias = model.qkv.bias_scale("default") * model.qkv.lora_B["default"].bias.detach()
    fastlora.set_ranks(model, {"qkv[q]": 0, "qkv[v]": 2}, keep=True)
    torch.testing.assert_close(model.qkv.bias_scale("default") * model.qkv.lora_B["default"].bias, bias)
    fastlora.set_ranks(model, {"qkv[k]": 0, "qkv[v]": 0}, keep=True)  # the last that the layer had
    assert not model.qkv.lora_B["default"].beside()
    fastlora.set_ranks(model, {"qkv[q]": 5}, keep=True)
    assert not model.qkv.lora_B["default"].bias.any()


def test_a_model_from_peft_s_config_and_file(tmp_path):
    given = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["qkv", "down"])
    model = moved(fastlora.inject(Mixed(), given))
    fastlora.save(model, tmp_path)
    for extra in tmp_path.glob("fastlora*"):
        extra.unlink()
    for each in (model, fastlora.load(Mixed(), tmp_path)):
        y = each(X).detach()
        fastlora.set_ranks(each, {"qkv": 8, "down": 6}, keep=True)
        torch.testing.assert_close(each(X), y)


def test_experts():
    model = moe()
    fields = dict(r=4, target_modules="experts", scale="per_rank", adapter_dtype=torch.float64)
    model = moved(fastlora.inject(model, config(**fields)))
    loss = loss_of(model).detach()
    experts = {key: 4 + rank for key, rank in ranks_of(model, adapted_layers(model)).items()}
    fastlora.set_ranks(model, experts, keep=True)
    torch.testing.assert_close(loss_of(model), loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_few_bits(dtype):
    """A ratio that is a power of two costs no bit."""
    model = moved(fastlora.inject(Mixed(), config(target_modules=["down"], scale="per_rank", adapter_dtype=dtype)))
    before = model.down.delta()
    fastlora.set_ranks(model, {"down": 8}, keep=True)
    assert model.down.lora_B["default"].weight.dtype == dtype and torch.equal(model.down.delta(), before)


def test_reallocate_keeps():
    model = moved(fastlora.inject(Mixed(), config(target_modules=["down", "embed"], scale="per_rank")))
    by_hand = copy.deepcopy(model)
    with pytest.raises(ValueError, match="pass reinit=True to start it afresh, or keep=True"):
        fastlora.reallocate(model, {"down": 3.0, "embed": 1.0})
    ranks = fastlora.reallocate(model, {"down": 3.0, "embed": 1.0}, keep=True)
    assert ranks == {"down": 6, "embed": 2}
    fastlora.set_ranks(by_hand, ranks, keep=True)
    assert torch.equal(model(X), by_hand(X))


class TestWhatStandsBesideB:
    """lora_bias and use_dora: no parameter that never learns, and nothing trained is lost without a word."""

    @pytest.mark.parametrize("fields, says", [(dict(lora_bias=True), "lora_bias"), (dict(use_dora=True), "magnitude")])
    def test_trained_alone(self, fields, says):
        model = fastlora.inject(nn.Sequential(nn.Linear(6, 6)), config(r=2, target_modules=["0"], **fields))
        fastlora.set_ranks(model, {"0": 3})  # nothing has been trained
        with torch.no_grad():
            next(iter(model[0].lora_B["default"].beside().values())).add_(0.1)
        before = model.state_dict()
        for rank in (0, 2):
            with pytest.raises(ValueError, match=f"ranks: '0' has been trained .*{says}.*pass reinit=True"):
                fastlora.set_ranks(model, {"0": rank})
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())

    @pytest.mark.parametrize("fields", [dict(lora_bias=True), dict(use_dora=True)])
    def test_rank_0(self, fields, tmp_path):
        def parameters():
            return {n for n, p in model.named_parameters() if p.requires_grad}

        torch.manual_seed(0)
        model = fastlora.inject(
            nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)),
            config(r=2, target_modules=["0", "1"], rank_pattern={"1": 0}, **fields),
        )
        whole = {f"0.{n}" for n, p in model[0].named_parameters() if p.requires_grad}
        assert parameters() == whole
        fastlora.set_ranks(model, {"0": 0, "1": 2})
        assert parameters() == {n.replace("0.", "1.", 1) for n in whole}
        fastlora.set_ranks(model, {"0": 2})
        x = torch.randn(3, 6)
        with fastlora.disable_adapters(model):
            base = model(x)
        torch.testing.assert_close(model(x), base)
        model(x).sum().backward()
        assert not [n for n in parameters() if model.get_parameter(n).grad is None]
        randomise(model)
        fastlora.set_ranks(model, {"1": 0}, reinit=True)
        fastlora.save(model, tmp_path)
        again = copy.deepcopy(fastlora.unload(copy.deepcopy(model)))
        torch.testing.assert_close(fastlora.load(again, tmp_path)(x), model(x))


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", "lora_"])
def test_what_is_frozen_stays_so_through_rank_0(frozen):
    model = fastlora.inject(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), config(r=2, target_modules=["0", "1"]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name and frozen not in name)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    fastlora.set_ranks(model, {"0": 0})
    fastlora.set_ranks(model, {"0": 3})
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
