"""What one adapter of a model trains whole, another can neither adapt nor replace rows of; names of adapters mean none
of the model's modules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastlora
from fastlora import LoraConfig
from fastlora.integrations import load_checkpoint, save_checkpoint

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(9, 6)
        self.body, self.more = nn.Linear(6, 6), nn.Linear(6, 6)
        self.top = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
        self.attn = nn.MultiheadAttention(6, 2)

    def forward(self, x):
        return self.top(self.more(torch.tanh(self.body(x))))


def config(*targets, **fields):
    return LoraConfig(**{"r": 2, "target_modules": list(targets), "init_lora_weights": False, **fields})


def state(model):
    return (
        [(n, p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()],
        [(n, type(m), len(m._forward_hooks)) for n, m in model.named_modules()],
        fastlora.adapter_names(model),
        {name: copy.deepcopy(vars(kept)) for name, kept in model.fastlora_configs.items()},
    )


def same(a, b):
    return a[1:] == b[1:] and all(
        x[0::2] == y[0::2] and torch.equal(x[1], y[1]) for x, y in zip(a[0], b[0], strict=True)
    )


WHOLE = "of another adapter; a module is adapted or trained, not both"
SAVED_TARGET = rf"modules_to_save: '{{}}' is a target {WHOLE}"
TARGET_SAVED = rf"target_modules: '{{}}' is in modules_to_save {WHOLE}"
# The first adapter, the second, and what is said of it.
OVERLAPS = {
    "a target is saved": (
        config("body", "more"),
        config("body", modules_to_save=["more"]),
        SAVED_TARGET.format("more"),
    ),
    "a saved one is a target": (
        config("body", modules_to_save=["more"]),
        config("more"),
        TARGET_SAVED.format("more"),
    ),
    "what holds a target is saved": (
        config("body", r"top.0"),
        config("body", modules_to_save=["top"]),
        SAVED_TARGET.format("top.0"),
    ),
    "a target inside of what is saved": (
        config("body", modules_to_save=["top"]),
        config("body", "top.1"),
        TARGET_SAVED.format("top.1"),
    ),
    "by an expression that means nothing else": (
        config("body", modules_to_save=["more"]),
        config(target_modules="m.re"),
        TARGET_SAVED.format("more"),
    ),
    "a stacked projection": (
        config("attn.in_proj"),
        config("body", modules_to_save=["attn"]),
        SAVED_TARGET.format("attn.in_proj"),
    ),
    "rows of what is saved": (
        config("body", modules_to_save=["embed_tokens"]),
        config("body", trainable_token_indices=[1]),
        "rows of 'embed_tokens' cannot be trained alone: it is in modules_to_save, too",
    ),
    "what has rows is saved": (
        config("body", trainable_token_indices=[1]),
        config("body", modules_to_save=["embed_tokens"]),
        f"modules_to_save: 'embed_tokens' has trained rows {WHOLE}",
    ),
}


@pytest.mark.parametrize("case", OVERLAPS)
def test_adapted_or_trained_over_all_adapters(case):
    first, second, message = OVERLAPS[case]
    model = fastlora.inject(Net(), first)
    before = state(model)
    with pytest.raises(ValueError, match=message):
        fastlora.add_adapter(model, "b", second)
    assert same(before, state(model))


@pytest.mark.parametrize("case", OVERLAPS)
def test_a_further_adapter_of_a_file(case, tmp_path):
    first, second, message = OVERLAPS[case]
    fastlora.save(fastlora.inject(Net(), second), tmp_path)
    model = fastlora.inject(Net(), first)
    before = state(model)
    with pytest.raises(ValueError, match=message):
        fastlora.load(model, tmp_path, "b")
    assert same(before, state(model))


def test_what_an_adapter_without_a_rank_saves():
    model = fastlora.inject(Net(), config("body", modules_to_save=["more"], init_lora_weights=True))
    fastlora.set_ranks(model, {"body": 0})
    with pytest.raises(ValueError, match=TARGET_SAVED.format("more")):
        fastlora.add_adapter(model, "b", config("more"))


def test_what_a_deleted_adapter_had_is_free(tmp_path):
    model = fastlora.inject(Net(), config("body"))
    fastlora.add_adapter(model, "b", config("more"))
    fastlora.delete_adapter(model, "b")
    fastlora.add_adapter(model, "c", config("body", modules_to_save=["more"]))
    model(X).sum().backward()
    assert model.more.weight.grad.any()
    with torch.no_grad():
        model.more.weight.add_(1)
    save_checkpoint(tmp_path / "checkpoint", model)
    load_checkpoint(tmp_path / "checkpoint", model)
    fastlora.set_adapter(model, "c")
    fastlora.save(model, tmp_path / "file", "c")
    torch.testing.assert_close(fastlora.load(Net(), tmp_path / "file")(X), model(X))
    fastlora.delete_adapter(fastlora.set_adapter(model, "default"), "c")
    fastlora.add_adapter(model, "d", config("more"))


def test_a_parameter_that_another_module_shares():
    """``save`` could not write it, after the training."""
    model = Net()
    model.more.weight = model.top[0].weight
    fastlora.inject(model, config("body"))
    before = state(model)
    with pytest.raises(ValueError, match="modules_to_save: a parameter is shared with 'top.0.weight'"):
        fastlora.add_adapter(model, "b", config("body", modules_to_save=["more"]))
    assert same(before, state(model))


def test_both_save_the_same():
    model = fastlora.inject(Net(), config("body", modules_to_save=["top"]))
    fastlora.add_adapter(model, "b", config("more", modules_to_save=["top"]))
    assert model.top[0].weight.requires_grad


def test_rows_that_were_deleted_leave_nothing(tmp_path):
    model = fastlora.inject(Net(), config("body"))
    before = state(model)
    for rows in ([1], [2, 3]):
        fastlora.add_adapter(model, f"rows{rows[0]}", config("body", trainable_token_indices=rows))
    fastlora.delete_adapter(model, "rows1")
    assert model.embed_tokens.token_adapter.indices == {"rows2": (2, 3)}
    fastlora.delete_adapter(model, "rows2")
    assert same(before[:2], state(model)[:2])
    fastlora.add_adapter(model, "c", config("embed_tokens"))


class TestNamesOfAdapters:
    """Names of modules, which the factors of adapted layers are called by."""

    @pytest.mark.parametrize("name", ["more", "top"])
    def test_of_a_module_to_save(self, name, tmp_path):
        model = fastlora.inject(Net(), config("body", modules_to_save=[name]), adapter=name)
        fastlora.save(model, tmp_path)
        torch.testing.assert_close(fastlora.load(Net(), tmp_path)(X), model(X))
        assert {g["name"]: len(g["params"]) for g in fastlora.param_groups(model)}["lora"] == 2

    @pytest.mark.parametrize("target", ["body", "bod."])
    def test_of_a_target(self, target):
        model = fastlora.inject(Net(), config("body"), adapter="body")
        fastlora.add_adapter(model, "b", config(target_modules=target if "." in target else [target]))
        assert fastlora.summary(model, "b").adapter_params == fastlora.summary(model, "body").adapter_params

    def test_frozen_factors_stay_frozen(self):
        model = fastlora.inject(Net(), config("body"), adapter="more").requires_grad_(False)
        fastlora.add_adapter(model, "b", config("body", modules_to_save=["more"]))
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            "body.lora_A.b.weight", "body.lora_B.b.weight", "more.weight", "more.bias",
        }  # fmt: skip

    def test_of_an_embedding_with_rows(self, tmp_path):
        model = fastlora.inject(Net(), config("body"), adapter="embed_tokens")
        fastlora.add_adapter(model, "b", config("body", trainable_token_indices={"embed_tokens": [1]}))
        fastlora.save(model, tmp_path, "b")
        assert fastlora.load(Net(), tmp_path).embed_tokens.token_adapter.indices == {"default": (1,)}


class TestAcceleratedBase:
    def model(self, **fields):
        return fastlora.inject(Net(), config("body", **fields), accelerate_frozen=True)

    @pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
    def test_a_further_target(self, fields, tmp_path):
        model, want = self.model(), fastlora.inject(Net(), config("body"))
        for each in (model, want):
            torch.manual_seed(3)
            fastlora.add_adapter(each, "b", config("body", "more", **fields))
            fastlora.set_adapter(each, "b")
        torch.testing.assert_close(model(X), want(X))
        assert type(model.more) is type(want.more) and type(model.top[0]) is fastlora.nn.FrozenLinear
        assert vars(model.more).keys() == vars(want.more).keys()
        fastlora.save(model, tmp_path, "b")
        fastlora.load(self.model(), tmp_path, "b")
        fastlora.delete_adapter(fastlora.set_adapter(model, "default"), "b")
        torch.testing.assert_close(model(X), fastlora.set_adapter(want, "default")(X))
        plain = fastlora.unload(model)
        assert {n: (type(m), vars(m).keys()) for n, m in plain.named_modules()} == {
            n: (type(m), vars(m).keys()) for n, m in Net().named_modules()
        }

    def test_rows_of_an_accelerated_output_layer(self):
        model = nn.ModuleDict({"body": nn.Linear(6, 6), "out": nn.Linear(6, 9, bias=False)})
        fastlora.inject(model, config("body"), accelerate_frozen=True)
        fastlora.add_adapter(model, "b", config("body", trainable_token_indices={"out": [1]}))
        fastlora.set_adapter(model, "b")
        torch.testing.assert_close(model["out"](X), X @ model["out"].weight.T)
