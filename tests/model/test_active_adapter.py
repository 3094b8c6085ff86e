"""``set_adapter`` says which adapter every function means that is given no other; after the first was removed, too."""

from __future__ import annotations

import inspect

import pytest
import torch
from safetensors.torch import load_file
from support.public_calls import KEY, adamw, adapted, batches, config, loss, plain, scores
from torch import nn

import fastlora
from fastlora.integrations.session import Session

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(3))


def only_b():
    """A model whose first adapter was removed."""
    model = adapted()
    fastlora.set_adapter(model, "b")
    model.head.requires_grad_(False)  # it was the first adapter's
    return fastlora.delete_adapter(model, "default")


def both():
    """A model with "default" and "b", of other ranks, of which "b" is active."""
    model = fastlora.inject(plain(), config(modules_to_save=["head"]), check="off")
    fastlora.add_adapter(model, "b", config(r=3))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return fastlora.set_adapter(model, "b")


def grads(model):
    return {name for name, p in model.named_parameters() if p.grad is not None and "lora_" in name}


@pytest.fixture(params=[only_b, both], ids=["removed", "active"])
def model(request):
    return request.param()


def ranks_of(model, name):
    return {path: layer.ranks(name) for path, layer in model.named_modules() if isinstance(layer, fastlora.nn.Linear)}


def test_merge_and_unmerge(model):
    expected = model(X)
    fastlora.merge(model)
    torch.testing.assert_close(model(X), expected)
    assert {layer.merged for layer in model.modules() if isinstance(layer, fastlora.nn.Linear)} == {("b",)}
    fastlora.unmerge(model)
    assert torch.equal(model(X), expected)


def test_save_and_load(model, tmp_path):
    fastlora.save(model, tmp_path / "active")
    fastlora.save(model, tmp_path / "named", "b")
    active, named = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("active", "named"))
    assert active.keys() == named.keys() and all(torch.equal(active[k], named[k]) for k in named)
    expected = model(X)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".b." in name:
                parameter.zero_()
    fastlora.load(model, tmp_path / "active")  # into the active adapter, which has the file's ranks
    assert torch.equal(model(X), expected)


def test_summary_and_explain(model):
    shown, named = fastlora.summary(model), fastlora.summary(model, "b")
    assert shown == named and {row.rank for row in shown.rows} == set(ranks_of(model, "b")[KEY].values())
    assert set(fastlora.explain(model).penalty) == set(filter(None, fastlora.adapter_names(model)))


def test_track_and_penalty(model):
    with fastlora.track(model, estimator="exact", every=1) as tracker:
        loss(model, batches()[0]).backward()
        tracker.step()
        assert tracker.adapter == "b"
        assert tracker.penalty(1.0).item() == tracker.penalty(1.0, adapter="b").item() > 0
        model.zero_grad()
        tracker.apply_penalty(1.0)
    assert grads(model) and all(".b." in name for name in grads(model))


def test_calibrate(model):
    found = fastlora.calibrate(model, batches(), loss, steps=2, method="fw", progress=False)
    named = fastlora.calibrate(model, batches(), loss, steps=2, method="fw", progress=False, adapter="b")
    assert dict(found) == dict(named)


def test_set_ranks_and_reallocate(model):
    others = {name: ranks_of(model, name) for name in fastlora.adapter_names(model) if name not in (None, "b")}
    fastlora.set_ranks(model, {KEY: 5}, reinit=True)
    assert ranks_of(model, "b")[KEY] == {"weight": 5}
    ranks = fastlora.reallocate(model, scores(), budget=24, reinit=True)
    assert {path: sum(r.values()) for path, r in ranks_of(model, "b").items()} == ranks
    assert all(ranks_of(model, name) == before for name, before in others.items())


def test_param_groups_have_the_head_of_the_active_adapter():
    model = fastlora.inject(plain(), config(), check="off")
    fastlora.add_adapter(model, "b", config(modules_to_save=["head"]))
    assert [g["name"] for g in fastlora.param_groups(model)] == ["lora", "lora", "bias", "other"]
    fastlora.set_adapter(model, "b")
    assert [g["name"] for g in fastlora.param_groups(model)] == ["lora", "lora", "head"]
    assert fastlora.summary(model).head_params == 27


def test_to_peft(model):
    pytest.importorskip("peft")
    handed = fastlora.to_peft(model)
    assert list(handed.peft_config) == ["b"]
    torch.testing.assert_close(handed(X), model(X))


def test_a_layer_s_own_methods(model):
    layer = model.get_submodule(KEY)
    assert layer.ranks() == layer.ranks("b") and torch.equal(layer.delta(), layer.delta("b")) and layer.delta().any()
    assert torch.equal(layer.merged_weight(), layer.merged_weight("b"))


