"""Bad input: each with an error that names the argument, and the model as it was."""

from __future__ import annotations

import pytest
import torch
from support.helpers import FAMILIES, config, randomise
from support.model_state import assert_untouched, state_of
from torch import nn

import fastlora
from fastlora.nn.linear import adapted_layers

SELF = "bert.encoder.layer.0.attention.self"


def into(**fields):
    """A call that injects with these fields."""
    return lambda model: fastlora.inject(model, config(**fields))


def made(**fields):
    """A call that only makes the config."""
    return lambda model: config(**fields)


# argument, call on a plain model, what the error says
PLAIN = [
    (
        "model",
        lambda m: fastlora.inject("bert", config(target_modules="qkv")),
        "model: expected a torch.nn.Module, got 'bert'",
        TypeError,
    ),
    (
        "config",
        lambda m: fastlora.inject(m, {"r": 8}),
        "config: expected a fastlora.LoraConfig or a peft.LoraConfig, got {'r': 8}",
        TypeError,
    ),
    ("no target", into(), "target_modules: expected a role .*, got None"),
    ("role", into(target_modules="qvk"), "target_modules: expected a role .* of Bert.*, got 'qvk'.*did you mean 'qkv'"),
    (
        "suffix",
        into(target_modules=["query", "valeu"]),
        "target_modules: expected suffixes .*, got 'valeu' .*did you mean 'value'",
    ),
    ("not a name", into(target_modules=["query", 3]), "target_modules: expected a role", TypeError),
    ("empty", into(target_modules=[]), "target_modules: expected a role"),
    ("regex", into(target_modules=r".*layer\.9.*"), "target_modules: expected a role or a pattern that matches"),
    (
        "bad regex",
        made(target_modules="(query"),
        "target_modules: expected a role .*, got '\\(query', which is no regular expression",
    ),
    (
        "not a linear",
        into(target_modules=["LayerNorm"]),
        "'bert.embeddings.LayerNorm' cannot be adapted: .*LayerNorm, not exactly",
    ),
    (
        "exclude",
        into(target_modules="qkv", exclude_modules=["kye"]),
        "exclude_modules: expected suffixes .*, got 'kye' .*did you mean 'key'",
    ),
    ("exclude all", into(target_modules="qkv", exclude_modules="attention"), "exclude_modules: nothing is left"),
    (
        "exclude around",
        into(target_modules="qkv", exclude_modules=["layer.0"]),
        r"exclude_modules: 'bert.encoder.layer.0' is no target but holds some",
    ),
    (
        "rank_pattern",
        into(target_modules="qkv", rank_pattern={f"{SELF}.qery": 2}),
        rf"rank_pattern: expected patterns .*, got '{SELF}.qery' .*did you mean '{SELF}.query'",
    ),
    (
        "alpha_pattern",
        into(target_modules=["query"], alpha_pattern={"value": 2}),
        "alpha_pattern: expected patterns that match an adapted matrix, got 'value'",
    ),
    ("pattern type", made(rank_pattern=[("query", 2)]), "rank_pattern: expected a mapping", TypeError),
    ("r = 0", made(r=0), "r: expected an integer >= 1, got 0"),
    ("r < 0", made(r=-2), "r: expected an integer >= 1, got -2"),
    ("r float", made(r=4.0), "r: expected an integer >= 1, got 4.0", TypeError),
    ("r bool", made(r=True), "r: expected an integer >= 1, got True", TypeError),
    (
        "r too large",
        into(target_modules="qkv", r=33),
        rf"rank of {SELF}.query: expected at most min\(in_features, out_features\) = 32, got 33",
    ),
    ("pattern rank", made(rank_pattern={"query": -1}), r"rank_pattern\['query'\]: expected an integer >= 0, got -1"),
    ("pattern float", made(rank_pattern={"query": 2.5}), r"rank_pattern\['query'\]: expected an integer", TypeError),
    (
        "pattern too large",
        into(target_modules="qkv", rank_pattern={"key": 40}),
        rf"rank of {SELF}.key: expected at most .* = 32, got 40",
    ),
    ("alpha", made(lora_alpha=float("nan")), "lora_alpha: expected a finite number, got nan"),
    (
        "alpha pattern",
        made(alpha_pattern={"query": "8"}),
        r"alpha_pattern\['query'\]: expected a finite number, got '8'",
        TypeError,
    ),
    ("dropout", made(lora_dropout=1.0), "lora_dropout: expected a probability >= 0 and < 1, got 1.0"),
    ("bias", made(bias="some"), "bias: expected one of .*, got 'some'"),
    ("scale", made(scale="rank"), "scale: expected one of"),
    ("init", made(init_lora_weights="svd"), "init_lora_weights: expected one of .*, got 'svd'"),
    ("split", made(split_qkv="yes"), "split_qkv: expected one of"),
    ("prepack", made(prepack="yes"), "prepack: expected one of .*, got 'yes'"),
    ("backend", made(backend="cuda"), "backend: expected one of .*'reference'.*, got 'cuda'"),
    (
        "adapter_dtype",
        made(adapter_dtype=torch.int8),
        "adapter_dtype: expected a floating torch.dtype or None, got torch.int8",
    ),
    (
        "adapter_dtype name",
        made(adapter_dtype="float32"),
        "adapter_dtype: expected a floating torch.dtype or None, got 'float32'",
        TypeError,
    ),
    (
        "modules_to_save",
        into(target_modules="qkv", modules_to_save=["clasifier"]),
        "modules_to_save: expected suffixes .*, got 'clasifier' .*did you mean 'classifier'",
    ),
    (
        "modules_to_save string",
        made(modules_to_save="classifier"),
        "modules_to_save: expected a list of names or None, got 'classifier'",
        TypeError,
    ),
    (
        "both",
        into(target_modules=["query", "classifier"], modules_to_save=["classifier"]),
        "modules_to_save: 'classifier' is also a target; a module is adapted or trained",
    ),
    ("set_ranks", lambda m: fastlora.set_ranks(m, {}), "model: has no adapters"),
    ("disabled", lambda m: fastlora.disable_adapters(m).__enter__(), "model: has no adapters"),
]

