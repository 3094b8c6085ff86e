"""Adapter files of every model family: PEFT loads ours with the same output, and we load PEFT's."""

from __future__ import annotations

import functools
import logging

import pytest
import torch
from safetensors.torch import load_file
from support.helpers import config, randomise, said
from support.model_zoo import ZOO, build
from support.peft_zoo_help import FUSED, assert_equal, for_peft, output
from torch import nn

import fastlora
from fastlora.nn.linear import adapted_layers
from fastlora.testing import enable_torchvision

enable_torchvision()
peft = pytest.importorskip("peft", minversion="0.18")

EVERY = pytest.mark.parametrize("name", ZOO)
TENSORS = "adapter_model.safetensors"


def attentions_of(model):
    return [m for m in model.modules() if isinstance(m, peft.tuners.lora.layer.MultiheadAttention)]


@functools.cache
def adds_twice() -> bool:
    """Whether this PEFT adds the update of an attention's out_proj twice (0.21.2 does; huggingface/peft#3774)."""
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 1)})
    attention = attentions_of(peft.get_peft_model(model, peft.LoraConfig(r=1, lora_alpha=1, target_modules=["attn"])))[
        0
    ]
    layer = attention.base_layer.out_proj
    with torch.no_grad():
        layer.lora_B["default"].weight.fill_(1.0)
        before = layer.get_base_layer().weight.clone()
        attention.merge()
        added = layer.get_base_layer().weight - before
    return torch.allclose(added, 2 * layer.get_delta_weight("default"))


def once(model):
    """A PEFT model whose every update counts once."""
    for attention in attentions_of(model) if adds_twice() else ():
        attention.base_layer.out_proj.scaling["default"] /= 2
    return model.eval()


@pytest.mark.parametrize("name, split", [*((name, False) for name in ZOO), *((name, True) for name in FUSED)])
def test_peft_loads_ours_and_so_do_we(name, split, tmp_path):
    model = build(name)
    fields = dict(target_modules="all-linear", split_qkv=split, rank_pattern=ZOO[name].ranks)
    randomise(fastlora.inject(model, config(**fields)), 0.1)
    expected = output(name, model)
    fastlora.save(model, tmp_path)
    theirs = once(peft.PeftModel.from_pretrained(for_peft(name), str(tmp_path)))
    assert_equal(output(name, theirs.base_model.model), expected)
    mine = fastlora.load(build(name), tmp_path)
    assert torch.equal(output(name, mine), expected)
    layers, loaded = adapted_layers(model), adapted_layers(mine)
    assert {n: m.ranks() for n, m in loaded.items()} == {n: m.ranks() for n, m in layers.items()}


def trained_by_peft(model, path, **fields):
    theirs = once(peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=5, **fields)))
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "lora_B" in key or (key.endswith("bias") and parameter.requires_grad):
                parameter.normal_(std=0.1)
    theirs.save_pretrained(str(path))
    return theirs.base_model.model


@EVERY
def test_we_load_what_peft_saved(name, tmp_path):
    theirs = trained_by_peft(for_peft(name), tmp_path, target_modules=list(ZOO[name].peft))
    mine = fastlora.load(build(name), tmp_path)
    expected = output(name, theirs)
    assert not torch.allclose(expected, output(name, build(name)), rtol=1e-3)
    assert_equal(output(name, mine), expected)


