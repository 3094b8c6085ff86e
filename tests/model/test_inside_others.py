"""Verbs that are given a model around the adapted one, or a part of it, do what they do through the model itself."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fastlora
from fastlora import LoraConfig
from fastlora.integrations.session import adapted_model

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.head(torch.relu(self.b(torch.tanh(self.a(x)))))


class Outer(nn.Module):
    """Around one model, or two."""

    def __init__(self, models=1):
        super().__init__()
        self.body = Net()
        if models == 2:
            self.second, self.top = Net(1), nn.Linear(8, 8)

    def forward(self, x):
        y = self.body(x)
        return self.top(self.second(y)) if hasattr(self, "second") else y


class Around(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x)


# What a model is given in, and what that adds to its names.
AROUND = {
    "a module": (Around, "body."),
    "DataParallel": (nn.DataParallel, ""),
    "a compiled one": (lambda m: torch.compile(m, backend="eager"), ""),
}
around = pytest.mark.parametrize("given", AROUND)


def config(*targets, **fields):
    return LoraConfig(**{"r": 2, "target_modules": list(targets or "ab"), "init_lora_weights": False, **fields})


def adapted(seed=5, **fields):
    net = Net()
    torch.manual_seed(seed)
    return fastlora.inject(net, config(**fields))


def files(model, folder, adapter=None):
    """What ``save`` writes, without what it says of the class."""
    fastlora.save(model, folder, adapter)
    fields = json.loads((folder / "adapter_config.json").read_text())
    side = json.loads((folder / "fastlora.json").read_text())
    fields.pop("auto_mapping"), side.pop("sha256", None)
    return load_file(folder / "adapter_model.safetensors"), fields, side


def assert_same(found, want):
    assert found[1:] == want[1:] and found[0].keys() == want[0].keys()
    assert all(torch.equal(tensor, want[0][key]) for key, tensor in found[0].items())


@around
@pytest.mark.parametrize("rslora", [False, True])
def test_scales_that_follow_the_rank(given, rslora):
    fields = {"scale": "per_rank", "use_rslora": rslora}
    wrap, inside = AROUND[given]
    model, want = adapted(**fields), fastlora.set_ranks(adapted(**fields), {"a": 8}, reinit=True)
    outer = wrap(model)
    assert fastlora.set_ranks(outer, {f"{inside}a": 8}, reinit=True) is outer
    assert model.a.adapter_specs == want.a.adapter_specs
    assert fastlora.reallocate(outer, {f"{inside}a": 3.0, f"{inside}b": 1.0}, 8, reinit=True) == {
        f"{inside}a": 6,
        f"{inside}b": 2,
    }


@around
def test_no_adapter_over_a_weight_that_is_what_another_left(given):
    model = adapted(init_lora_weights="pissa")
    outer = AROUND[given][0](model)
    with pytest.raises(ValueError, match="'pissa' changes the weight that adapters share"):
        fastlora.add_adapter(outer, "b", config())
    assert fastlora.adapter_names(model) == ["default"]


FIELDS = {
    "use_dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "modules_to_save": {"modules_to_save": ["head"]},
    "biases": {"bias": "all"},
    "per rank": {"scale": "per_rank", "rank_pattern": {"a": 4}},
}


@pytest.mark.parametrize("fields", FIELDS)
def test_files_of_a_module_around_it(fields, tmp_path):
    model = adapted(**FIELDS[fields])
    outer, fresh = Around(model), Around(Net())
    own, (tensors, found, side) = files(model, tmp_path / "own"), files(outer, tmp_path / "outer")
    assert tensors.keys() == {key.replace(".model.", ".model.body.", 1) for key in own[0]}
    assert side["scale"] == own[2]["scale"]
    for field in ("r", "bias", "use_dora", "init_lora_weights", "lora_dropout", "modules_to_save"):
        assert found[field] == own[1][field]
    torch.testing.assert_close(fastlora.load(fresh, tmp_path / "outer")(X), model(X))
    fastlora.load(outer, tmp_path / "outer")
    with pytest.raises(ValueError, match="use_dora is"):
        fastlora.load(Around(adapted(use_dora=fields != "use_dora")), tmp_path / "outer")


@pytest.mark.parametrize("given", [name for name in AROUND if name != "a module"])
@pytest.mark.parametrize("fields", FIELDS)
def test_files_of_a_wrapper_are_the_models_own(given, fields, tmp_path):
    model = adapted(**FIELDS[fields])
    assert_same(files(AROUND[given][0](model), tmp_path / "outer"), files(model, tmp_path / "own"))


@around
@pytest.mark.parametrize("fields", ["use_dora", "lora_bias", "modules_to_save", "per rank"])
def test_an_adapter_that_was_added_from_outside(given, fields, tmp_path):
    model, want = adapted(), adapted()
    wrap, inside = AROUND[given]
    outer, fields = wrap(model), FIELDS[fields]
    for to in (outer, want):
        torch.manual_seed(7)
        assert fastlora.add_adapter(to, "b", config(**fields)) is to
    assert_same(files(model, tmp_path / "inner", "b"), files(want, tmp_path / "want", "b"))
    assert files(outer, tmp_path / "outer", "b")[2]["scale"] == files(want, tmp_path / "want", "b")[2]["scale"]
    assert adapted_model(outer) is model
    if not inside:  # names of files are the model's
        return
    fresh = fastlora.add_adapter(Around(adapted()), "c", config())
    fastlora.load(fresh, tmp_path / "outer", "b")
    for each in (fresh, model):
        fastlora.set_adapter(each, "b")
    torch.testing.assert_close(fresh(X), model(X))
    assert_same(files(fresh.body, tmp_path / "inner", "b"), files(model, tmp_path / "want", "b"))


def test_full_names_are_those_of_the_model_that_was_given(tmp_path):
    model = adapted()
    fields = {"rank_pattern": {"body.a": 3}, "modules_to_save": ["body.head"]}
    fastlora.add_adapter(Around(model), "b", config("body.a", "body.b", **fields))
    assert (model.a.ranks("b"), model.b.ranks("b")) == ({"weight": 3}, {"weight": 2})
    assert "base_model.model.head.weight" in files(model, tmp_path, "b")[0]


def test_a_module_to_save_that_has_no_name_of_its_own_inside():
    model = adapted()
    model.b.more = nn.ModuleDict({"head": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"modules_to_save: expected .*body\.b\.more\.head"):
        fastlora.add_adapter(Around(model), "b", config("body.a", modules_to_save=["body.head"]))
    assert fastlora.adapter_names(model) == ["default"]


@pytest.mark.parametrize("role", ["all-linear", r"body\.[ab]"])
def test_roles_are_those_of_the_model_inside(role):
    model, own = adapted(), adapted()
    fastlora.add_adapter(Around(model), "b", LoraConfig(r=2, target_modules=role))
    fastlora.add_adapter(own, "b", LoraConfig(r=2, target_modules=role.removeprefix(r"body\.")))
    assert type(model.head) is type(own.head) is nn.Linear
    assert fastlora.summary(Around(model), "b").modules_by_role == fastlora.summary(own, "b").modules_by_role


@around
def test_deleted_and_combined_from_outside(given, tmp_path):
    model, want = adapted(), adapted()
    outer = AROUND[given][0](model)
    for to in (outer, want):
        torch.manual_seed(7)
        fastlora.add_adapter(to, "b", config(modules_to_save=["head"], use_dora=True))
        fastlora.delete_adapter(to, "b")
        fastlora.add_adapter(to, "b", config(lora_dropout=0.5, scale="per_rank"))
        fastlora.add_weighted_adapter(to, ["b", "default"], [0.5, 2.0], adapter_name="both", combination_type="cat")
    for name in ("b", "both"):
        model.head.requires_grad_(False), want.head.requires_grad_(False)
        assert_same(files(model, tmp_path / "inner", name), files(want, tmp_path / "want", name))
        assert files(outer, tmp_path / "outer", name)[1]["lora_dropout"] == 0.5


def test_an_adapted_layer_that_was_replaced(tmp_path):
    model = adapted()
    model.a = nn.Linear(8, 8).requires_grad_(False)
    with pytest.raises(ValueError, match=r"another module has replaced 'body\.a'"):
        fastlora.save(Around(model), tmp_path / "files")
    assert not (tmp_path / "files").exists()


def test_adapters_that_never_learn_are_found_anew_after_a_change_from_outside():
    model = adapted()
    before = model.fastlora_learning
    fastlora.set_ranks(Around(model), {"body.a": 3}, reinit=True)
    assert before is not model.fastlora_learning and before._root is None
    before = model.fastlora_learning
    fastlora.add_adapter(Around(model), "b", config())
    assert before is not model.fastlora_learning and model.fastlora_places.paths == ["a", "b"]


class PassedBy(Net):
    """Reads a weight in a way that no source tells."""

    def forward(self, x):
        layer = getattr(self, "a")  # noqa: B009
        return self.b(nn.functional.linear(x, layer.weight))


def test_adapters_that_never_learn_are_found_at_a_trackers_step():
    model = fastlora.inject(PassedBy(), config())
    with fastlora.track(Around(model), every=1) as tracker, pytest.raises(RuntimeError, match="never ran although"):
        model(X).sum().backward()
        tracker.step()


@around
def test_unloaded_from_outside(given):
    model = adapted()
    fastlora.unload(AROUND[given][0](model))
    assert not any(name.startswith("fastlora") for m in model.modules() for name in vars(m))
    assert not model._state_dict_hooks and not model._load_state_dict_pre_hooks
    again = fastlora.inject(Around(model), config())
    assert adapted_model(again) is again


def test_heads_are_heads_from_outside():
    model = adapted(modules_to_save=["head"])
    want = {g["name"]: len(g["params"]) for g in fastlora.param_groups(model)}
    assert want == {g["name"]: len(g["params"]) for g in fastlora.param_groups(Around(model))}
    assert fastlora.summary(Around(model)).head_params == fastlora.summary(model).head_params == 72


def test_the_head_of_a_policy_from_outside(tmp_path):
    model = Around(fastlora.apply_policy(Net(), "head_only"))
    assert [g["name"] for g in fastlora.param_groups(model)] == ["head"]
    with pytest.raises(ValueError, match="policy 'head_only' trains no adapter"):
        fastlora.save(model, tmp_path)


class TestAPart:
    def test_of_dora(self, tmp_path):
        whole = fastlora.inject(Around(Net()), config(use_dora=True))
        fresh = fastlora.load(Net(), folder_of(whole.body, tmp_path))
        torch.testing.assert_close(fresh(X), whole(X))

    def test_of_pissa(self):
        whole = fastlora.inject(Around(Net()), config(init_lora_weights="pissa"))
        with pytest.raises(ValueError, match="'pissa' changes the weight that adapters share"):
            fastlora.add_adapter(whole.body, "b", config())

    def test_scales_that_follow_the_rank(self):
        whole = fastlora.inject(Around(Net()), config(scale="per_rank"))
        fastlora.set_ranks(whole.body, {"a": 8}, reinit=True)
        assert whole.body.a.adapter_specs["default"].scale == {"weight": 1.0}

    def test_what_is_added_to_it_is_known_of_the_whole(self, tmp_path):
        whole = fastlora.inject(Around(Net()), config())
        fastlora.add_adapter(whole.body, "b", config(use_dora=True, modules_to_save=["head"]))
        fastlora.set_adapter(whole, "b")
        torch.testing.assert_close(fastlora.load(Around(Net()), folder_of(whole, tmp_path))(X), whole(X))

    @pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copied(self, again, tmp_path):
        whole = again(fastlora.inject(Around(Net()), config(use_dora=True)))
        assert whole.fastlora_configs is whole.body.a.router.configs
        fastlora.load(Net(), folder_of(again(whole.body), tmp_path))


def folder_of(model, folder):
    fastlora.save(model, folder)
    return folder


class TestTwoModelsInsideOne:
    def both(self, one, two):
        outer = Outer(models=2)
        fastlora.inject(outer.body, config(**one)), fastlora.inject(outer.second, config(**two))
        outer.top.requires_grad_(False)
        return outer

    def loaded(self, outer, folder, adapter=None):
        fastlora.save(outer, folder, adapter)
        return fastlora.load(Outer(models=2), folder)

    @pytest.mark.parametrize("fields", FIELDS)
    def test_with_one_config(self, fields, tmp_path):
        outer = self.both(FIELDS[fields], FIELDS[fields])
        torch.testing.assert_close(self.loaded(outer, tmp_path)(X), outer(X))

    def test_with_ranks_and_heads_of_their_own(self, tmp_path):
        outer = self.both({"r": 4, "modules_to_save": ["head"]}, {"lora_alpha": 3, "scale": "per_rank"})
        torch.testing.assert_close(self.loaded(outer, tmp_path)(X), outer(X))
        fastlora.set_ranks(outer, {"body.a": 8, "second.a": 6}, reinit=True)
        scales = [m.a.adapter_specs["default"].scale["weight"] for m in (outer.body, outer.second)]
        assert scales == [2.0, 0.5]

    @pytest.mark.parametrize("fields", ["use_dora", "lora_bias", "pissa"])
    def test_what_a_file_says_once(self, fields, tmp_path):
        outer = self.both(FIELDS[fields], {"init_lora_weights": True})
        with pytest.raises(ValueError, match=r"'body\.a' and 'second\.a' differ in init_lora_weights, use_dora or"):
            fastlora.save(outer, tmp_path / "files")
        with pytest.raises(ValueError, match="model: several adapted models inside one"):
            adapted_model(outer)

    def test_an_adapter_of_both(self, tmp_path):
        outer = self.both({}, {"r": 3})
        heads = ["body.head", "top"]
        fastlora.add_adapter(outer, "b", config(use_dora=True, modules_to_save=heads, scale="per_rank"))
        fastlora.set_adapter(outer, "b")
        torch.testing.assert_close(self.loaded(outer, tmp_path / "both")(X), outer(X))
        found, _, side = files(outer, tmp_path / "both")
        assert {"base_model.model.body.head.weight", "base_model.model.top.weight"} < found.keys()
        assert side["scale"]["mode"] == "per_rank"
        assert "base_model.model.head.weight" in files(outer.body, tmp_path / "one")[0]
        fastlora.load(outer, tmp_path / "both", "b")