# the same on an adapted model that was trained
ADAPTED = [
    ("twice", into(target_modules="mlp"), rf"model: '{SELF}.query' already has an adapter"),
    (
        "unknown matrix",
        lambda m: fastlora.set_ranks(m, {f"{SELF}.quary": 2}),
        rf"ranks: expected keys .*, got '{SELF}.quary' .*did you mean '{SELF}.query'",
    ),
    (
        "ranks type",
        lambda m: fastlora.set_ranks(m, [("a", 2)]),
        r"ranks: expected a mapping of matrix keys to ranks, got \[\('a', 2\)\]",
        TypeError,
    ),
    (
        "ranks adapter",
        lambda m: fastlora.set_ranks(m, {f"{SELF}.query": 2}, adapter="b"),
        r"adapter: expected one of \['default'\], got 'b'",
    ),
    (
        "after training",
        lambda m: fastlora.set_ranks(m, {f"{SELF}.query": 2}),
        f"ranks: '{SELF}.query' has been trained .* pass reinit=True",
    ),
    (
        "rank too large",
        lambda m: fastlora.set_ranks(m, {f"{SELF}.query": 64}, reinit=True),
        f"rank of {SELF}.query: expected at most .* = 32, got 64",
    ),
    (
        "rank float",
        lambda m: fastlora.set_ranks(m, {f"{SELF}.query": 2.0}, reinit=True),
        f"rank of {SELF}.query: expected an integer",
        TypeError,
    ),
    ("summary adapter", lambda m: fastlora.summary(m, "b"), "adapter: expected one of"),
    ("merge adapter", lambda m: fastlora.merge(m, "b"), "adapter: expected one of"),
    ("unmerge", lambda m: fastlora.unmerge(m), "model: nothing is merged"),
]


def cases(table):
    """Call, message and type of the error, which is ValueError unless the row says otherwise."""
    return [pytest.param(call, message, *(kind or [ValueError]), id=name) for name, call, message, *kind in table]


@pytest.mark.parametrize("call, message, kind", cases(PLAIN))
def test_on_a_plain_model(build, call, message, kind):
    model = build("bert")
    model.classifier.bias.requires_grad_(False)
    before = state_of(model)
    with pytest.raises(kind, match=message):
        call(model)
    assert_untouched(model, before)


@pytest.mark.parametrize("call, message, kind", cases(ADAPTED))
def test_on_an_adapted_model(build, call, message, kind):
    model = randomise(fastlora.inject(build("bert"), config(target_modules="qkv", modules_to_save=["classifier"])))
    before = state_of(model)
    with pytest.raises(kind, match=message):
        call(model)
    assert_untouched(model, before)


def test_a_weight_that_is_not_floating(build):
    model = build("bert")
    query = model.bert.encoder.layer[1].attention.self.query
    query.weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)
    before = state_of(model)
    with pytest.raises(ValueError, match="target_modules: expected floating weights, got that of '.*query'"):
        fastlora.inject(model, config(target_modules="qkv"))
    assert_untouched(model, before)