def test_load_layout_goes_into_the_active_adapter(model):
    own = {p: layer for p, layer in model.named_modules() if isinstance(layer, fastlora.nn.Linear)}
    state = {f"{p}.lora_A": torch.ones_like(layer.lora_A["b"].weight) for p, layer in own.items()}
    state |= {f"{p}.lora_B": torch.ones_like(layer.lora_B["b"].weight) for p, layer in own.items()}
    fastlora.load_layout(model, state, "loralib", lora_alpha=2)
    assert all((layer.lora_A["b"].weight == 1).all() for layer in own.values())


def test_trainers_callbacks(model):
    session = Session(True, {"weight": 1.0}, 0, None)
    session.begin(model)
    assert session.tracker.adapter == "b"
    session.close()


def test_inject_names_the_first():
    model = fastlora.inject(plain(), config(), adapter="first")
    assert fastlora.adapter_names(model) == ["first"]
    assert {layer.adapter_names for layer in model.modules() if isinstance(layer, fastlora.nn.Linear)} == {("first",)}
    assert "lora_A.first.weight" in " ".join(model.state_dict())
    torch.testing.assert_close(model(X), plain()(X))
    optimizer = adamw(model)
    before = model(X).detach()
    for _ in range(2):
        loss(model, batches()[0]).backward()
        optimizer.step()
    assert not torch.equal(model(X), before)
    assert not torch.equal(fastlora.merge(model)(X), before)


def test_load_names_the_first(tmp_path):
    fastlora.save(both(), tmp_path / "b")
    for name, expected in ((None, "default"), ("other", "other")):
        model = fastlora.load(plain(), tmp_path / "b", name)
        assert fastlora.adapter_names(model) == [expected]
        torch.testing.assert_close(model(X), both()(X))


CALLS = {
    "merge": fastlora.merge,
    "unmerge": fastlora.unmerge,
    "save": lambda model: fastlora.save(model, "nowhere"),
    "summary": fastlora.summary,
    "track": fastlora.track,
    "calibrate": lambda model: fastlora.calibrate(model, batches(), loss),
    "set_ranks": lambda model: fastlora.set_ranks(model, {KEY: 2}),
    "reallocate": lambda model: fastlora.reallocate(model, scores()),
    "param_groups": fastlora.param_groups,
    "to_peft": fastlora.to_peft,
    "set_adapter": lambda model: fastlora.set_adapter(model, "b"),
    "disable_adapters": lambda model: fastlora.disable_adapters(model).__enter__(),
    "adapter_names": fastlora.adapter_names,
}


@pytest.mark.parametrize("name", CALLS)
def test_a_model_without_adapters_has_no_active_one(name):
    with pytest.raises(ValueError, match="model: has no adapters; call fastlora.inject first"):
        CALLS[name](plain())


def test_layers_built_by_hand_may_disagree():
    model = nn.ModuleDict({"a": fastlora.nn.Linear(4, 4, r=2), "b": fastlora.nn.Linear(4, 4, r=2)})
    assert [row.rank for row in fastlora.summary(model).rows] == [2, 2]
    fastlora.add_adapter(model, "x", config(target_modules=["a", "b"]))
    fastlora.set_adapter(model["a"], "x")
    with pytest.raises(ValueError, match=r"adapter: expected a name, since the layers have different active ones"):
        fastlora.merge(model)
    fastlora.merge(model, "default")


def test_options_go_by_keyword():
    """What may be given by position: the model, and what a function is about."""
    positional = {}
    for name in fastlora.__all__:
        function = getattr(fastlora, name)
        if inspect.isfunction(function):
            parameters = inspect.signature(function).parameters.values()
            positional[name] = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional["track"] == positional["param_groups"] == positional["explain"] == ["model"]
    assert positional["inject"] == ["model", "config"] and positional["set_ranks"] == ["model", "ranks"]
    assert positional["calibrate"] == ["model", "batches", "loss_fn"]
    assert positional["reallocate"] == ["model", "scores", "budget"] and positional["save"] == [
        "model",
        "path",
        "adapter",
    ]
    assert positional.pop("recommend") == ["model", "batches", "loss_fn", "budget"]
    assert all(len(names) <= 3 for names in positional.values()), positional


@pytest.mark.parametrize("name", [n for n in fastlora.__all__ if inspect.isfunction(getattr(fastlora, n))])
def test_no_function_means_an_adapter_by_a_fixed_name(name):
    adapter = inspect.signature(getattr(fastlora, name)).parameters.get("adapter")
    assert adapter is None or adapter.default is None or name == "inject"
