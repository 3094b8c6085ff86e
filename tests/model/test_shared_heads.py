"""Modules that are trained whole are shared by all adapters of a model: each adapter's file has them."""

import copy
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from support.peft_fields import forward, make_llama
from support.peft_help import TENSORS, peft, transformers
from torch import nn

import fastlora

SIZES = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=40)
IDS = torch.arange(6)[None]
HEAD = {"classifier.weight", "classifier.bias"}


def bert():
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)).eval()


def task(**fields):
    return peft.LoraConfig(r=2, target_modules=["query"], **{"task_type": "SEQ_CLS", **fields})


def trained(model, adapter):
    """The model with this adapter active, as training would leave it."""
    fastlora.set_adapter(model, adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    return model


def assert_the_file_is_the_model(model, make, folder, adapter, run):
    fastlora.save(model, folder, adapter)
    with torch.no_grad():
        torch.testing.assert_close(run(fastlora.load(make(), folder)), run(model))
    return {k.removeprefix("base_model.model.") for k in load_file(folder / TENSORS) if ".lora_" not in k}


def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("tasks", [("SEQ_CLS", "SEQ_CLS"), (None, "SEQ_CLS"), ("SEQ_CLS", None)])
def test_the_head_of_a_task_is_in_the_file_of_each_adapter(tasks, tmp_path):
    model = fastlora.inject(bert(), task(task_type=tasks[0]), adapter="a")
    fastlora.add_adapter(model, "b", task(task_type=tasks[1]))
    theirs = peft.get_peft_model(bert(), task(), adapter_name="a")
    theirs.add_adapter("b", task())
    theirs.save_pretrained(str(tmp_path / "peft"))
    for name in "ab":
        wanted = {k for k in load_file(tmp_path / "peft" / name / TENSORS) if ".lora_" not in k}
        assert wanted == {f"base_model.model.{key}" for key in HEAD}
        trained(model, name)
        assert assert_the_file_is_the_model(model, bert, tmp_path / name, name, logits) == HEAD
    fresh = fastlora.load(fastlora.load(bert(), tmp_path / "a", "a"), tmp_path / "a", "c")
    fastlora.save(fresh, tmp_path / "again", "c")
    fastlora.load(model, tmp_path / "b", "b")  # the same adapter, with the head that its file has


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.top = nn.ModuleDict({"a": nn.Linear(4, 4), "head": nn.Linear(4, 4)}), nn.Linear(4, 2)

    def forward(self, x):
        return self.top(self.body["head"](torch.tanh(self.body["a"](x))))


def run(model):
    return model(torch.ones(2, 4))


def config(**fields):
    return fastlora.LoraConfig(r=2, target_modules=["a"], **fields)


@pytest.mark.parametrize("by_hand", [False, True])
def test_one_that_came_from_outside_of_the_adapted_model(by_hand, tmp_path):
    model = Outer()
    if by_hand:
        model.requires_grad_(False).body["a"] = fastlora.nn.Linear(4, 4, r=2)
        base = Outer()
        make = partial(copy.deepcopy, base)
        base.body["a"].load_state_dict({k: v for k, v in model.body["a"].state_dict().items() if "lora" not in k})
    else:
        fastlora.inject(model.body, config())
        model.top.requires_grad_(False)
        make = Outer
    fastlora.add_adapter(model, "b", config(modules_to_save=["body.head", "top"]))
    for name in ("default", "b"):
        held = assert_the_file_is_the_model(trained(model, name), make, tmp_path / name, name, run)
        assert held == {f"{n}.{p}" for n in ("body.head", "top") for p in ("weight", "bias")}


def test_a_combination(tmp_path):
    model = fastlora.inject(Outer(), config(modules_to_save=["head"]), adapter="a")  # a name of a target, too
    fastlora.add_adapter(model, "top", config(modules_to_save=["top"]))
    fastlora.add_weighted_adapter(trained(model, "a"), ["a", "top"], [0.5, 2.0], adapter_name="both")
    fastlora.set_adapter(model, "both")
    heads = {f"{n}.{p}" for n in ("body.head", "top") for p in ("weight", "bias")}
    assert assert_the_file_is_the_model(model, Outer, tmp_path / "both", "both", run) == heads
    assert "head" in [group["name"] for group in fastlora.param_groups(model)]
    fastlora.delete_adapter(model, "a")
    assert assert_the_file_is_the_model(model, Outer, tmp_path / "left", "both", run) == heads


def test_beside_an_adapter_that_trains_tied_embeddings(tmp_path):
    make = partial(make_llama, tie_word_embeddings=True)
    fields = dict(r=2, target_modules=["q_proj"])
    tied = fastlora.LoraConfig(**fields, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    model = fastlora.add_adapter(fastlora.inject(make(), tied), "b", fastlora.LoraConfig(**fields))
    held = assert_the_file_is_the_model(trained(model, "b"), make, tmp_path, "b", forward)
    assert held == {"model.embed_tokens.weight", "lm_head.weight"}
    with torch.no_grad():
        torch.testing.assert_close(forward(peft.PeftModel.from_pretrained(make(), str(tmp_path))), forward(model))


def test_what_a_deleted_adapter_leaves_is_not_lost_in_silence(tmp_path):
    model = fastlora.inject(Outer(), config(modules_to_save=["head"]), adapter="a")
    fastlora.set_adapter(fastlora.add_adapter(model, "b", config()), "b")
    fastlora.delete_adapter(model, "a")
    with pytest.raises(ValueError, match=r"would be lost: body\.head\.weight, body\.head\.bias"):
        fastlora.save(model, tmp_path / "files")


def test_a_module_is_adapted_or_trained_whoever_asks():
    model = fastlora.inject(Outer(), config(modules_to_save=["head"]))
    with pytest.raises(ValueError, match=r"target_modules: 'body.head' is in modules_to_save of another adapter"):
        fastlora.add_adapter(model, "b", fastlora.LoraConfig(r=2, target_modules=["head"]))
    with pytest.raises(ValueError, match=r"modules_to_save: 'body.a' is a target of another adapter"):
        fastlora.add_adapter(model, "b", fastlora.LoraConfig(r=2, target_modules=["top"], modules_to_save=["body"]))
    assert fastlora.adapter_names(model) == ["default"]
    every = fastlora.LoraConfig(r=2, target_modules=r".*(head|top)")
    fastlora.add_adapter(model, "b", every)
    assert fastlora.summary(model, "b").rows[0].key == "top" and model.body["head"].weight.requires_grad
