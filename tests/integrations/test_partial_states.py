"""State dicts without the frozen base: after unloading, without any rank, and of copies made meanwhile."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import fastlora
from fastlora import LoraConfig
from fastlora.integrations import adapters_only, load_checkpoint, save_checkpoint

FULL = ["0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"]


def plain():
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))


def adapted(**fields):
    return fastlora.inject(plain(), LoraConfig(r=2, target_modules=["0"], **fields))


def without_rank():
    return fastlora.set_ranks(adapted(modules_to_save=["2"]), {"0": 0})


def saved(model, folder):
    save_checkpoint(folder / "last.pt", model)
    return model


def inside(model, folder):
    """Unloaded before the handle is closed, by whoever merges at the end of training."""
    with adapters_only(model):
        return fastlora.unload(model)


@pytest.mark.parametrize("use", [saved, inside])
@pytest.mark.parametrize("leave", [fastlora.unload, fastlora.merge_and_unload])
def test_no_hook_stays_on_an_unloaded_model(use, leave, tmp_path):
    model = use(adapted(), tmp_path)
    if use is saved:
        leave(model)
    assert not model._state_dict_hooks and not model._load_state_dict_pre_hooks
    assert not model._load_state_dict_post_hooks and vars(model).keys() == vars(plain()).keys()


def test_an_unloaded_model_takes_adapters_of_peft(tmp_path):
    """PEFT loads the second alone, which lacks the factors of the first; so may whoever has a model around it."""
    import peft

    model = adapted()
    outer = nn.ModuleDict({"model": model})
    with adapters_only(outer), adapters_only(model):
        pass
    wrapped = peft.get_peft_model(fastlora.unload(model), peft.LoraConfig(r=2, target_modules=["0"]))
    wrapped.save_pretrained(tmp_path)
    wrapped.load_adapter(tmp_path, "second")
    assert torch.equal(model[0].lora_A["second"].weight, model[0].lora_A["default"].weight)
    outer.load_state_dict({k: v for k, v in outer.state_dict().items() if ".second." in k}, strict=False)


def test_adapters_that_come_back_are_left_in_again(tmp_path):
    model = inside(adapted(), tmp_path)
    assert list(model.state_dict()) == FULL
    fastlora.inject(model, LoraConfig(r=2, target_modules=["0"]))
    model.load_state_dict(model.state_dict())
    with adapters_only(model):
        model.load_state_dict(model.state_dict())


class TestWithoutRank:
    """No name of a factor says of a checkpoint whether the base belongs to it."""

    def test_a_checkpoint_loads(self, tmp_path):
        model, other = without_rank(), without_rank()
        base = other[1].weight.clone()
        load_checkpoint(saved(model, tmp_path) and tmp_path / "last.pt", other)
        assert torch.equal(other[2].weight, model[2].weight) and torch.equal(other[1].weight, base)

    def test_a_state_dict_loads(self, tmp_path):
        model, other = without_rank(), without_rank()
        with adapters_only(model), adapters_only(other):
            torch.save(model.state_dict(), tmp_path / "state.pt")
            other.load_state_dict(torch.load(tmp_path / "state.pt"))
        assert torch.equal(other[2].weight, model[2].weight)

    def test_what_differs_is_named(self, tmp_path):
        saved(without_rank(), tmp_path)
        other = fastlora.set_ranks(adapted(modules_to_save=["2", "1"]), {"0": 0})
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(ValueError, match=r"checkpoint: does not fit the model: 1\.bias is trained in the model"):
            load_checkpoint(tmp_path / "last.pt", other)
        assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())

    def test_complete_ones_load_as_ever(self):
        model = without_rank()
        with adapters_only(model):
            partial = model.state_dict()
        state = plain().state_dict()
        model.load_state_dict(state)
        assert torch.equal(model[1].weight, state["1.weight"])
        model.load_state_dict({**partial, **state})
        partial.update(state)
        model.load_state_dict(partial)
        with pytest.raises(RuntimeError, match="Missing key"):
            model.load_state_dict({"2.weight": state["2.weight"]})


class TestCopies:
    """A trainer averages a copy, and saves it beside the model, as small."""

    @pytest.mark.parametrize("make", [copy.deepcopy, torch.optim.swa_utils.AveragedModel])
    def test_a_copy_is_partial_as_long_as_the_model(self, make):
        model = adapted()
        with adapters_only(model):
            averaged = make(model)
            inner = getattr(averaged, "module", averaged)
            assert list(inner.state_dict()) == list(model.state_dict()) and len(model.state_dict()) == 2
            inner.load_state_dict(model.state_dict())
        complete = model.state_dict()
        assert len(inner.state_dict()) == len(complete) == 8
        assert len(copy.deepcopy(inner).state_dict()) == 8

    def test_one_that_was_pickled_is_complete(self):
        model = adapted()
        with adapters_only(model):
            other = pickle.loads(pickle.dumps(model))
            assert len(other.state_dict()) == 8
            other.load_state_dict(model.state_dict())

    def test_handles_of_one_model_do_not_close_each_other(self):
        model = adapted()
        with adapters_only(model):
            with adapters_only(model):
                pass
            assert len(model.state_dict()) == len(copy.deepcopy(model).state_dict()) == 2
        assert len(model.state_dict()) == 8
