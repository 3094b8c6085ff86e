"""``bias="lora_only"`` where a target has no rank (any more): what was trained of its bias is saved and loaded."""

from __future__ import annotations

import json

import pytest
import torch
from peft_help import CONFIG, TENSORS, assert_close, logits, make_vit, peft, train
from safetensors.torch import load_file

import fastlora
from fastlora.nn.linear import adapted_layers

PATH = "blocks.1.attn.qkv"
KEY = f"base_model.model.{PATH}.bias"
FIELDS = dict(r=3, lora_alpha=6, target_modules=["qkv"], bias="lora_only")


def at_first():
    """Without a rank from the start."""
    model = fastlora.inject(make_vit(), fastlora.LoraConfig(**FIELDS, rank_pattern={PATH: 0}))
    return train(model)


def later():
    """Its rank went to zero when it had been trained."""
    model = fastlora.inject(make_vit(), fastlora.LoraConfig(**FIELDS))
    train(model)
    return fastlora.set_ranks(model, {PATH: 0}, keep=True)


EVERY = pytest.mark.parametrize("make", [at_first, later])


def bias_of(model):
    return model.get_submodule(PATH).bias


@EVERY
def test_nothing_is_lost(make, tmp_path):
    model = make()
    assert not torch.equal(bias_of(model), bias_of(make_vit())) and bias_of(model).requires_grad
    fastlora.save(model, tmp_path / "a")
    assert KEY in load_file(tmp_path / "a" / TENSORS)
    loaded = fastlora.load(make_vit(), tmp_path / "a")
    assert torch.equal(bias_of(loaded), bias_of(model)) and bias_of(loaded).requires_grad
    assert PATH not in adapted_layers(loaded)
    assert_close(logits(loaded), logits(model))
    # Frozen for inference and saved again: still there.
    loaded.requires_grad_(False)
    fastlora.save(loaded, tmp_path / "b")
    assert (tmp_path / "b" / TENSORS).read_bytes() == (tmp_path / "a" / TENSORS).read_bytes()


@EVERY
def test_peft_takes_it(make, tmp_path):
    model = make()
    fastlora.save(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["bias"] == "lora_only"
    theirs = peft.PeftModel.from_pretrained(make_vit(), str(tmp_path))
    assert_close(logits(theirs), logits(model))
    assert_close(logits(fastlora.to_peft(model)), logits(model))


def test_a_model_that_has_the_adapter_takes_it_or_says_what_differs(tmp_path):
    model = later()
    fastlora.save(model, tmp_path / "a")
    other = at_first()
    fastlora.load(other, tmp_path / "a")
    assert torch.equal(bias_of(other), bias_of(model))
    without = fastlora.inject(make_vit(), fastlora.LoraConfig(**{**FIELDS, "target_modules": ["blocks.0.attn.qkv"]}))
    before = bias_of(without).clone()
    with pytest.raises(ValueError, match=f"{PATH}.bias is trained in the file and not in the model"):
        fastlora.load(without, tmp_path / "a")
    assert torch.equal(bias_of(without), before)
    fastlora.save(without, tmp_path / "b")
    with pytest.raises(ValueError, match=f"{PATH}.bias is trained in the model and not in the file"):
        fastlora.load(other, tmp_path / "b")


def test_what_was_frozen_stays_frozen(tmp_path):
    fastlora.save(later(), tmp_path)
    model = make_vit()
    bias_of(model).requires_grad_(False)
    fastlora.load(model, tmp_path)
    assert not bias_of(model).requires_grad


def test_without_biases_nothing_changes(tmp_path):
    model = fastlora.inject(make_vit(), fastlora.LoraConfig(**{**FIELDS, "bias": "none"}, rank_pattern={PATH: 0}))
    fastlora.save(model, tmp_path)
    assert not any(key.endswith(".bias") for key in load_file(tmp_path / TENSORS))
    assert not bias_of(model).requires_grad
