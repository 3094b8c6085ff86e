"""Adapters handed to PEFT and taken from it in memory: the same outputs, and the giving model as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import config, randomise
from model_zoo import ZOO, build
from peft_help import Nested, assert_same, logits, snapshot, train
from test_models_peft import FUSED, assert_equal, for_peft, output, peft

import fastlora
from fastlora.model.inject import eject
from fastlora.nn.linear import adapted_layers

pytestmark = pytest.mark.filterwarnings("ignore")


def nested(**fields):
    return train(fastlora.inject(Nested(), config(**{"target_modules": ["q", "k"], **fields})))


@pytest.mark.parametrize("name, split", [*((name, False) for name in ZOO), *((name, True) for name in FUSED)])
def test_peft_gives_our_outputs(name, split):
    model = build(name)
    fields = dict(target_modules="all-linear", split_qkv=split, rank_pattern=ZOO[name].ranks)
    randomise(fastlora.inject(model, config(**fields)), 0.1)
    expected, before = output(name, model), snapshot(model)
    theirs = fastlora.to_peft(model)
    assert isinstance(theirs, peft.PeftModel)
    assert_equal(output(name, theirs.base_model.model), expected)
    assert_same(before, snapshot(model))
    back = fastlora.from_peft(theirs)
    assert_equal(output(name, back), expected)


@pytest.mark.parametrize("name", ZOO)
def test_we_give_peft_s_outputs(name):
    settings = peft.LoraConfig(r=3, lora_alpha=5, target_modules=list(ZOO[name].peft))
    theirs = peft.get_peft_model(for_peft(name), settings).eval()
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.1)
    expected = output(name, theirs.base_model.model)
    assert not torch.allclose(expected, output(name, build(name)), rtol=1e-3)
    mine = fastlora.from_peft(theirs)
    assert not any(type(m).__module__.startswith("peft") for m in mine.modules())
    assert_equal(output(name, mine), expected)
    assert_equal(output(name, theirs.base_model.model), expected)


@pytest.mark.parametrize("name", ["timm_beit", "torch_encoder", "gpt2", "bert"])
def test_eject_leaves_the_base(name):
    base = build(name).requires_grad_(False)
    model = eject(fastlora.inject(build(name), config(target_modules="all-linear"), accelerate_frozen=True))
    assert torch.equal(output(name, model), output(name, base))
    assert list(model.state_dict()) == list(base.state_dict())
    for (key, mine), (_, theirs) in zip(model.named_modules(), base.named_modules(), strict=True):
        assert type(mine) is type(theirs), key
        changed = {n for n in mine.__dict__.keys() ^ theirs.__dict__.keys() if n[0] != "_"}
        assert not changed and len(mine._forward_pre_hooks) == len(theirs._forward_pre_hooks), key
        assert len(mine._forward_hooks) == len(theirs._forward_hooks)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_heads_and_biases_go_along_and_train(bias):
    model = nested(bias=bias, modules_to_save=["head"], rank_pattern={"layer.0.q": 2}, alpha_pattern={"layer.1.k": 3})
    theirs = fastlora.to_peft(model)
    torch.testing.assert_close(logits(theirs), logits(model))
    trained = {n for n, p in theirs.named_parameters() if p.requires_grad}
    assert any("head.modules_to_save" in n for n in trained) and any("lora_A" in n for n in trained)
    before = logits(model)
    train(theirs)
    assert not torch.allclose(logits(theirs), before) and torch.equal(logits(model), before)
    expected = logits(theirs)
    mine = fastlora.from_peft(theirs)
    torch.testing.assert_close(logits(mine), expected)
    assert mine.head.weight.requires_grad and mine.layer[0]["q"].bias.requires_grad == (bias != "none")
    train(mine)
    assert not torch.allclose(logits(mine), expected) and torch.equal(logits(theirs), expected)


def test_frozen_weights_are_shared_and_modes_kept():
    model = nested().eval()
    model.layer[0].train()
    theirs = fastlora.to_peft(model).base_model.model
    assert theirs.layer[0]["q"].base_layer.weight is model.layer[0]["q"].weight
    assert theirs.layer[0]["q"].base_layer.training and not theirs.layer[1]["q"].base_layer.training
    assert theirs.layer[0]["q"].lora_A["default"].weight is not model.layer[0]["q"].lora_A["default"].weight


def test_a_model_loaded_for_inference_trains_here(tmp_path):
    fastlora.save(nested(modules_to_save=["head"], bias="all"), tmp_path)
    theirs = peft.PeftModel.from_pretrained(Nested(), str(tmp_path)).requires_grad_(False)
    mine = fastlora.from_peft(theirs)
    assert (
        mine.head.weight.requires_grad
        and mine.layer[0]["q"].bias.requires_grad
        and all(p.requires_grad for layer in adapted_layers(mine).values() for p in layer.lora_A.parameters())
    )
    assert not any(p.requires_grad for p in theirs.parameters())


def test_one_of_several_adapters():
    model = nested()
    fastlora.add_adapter(model, "b", config(target_modules=["q"], r=2))
    randomise(model)
    theirs = fastlora.to_peft(model, "b")
    fastlora.set_adapter(model, "b")
    torch.testing.assert_close(logits(theirs), logits(model))
    theirs.add_adapter("c", peft.LoraConfig(r=2, target_modules=["k"]))
    theirs.base_model.set_adapter(["b", "c"])
    with pytest.raises(ValueError, match=r"adapter: \['b', 'c'\] are active; say which"):
        fastlora.from_peft(theirs)
    torch.testing.assert_close(logits(fastlora.from_peft(theirs, "b")), logits(model))
    with pytest.raises(ValueError, match="adapter: expected one of .*got 'd'"):
        fastlora.from_peft(theirs, "d")


def test_while_a_tracker_watches():
    model = nested()
    with fastlora.track(model, every=1) as tracker:
        theirs = fastlora.to_peft(model)
        assert not any(m._forward_pre_hooks for m in theirs.base_model.model.modules())
        logits(theirs)
        model(torch.randn(2, 8)).square().sum().backward()
        tracker.step()
        assert all(value > 0 for value in tracker.scores().values())


def test_the_scale_that_runs_is_taken():
    theirs = fastlora.to_peft(nested())
    for module in theirs.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(0.5)
    torch.testing.assert_close(logits(fastlora.from_peft(theirs)), logits(theirs))


class TestRefused:
    def test_models_of_another_kind(self):
        with pytest.raises(ValueError, match="peft_model: expected a peft.PeftModel, got Nested"):
            fastlora.from_peft(Nested())
        with pytest.raises(ValueError, match="model: has no adapters"):
            fastlora.to_peft(Nested())

    def test_merged(self):
        model = nested()
        theirs = fastlora.to_peft(model)
        fastlora.merge(model)
        with pytest.raises(ValueError, match="'layer.0.q' is merged; call fastlora.unmerge first"):
            fastlora.to_peft(model)
        fastlora.unmerge(model)
        theirs.merge_adapter()
        with pytest.raises(ValueError, match=r"peft_model: .*layer.0.q' is merged; call unmerge_adapter\(\)"):
            fastlora.from_peft(theirs)

    @pytest.mark.parametrize("fields", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
    def test_variants_by_their_field(self, fields):
        theirs = peft.get_peft_model(Nested(), peft.LoraConfig(r=2, target_modules=["q"], **fields))
        with pytest.raises(ValueError, match=next(iter(fields))):
            fastlora.from_peft(theirs)
        other = peft.get_peft_model(Nested(), peft.IA3Config(target_modules=["q"], feedforward_modules=[]))
        with pytest.raises(ValueError, match="is of type IA3, expected LORA"):
            fastlora.from_peft(other)

    def test_what_peft_cannot_run_leaves_the_model(self, monkeypatch):
        def refuse(*args, **kwargs):
            raise ValueError("not in this version")

        model = nested()
        before, hooks = snapshot(model), copy.copy(model._forward_pre_hooks)
        monkeypatch.setattr(peft.PeftModel, "from_pretrained", refuse)
        with pytest.raises(ValueError, match="model: PEFT cannot take adapter 'default': not in this version"):
            fastlora.to_peft(model)
        assert_same(before, snapshot(model))
        assert model._forward_pre_hooks == hooks
