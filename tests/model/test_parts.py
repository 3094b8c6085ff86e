"""Parts of an adapted model, and several in one: adapters are those of the whole, and ids are never given twice."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import fastlora
from fastlora import LoraConfig

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))


def config(*targets, **fields):
    return LoraConfig(**{"r": 2, "target_modules": list(targets), "init_lora_weights": False, **fields})


def half():
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))


def whole():
    torch.manual_seed(0)
    model = fastlora.inject(nn.Sequential(half(), half()), config("0.0", "1.0"))
    return fastlora.add_adapter(model, "b", config("0.0", "1.0"))


copies = pytest.mark.parametrize("again", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])


class TestAPart:
    @copies
    def test_deletes_no_adapter_of_the_whole(self, again):
        model = again(whole())
        before = model.state_dict().keys()
        with pytest.raises(
            ValueError, match="model: adapter 'b' has layers outside of it, too; call fastlora.delete_ad"
        ):
            fastlora.delete_adapter(model[0], "b")
        assert model.state_dict().keys() == before and fastlora.adapter_names(model) == ["default", "b"]
        fastlora.delete_adapter(model, "b")
        assert not [key for key in model.state_dict() if ".b." in key]

    def test_deletes_what_it_has_alone(self):
        model = fastlora.add_adapter(whole(), "c", config("0.1"))
        fastlora.delete_adapter(model[0], "c")
        assert fastlora.adapter_names(model) == ["default", "b", None]

    @copies
    @pytest.mark.parametrize("call", [fastlora.unload, fastlora.merge_and_unload])
    def test_is_not_unloaded(self, again, call, tmp_path):
        model = again(whole())
        y = model(X)
        with pytest.raises(ValueError, match="model: adapter 'default' has layers outside of it, too; call fastlora"):
            call(model[1])
        assert torch.equal(model(X), y)
        fastlora.save(model, tmp_path)
        assert type(call(model)[1][0]) is nn.Linear

    def test_holds_rows_of_the_whole(self):
        model = nn.ModuleDict({"embed_tokens": nn.Embedding(9, 6), "body": nn.Linear(6, 6)})
        around = fastlora.inject(nn.ModuleList([model, half()]), config("1.0"))
        fastlora.add_adapter(around, "b", config("1.0", trainable_token_indices={"0.embed_tokens": [1]}))
        with pytest.raises(ValueError, match="adapter 'b' has layers outside of it"):
            fastlora.delete_adapter(around[1], "b")

    def test_a_copy_of_it_is_a_model_of_its_own(self):
        model = whole()
        part = copy.deepcopy(model[0])
        fastlora.delete_adapter(part, "b")
        fastlora.unload(part)
        assert fastlora.adapter_names(model) == ["default", "b"]

    def test_what_was_dropped_with_the_whole_is_not_missed(self):
        part = whole()[0]
        fastlora.delete_adapter(part, "b")
        fastlora.unload(part)

    def test_what_took_a_layers_place_does_not_hinder(self):
        model = whole()
        model[1][0] = nn.Linear(6, 6)
        fastlora.delete_adapter(model, "b")
        fastlora.unload(model)

    def test_activates_an_adapter_of_the_whole(self):
        model, want = whole(), whole()
        fastlora.set_adapter(model[0], "b"), fastlora.set_adapter(want, "b")
        assert torch.equal(model(X), want(X))


class TestSeveralInOne:
    def both(self):
        torch.manual_seed(0)
        return nn.Sequential(fastlora.inject(half(), config("0")), fastlora.inject(half(), config("0")))

    @pytest.mark.parametrize("one", [0, 1])
    def test_an_adapter_that_came_and_went_in_one(self, one):
        outer = self.both()
        fastlora.delete_adapter(fastlora.add_adapter(outer[one], "b", config("0")), "b")
        assert fastlora.adapter_names(outer) == ["default", None]
        fastlora.add_adapter(outer, "c", config("0.0", "1.0"))
        assert [fastlora.adapter_names(each) for each in (outer, *outer)] == [["default", None, "c"]] * 3
        with fastlora.use_adapters(outer, "c"):
            want = outer(X)
        with fastlora.use_adapters(outer, torch.full((4,), 2)):
            torch.testing.assert_close(outer(X), want)
        with pytest.raises(ValueError, match="got 1 at position 0, which was removed"):
            fastlora.use_adapters(outer, torch.ones(4, dtype=torch.int64)).__enter__()

    @pytest.mark.parametrize("one", [0, 1])
    def test_combined_adapters_have_one_id(self, one):
        outer = self.both()
        fastlora.delete_adapter(fastlora.add_adapter(outer[one], "b", config("0")), "b")
        fastlora.add_weighted_adapter(outer, ["default"], [1.0], adapter_name="c")
        assert [fastlora.adapter_names(each) for each in (outer, *outer)] == [["default", None, "c"]] * 3

    def test_ids_that_differ(self):
        outer = self.both()
        fastlora.delete_adapter(fastlora.add_adapter(outer[0], "b", config("0")), "b")
        for each in outer:
            fastlora.add_adapter(each, "c", config("0"))
        with pytest.raises(ValueError, match="its layers have different sets of adapters"):
            fastlora.adapter_names(outer)

    def test_layers_that_were_added_belong_to_their_model(self):
        outer = self.both()
        fastlora.add_adapter(outer, "b", config("0.1", "1.1"))
        assert [each[1].router for each in outer] == [each[0].router for each in outer]
        fastlora.unload(outer[1])
        assert fastlora.adapter_names(outer) == ["default", "b"]


class TestWhatInjectFroze:
    def trained(self, model):
        return {n for n, p in model.named_parameters() if p.requires_grad}

    @copies
    @pytest.mark.parametrize("call", [fastlora.unload, fastlora.merge_and_unload])
    def test_is_given_back(self, again, call, caplog):
        model = half()
        model[0].bias.requires_grad_(False)
        before = self.trained(model)
        model = again(fastlora.inject(model, config("0")))
        assert not before & self.trained(model)
        assert self.trained(call(model)) == before
        assert not any(name.startswith("fastlora") for m in model.modules() for name in vars(m))
        fastlora.inject(model, config("0", modules_to_save=["1"]))
        assert {"1.weight", "1.bias"} < self.trained(model) and "was frozen" not in caplog.text

    def test_but_not_what_the_user_froze(self, caplog):
        model = half().requires_grad_(False)
        fastlora.unload(fastlora.inject(model, config("0")))
        assert not self.trained(model)
        fastlora.inject(model, config("0", modules_to_save=["1"]))
        assert "'1' was frozen before injection and stays frozen" in caplog.text

    def test_nor_what_took_its_place(self):
        model = fastlora.inject(half(), config("0"))
        model[1] = nn.Linear(6, 6).requires_grad_(False)
        assert self.trained(fastlora.unload(model)) == {"0.weight", "0.bias"}

    def test_with_what_a_further_adapter_froze(self):
        outer = nn.Sequential(fastlora.inject(half(), config("0")), nn.Linear(6, 6), nn.MultiheadAttention(6, 2))
        before = {"1.weight", "1.bias", "2.in_proj_weight", "2.in_proj_bias"}
        fastlora.add_adapter(outer, "b", config("1", "2.in_proj"))
        assert not before & self.trained(outer)
        assert before < self.trained(fastlora.unload(outer))

    def test_rows_of_an_embedding(self):
        model = nn.ModuleDict({"embed_tokens": nn.Embedding(9, 6), "body": nn.Linear(6, 6)})
        before = self.trained(model)
        fastlora.inject(model, config("body", trainable_token_indices=[1]))
        assert self.trained(fastlora.unload(model)) == before

    def test_a_parameter_by_two_names(self):
        model = half()
        model[1].weight = model[0].weight
        before = self.trained(model)
        assert self.trained(fastlora.unload(fastlora.inject(model, config("0")))) == before

    def test_not_in_the_model_that_a_copy_for_peft_shares_it_with(self):
        pytest.importorskip("peft")
        model = fastlora.inject(half(), config("0"))
        before = self.trained(model)
        fastlora.to_peft(model)
        assert self.trained(model) == before