class Tower(nn.Module):
    """An attention module beside a linear of the same name elsewhere."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.other = nn.ModuleDict({"attn": nn.Linear(16, 16)})

    def forward(self, x):
        return self.other["attn"](self.attn(x, x, x, need_weights=False)[0])


def tower(**fields):
    model = fastlora.inject(Tower().eval(), config(**fields))
    return randomise(model)


@torch.no_grad()
def run(model):
    return model(torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1)))


class TestAttention:
    def test_keys_are_peft_s(self, tmp_path):
        trained_by_peft(Tower(), tmp_path / "theirs", target_modules=["attn"])
        fastlora.save(tower(target_modules=["attn"], r=3), tmp_path / "ours")
        theirs, ours = (load_file(tmp_path / who / TENSORS) for who in ("theirs", "ours"))
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
        assert "base_model.model.attn.base_layer.out_proj.lora_A.weight" in ours

    @pytest.mark.parametrize(
        "fields",
        [
            {"target_modules": "qkv"},
            {"target_modules": "attention", "rank_pattern": {"attn.in_proj[k]": 0, "out_proj": 2}},
            {"target_modules": ["out_proj"], "lora_alpha": 3},
            {"target_modules": ["in_proj"], "split_qkv": False},
            {"target_modules": ["attn"], "alpha_pattern": {"out_proj": 5, "other.attn": 7}},
            {"target_modules": "attention", "rank_pattern": {"in_proj": 1, "out_proj": 7}, "scale": "per_rank"},
        ],
    )
    @pytest.mark.parametrize("fold", [False, True])
    def test_projections_of_different_ranks_and_scales(self, fields, fold, tmp_path):
        model = tower(**fields)
        fastlora.save(model, tmp_path, fold_scale=fold)
        mine = fastlora.load(Tower().eval(), tmp_path)
        assert {n: m.ranks() for n, m in adapted_layers(mine).items()} == {
            n: m.ranks() for n, m in adapted_layers(model).items() if any(m.ranks().values())
        }
        torch.testing.assert_close(run(mine), run(model), rtol=1e-5, atol=1e-6)
        theirs = once(peft.PeftModel.from_pretrained(Tower(), str(tmp_path)))
        assert_equal(run(theirs), run(model))
        again = tower(**fields)
        torch.testing.assert_close(run(fastlora.load(again, tmp_path)), run(model), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("bias", ["all", "lora_only"])
    def test_biases(self, bias, tmp_path):
        theirs = trained_by_peft(Tower(), tmp_path / "theirs", target_modules=["attn"], bias=bias)
        mine = fastlora.load(Tower().eval(), tmp_path / "theirs")
        assert_equal(run(mine), run(theirs))
        assert not mine.attn.in_proj_bias.requires_grad and mine.attn.out_proj.bias.requires_grad
        fastlora.save(mine, tmp_path / "ours")
        assert_equal(run(once(peft.PeftModel.from_pretrained(Tower(), str(tmp_path / "ours")))), run(mine))

    def test_rank_and_alpha_patterns_name_the_attention(self, tmp_path):
        patterns = dict(rank_pattern={"^attn": 2}, alpha_pattern={"^attn": 3})
        theirs = trained_by_peft(Tower(), tmp_path, target_modules=["attn"], **patterns)
        assert_equal(run(fastlora.load(Tower().eval(), tmp_path)), run(theirs))
        settings = peft.LoraConfig(r=3, target_modules=["attn"], **patterns)
        layers = adapted_layers(fastlora.inject(Tower(), settings))
        assert {n: m.ranks()["weight"] for n, m in layers.items()} == {
            "attn.in_proj": 2, "attn.out_proj": 2, "other.attn": 3
        }  # fmt: skip

    def test_a_file_that_was_trained_with_out_proj_counted_twice(self, tmp_path, caplog):
        trained_by_peft(Tower(), tmp_path, target_modules=["attn"])
        with caplog.at_level(logging.WARNING):
            fastlora.load(Tower(), tmp_path)
        assert "counts the update of out_proj twice" in caplog.text and "attn" in caplog.text
        fastlora.save(tower(target_modules=["attn"]), tmp_path)
        caplog.clear()
        fastlora.load(Tower(), tmp_path)
        assert not said(caplog)

    def test_a_missing_half_is_named(self, tmp_path):
        from safetensors.torch import save_file

        trained_by_peft(Tower(), tmp_path, target_modules=["attn"])
        tensors = {k: v for k, v in load_file(tmp_path / TENSORS).items() if "out_proj" not in k}
        save_file(tensors, tmp_path / TENSORS)
        with pytest.raises(ValueError, match="missing: adapters of attn.base_layer.out_proj"):
            fastlora.load(Tower(), tmp_path)


def test_conv1d_says_that_its_weight_is_transposed(tmp_path):
    import json

    model = fastlora.inject(build("gpt2"), config(target_modules="attention"))
    fastlora.save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    settings = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    assert len(adapted_layers(fastlora.inject(build("gpt2"), settings))) == 2