@pytest.mark.parametrize("wrapped", ["model", "inside"])
def test_a_model_wrapped_by_peft(build, wrapped):
    import peft

    model = peft.get_peft_model(build("bert"), peft.LoraConfig(target_modules=["query"]))
    model = model if wrapped == "model" else model.base_model.model
    before = state_of(model)
    where = "it is" if wrapped == "model" else f"'{SELF}.query' is"
    with pytest.raises(ValueError, match=f"model: {where} wrapped by PEFT .*; fastlora.from_peft takes"):
        fastlora.inject(model, config(target_modules=["value"]))
    assert_untouched(model, before)


LAYER = [
    ({"r": 0}, "r: expected an integer >= 1, got 0"),
    ({"r": 9}, r"r: expected at most min\(in_features, out_features\) = 8, got 9"),
    ({"lora_dropout": -0.1}, "lora_dropout: expected a probability"),
    ({"lora_alpha": float("inf")}, "lora_alpha: expected a finite number"),
    ({"init_lora_weights": "svd"}, "init_lora_weights: expected one of"),
    ({"backend": "fast"}, "backend: expected one of"),
]


@pytest.mark.parametrize("fields, message", LAYER)
def test_arguments_of_the_layer(fields, message):
    with pytest.raises(ValueError, match=message):
        fastlora.nn.Linear(8, 12, **fields)


def test_a_rank_of_another_type():
    with pytest.raises(TypeError, match="r: expected an integer >= 1, got 2.0"):
        fastlora.nn.Linear(8, 12, r=2.0)


INPUTS = [
    (
        "last dimension",
        lambda: torch.randn(2, 7),
        ValueError,
        r"x: expected last dimension 8 \(in_features\), got shape \(2, 7\)",
    ),
    ("scalar", lambda: torch.tensor(1.0), ValueError, r"x: expected last dimension 8 .* got shape \(\)"),
    (
        "dtype",
        lambda: torch.randn(2, 8, dtype=torch.float64),
        ValueError,
        "x: has dtype torch.float64, the weight torch.float32; cast",
    ),
    (
        "integers",
        lambda: torch.ones(2, 8, dtype=torch.int64),
        ValueError,
        "x: has dtype torch.int64, the weight torch.float32",
    ),
    ("device", lambda: torch.randn(2, 8, device="meta"), ValueError, "x: is on meta, the weight on cpu; move"),
]


@pytest.mark.parametrize("make, error, message", [row[1:] for row in INPUTS], ids=[row[0] for row in INPUTS])
@pytest.mark.parametrize("grouped", [False, True])
def test_inputs_of_the_layer(make, error, message, grouped):
    if grouped:
        model = nn.ModuleDict({n: nn.Linear(8, 12) for n in "qkv"})
        fastlora.inject(model, config(target_modules="qkv"))
        layer = model["q"]
    else:
        layer = fastlora.nn.Linear(8, 12, r=2)
    before = state_of(layer)
    with pytest.raises(error, match=message):
        layer(make())
    assert_untouched(layer, before)
    assert layer(torch.randn(2, 8)).shape == (2, 12)


@pytest.mark.parametrize("name, shape", [("timm_vit", (0, 3, 16, 16)), ("roberta", (1, 1)), ("roberta", (2, 1))])
def test_empty_and_single_inputs_of_a_model(build, name, shape):
    model = randomise(fastlora.inject(build(name), config(target_modules="attention")))
    y = model(torch.randn(shape)) if name == "timm_vit" else model(input_ids=torch.full(shape, 5)).logits
    assert y.shape[0] == shape[0]
    y.sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if ".lora_" in n}
    assert all(g is not None and g.isfinite().all() for g in grads.values())
    # One token attends to itself whatever q and k are: their gradients are nothing but rounding.
    felt = [g for n, g in grads.items() if ".query." not in n and ".key." not in n]
    assert all(g.any().item() is (shape[0] > 0) for g in felt) and felt


def test_a_refused_rank_in_the_last_layer_leaves_the_first_alone(build):
    model = build("llama")
    before = state_of(model)
    last = f"{FAMILIES['llama'].layers[-1]}self_attn.k_proj"
    with pytest.raises(ValueError, match=f"rank of {last}: expected at most .* = 16, got 20"):
        fastlora.inject(model, config(target_modules="qkv", rank_pattern={last: 20}))
    assert_untouched(model, before)
    assert not adapted_layers(model)
