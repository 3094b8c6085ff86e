"""Adapter files of every model family: PEFT loads ours with the same output, and we load PEFT's."""

from __future__ import annotations

import pytest
import torch
from helpers import config, randomise
from model_zoo import ZOO, build

import fastlora
from fastlora.nn.linear import adapted_layers
from fastlora.testing import enable_torchvision

enable_torchvision()
peft = pytest.importorskip("peft", minversion="0.18")

EVERY = pytest.mark.parametrize("name", ZOO)


@torch.no_grad()
def output(name, model):
    return ZOO[name].run(model)


def assert_equal(mine, other):
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


@EVERY
@pytest.mark.parametrize("split", [True, False])
def test_peft_loads_ours_and_so_do_we(name, split, tmp_path):
    model = build(name)
    fields = dict(target_modules="all-linear", split_qkv=split, rank_pattern=ZOO[name].ranks)
    randomise(fastlora.inject(model, config(**fields)), 0.1)
    expected = output(name, model)
    fastlora.save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(build(name), str(tmp_path)).eval()
    assert_equal(output(name, theirs.base_model.model), expected)
    mine = fastlora.load(build(name), tmp_path)
    assert torch.equal(output(name, mine), expected)
    layers, loaded = adapted_layers(model), adapted_layers(mine)
    assert {n: m.ranks() for n, m in loaded.items()} == {n: m.ranks() for n, m in layers.items()}


@EVERY
def test_we_load_what_peft_saved(name, tmp_path):
    settings = peft.LoraConfig(r=3, lora_alpha=5, target_modules=list(ZOO[name].peft))
    theirs = peft.get_peft_model(build(name), settings).eval()
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.1)
    theirs.save_pretrained(str(tmp_path))
    mine = fastlora.load(build(name), tmp_path)
    expected = output(name, theirs.base_model.model)
    assert not torch.allclose(expected, output(name, build(name)), rtol=1e-3)
    assert_equal(output(name, mine), expected)
