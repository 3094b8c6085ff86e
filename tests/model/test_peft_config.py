"""A ``peft.LoraConfig`` means here what it means to PEFT: the same names are trained, of the same sizes."""

from __future__ import annotations

import copy

import pytest
import torch
from support.helpers import FAMILIES
from support.peft_fields import make_llama, plain_names
from support.peft_help import peft, transformers
from torch import nn

import fastlora
from fastlora.nn.linear import adapted_layers


class Named(nn.Module):
    """Modules called as roles and heads are."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mlp, self.fc, self.head, self.pre_head = (nn.Linear(8, 8) for _ in range(4))
        self.block = nn.ModuleDict(dict(fc1=nn.Linear(8, 16), fc2=nn.Linear(16, 8), mlp=nn.Linear(8, 8)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.attn = nn.Linear(8, 8), nn.MultiheadAttention(8, 2)


def gpt2():
    sizes = dict(n_layer=1, n_head=2, n_embd=8, vocab_size=40, bos_token_id=1, eos_token_id=1)
    return transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**sizes))


def masked():
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=40)
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes))


def by_peft(make, **fields):
    return peft.get_peft_model(make(), peft.LoraConfig(r=2, **copy.deepcopy(fields))).base_model.model


def trained(model):
    return {name.replace(".modules_to_save", ""): count for name, count in plain_names(model).items()}


MAKES = {
    "named": Named, "llama": make_llama, "gpt2": gpt2, "masked": masked,
    **{name: FAMILIES[name].make for name in ("bert", "distilbert", "timm_vit")},
}  # fmt: skip
# Fields of a config, by the model.
CASES = [
    ("named", dict(target_modules="mlp")),
    ("named", dict(target_modules=r".*mlp")),
    ("named", dict(target_modules="all-linear")),
    ("named", dict(target_modules="ALL-LINEAR")),
    ("named", dict(target_modules="all-linear", exclude_modules="mlp")),
    ("named", dict(target_modules="all-linear", exclude_modules=["mlp", "head"])),
    ("named", dict(target_modules=["mlp"], modules_to_save=["head"])),
    ("named", dict(target_modules=["mlp"], modules_to_save=["head", "fc"], bias="all")),
    ("llama", dict(target_modules="all-linear", task_type="CAUSAL_LM")),
    ("llama", dict(target_modules="all-linear", exclude_modules=r".*\.mlp\..*")),
    ("llama", dict(target_modules="all-linear", modules_to_save=["lm_head"])),
    ("llama", dict(target_modules=["q_proj"], modules_to_save=["norm"])),
    ("llama", dict(target_modules=["q_proj"], modules_to_save=["norm", "embed_tokens"], init_lora_weights="Gaussian")),
    ("llama", dict(target_modules=["q_proj"], init_lora_weights="OLoRA")),
    ("llama", dict(task_type="CAUSAL_LM")),
    ("gpt2", dict(task_type="SEQ_CLS")),
    ("gpt2", dict(target_modules="all-linear", task_type="SEQ_CLS")),
    ("gpt2", dict(target_modules="all-linear")),
    ("masked", dict(target_modules="all-linear")),
    ("bert", dict(target_modules="all-linear", task_type="SEQ_CLS")),
    ("bert", dict(target_modules="all-linear")),
    ("bert", dict(task_type="SEQ_CLS")),
    ("distilbert", dict(target_modules=["q_lin"], task_type="TOKEN_CLS")),
    ("distilbert", dict(target_modules="all-linear", exclude_modules=["pre_classifier"], task_type="SEQ_CLS")),
    ("timm_vit", dict(target_modules="all-linear")),
    ("timm_vit", dict(target_modules="all-linear", exclude_modules=["head"])),
]


@pytest.mark.parametrize("name, fields", CASES)
def test_as_peft(name, fields):
    make, config = MAKES[name], peft.LoraConfig(r=2, **copy.deepcopy(fields))
    given, wanted = copy.deepcopy(config), trained(by_peft(make, **fields))
    first = fastlora.inject(make(), config)
    assert trained(first) == wanted
    if config.bias == "none" and config.init_lora_weights != "OLoRA":  # which take a model with one adapter
        path = next(iter(adapted_layers(first)))
        second = fastlora.inject(make(), fastlora.LoraConfig(r=1, target_modules=[path]), adapter="first")
        fastlora.add_adapter(second, "default", config)
        assert {n: count for n, count in trained(second).items() if ".first" not in n} == wanted
    assert config == given


@pytest.mark.parametrize(
    "targets, paths",
    [
        (r".*_proj", {"q_proj", "attn.out_proj"}),
        ("all-linear", {"q_proj", "attn.out_proj"}),
        (["out_proj"], {"attn.out_proj"}),
        (["q_proj", "attn"], {"q_proj", "attn.in_proj", "attn.out_proj"}),
        (r"attn", {"attn.in_proj", "attn.out_proj"}),
    ],
)
def test_an_attention_is_one_module(targets, paths):
    theirs = by_peft(Attention, target_modules=targets)
    config = peft.LoraConfig(r=2, target_modules=targets)
    ours = fastlora.inject(Attention(), config)
    again = fastlora.inject(Attention(), peft.LoraConfig(r=1, target_modules=["attn"]))
    fastlora.add_adapter(again, "b", config)
    for model, adapter in ((ours, "default"), (again, "b")):
        assert {n for n, layer in adapted_layers(model).items() if adapter in layer.adapter_names} == paths
    sizes = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (theirs, ours)]
    assert sizes[0] == sizes[1]


def test_a_projection_of_an_attention_is_not_excluded_by_itself():
    fields = dict(target_modules=["q_proj", "attn"], exclude_modules=["out_proj"])
    ours = fastlora.inject(Attention(), peft.LoraConfig(r=2, **fields))
    sizes = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (by_peft(Attention, **fields), ours)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    "fields, says",
    [
        (dict(target_modules="qkv"), "target_modules: .* got 'qkv', a role, which fastlora.LoraConfig knows"),
        (
            dict(target_modules=r".*q_proj", exclude_modules="attention"),
            "exclude_modules: .* got 'attention', a role, which fastlora.LoraConfig knows",
        ),
        (dict(target_modules=["in_proj"]), "target_modules: expected suffixes of module names .* got 'in_proj'"),
        (dict(target_modules=["q_proj"], modules_to_save=["orm"]), "modules_to_save: expected suffixes .* got 'orm'"),
        (dict(), "target_modules: expected .* got None"),
    ],
)
def test_what_means_nothing_to_peft_is_named(fields, says):
    with pytest.raises(ValueError, match=says):
        fastlora.inject(Attention(), peft.LoraConfig(r=2, **fields))


def test_a_config_of_ours_has_its_roles_and_names():
    ours = fastlora.inject(Named(), fastlora.LoraConfig(r=2, target_modules="mlp", modules_to_save=["head"]))
    assert {*adapted_layers(ours)} == {"block.fc1", "block.fc2"}
    assert not ours.pre_head.weight.requires_grad and ours.head.weight.requires_grad


def test_a_policy_keeps_its_targets_where_a_config_has_none():
    model = FAMILIES["bert"].make()
    fastlora.apply_policy(model, "lora_only", peft.LoraConfig(r=2))
    assert {n.rpartition(".")[2] for n in adapted_layers(model)} == {"query", "key", "value", "dense"}
