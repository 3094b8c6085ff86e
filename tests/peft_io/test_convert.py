"""Adapters handed to PEFT and taken from it in memory; state dicts of loralib and torchtune."""

from __future__ import annotations

import copy
import pathlib
import re

import pytest
import torch
import torch.nn.functional as F
from support.helpers import config, randomise
from support.model_zoo import ZOO, build
from support.peft_help import Nested, assert_same, logits, make_bert, peft, snapshot, train
from support.peft_zoo_help import FUSED, assert_equal, for_peft, output
from torch import nn

import fastlora
from fastlora.model.eject import eject
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
    with pytest.raises(
        ValueError, match=r"adapter: expected the name of one of \['b', 'c'\], since several are active: \['b', 'c'\]"
    ):
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


@pytest.mark.parametrize("keys", [["vision.layer.1.q", "^layer.1.q", "q"], ["layer.1.q", "1.q"], ["q", "layer.1.q"]])
def test_the_first_pattern_counts_in_peft_s_order(keys):
    ranks = {key: 3 + place for place, key in enumerate(keys)}
    alphas = {key: 3.0 * place for place, key in enumerate(keys, 1)}
    settings = peft.LoraConfig(
        r=2, target_modules=["q"], rank_pattern=ranks, alpha_pattern=alphas, init_lora_weights=False
    )
    theirs = peft.get_peft_model(Nested(), settings)
    mine = fastlora.from_peft(theirs)
    torch.testing.assert_close(logits(mine), logits(theirs))
    inner = theirs.base_model.model
    assert {p: layer.ranks()["weight"] for p, layer in adapted_layers(mine).items()} == {
        p: inner.get_submodule(p).r["default"] for p in adapted_layers(mine)
    }


INITS = ["gaussian", "orthogonal", "pissa", "pissa_niter_2", "OLoRA", "mica", False]


@pytest.mark.parametrize("init", INITS)
def test_every_start_of_peft(init, tmp_path, caplog):
    theirs = peft.get_peft_model(Nested(), peft.LoraConfig(r=2, target_modules=["q"], init_lora_weights=init))
    train(theirs)
    mine = fastlora.from_peft(theirs)
    torch.testing.assert_close(logits(mine), logits(theirs))
    assert ("becomes True" in caplog.text) == (init in ("pissa_niter_2", "mica"))
    fastlora.save(mine, tmp_path)
    # What took a part of the weight at random is known here alone: its files are for what it left of the base.
    base = peft.get_peft_model(Nested(), peft.LoraConfig(r=2, target_modules=["q"])).unload()
    if init == "pissa_niter_2":
        base = copy.deepcopy(theirs).unload()
    torch.testing.assert_close(logits(fastlora.load(base, tmp_path)), logits(theirs))


class TestRefused:
    def test_models_of_another_kind(self):
        with pytest.raises(TypeError, match="peft_model: expected a peft.PeftModel, got Nested"):
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

    @pytest.mark.parametrize("field", ["use_dora_of_a_convolution", "alora_invocation_tokens", "arrow_config"])
    def test_variants_by_their_field(self, field):
        wanted = {"alora_invocation_tokens": [1], "arrow_config": peft.ArrowConfig()}
        theirs = peft.get_peft_model(Nested(), peft.LoraConfig(r=2, target_modules=["q"]))
        if field in wanted:
            setattr(theirs.peft_config["default"], field, wanted[field])
            expected = f"^peft_model: PEFT's field {field}="
        else:
            base = nn.Sequential(nn.Conv2d(4, 10, 3))
            theirs = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"], use_dora=True))
            expected = "^peft_model: use_dora: True is implemented for nn.Linear and Conv1D, and '0' is a Conv2d"
        with pytest.raises(ValueError, match=expected):
            fastlora.from_peft(theirs)

    def test_other_methods(self):
        other = peft.get_peft_model(Nested(), peft.IA3Config(target_modules=["q"], feedforward_modules=[]))
        with pytest.raises(ValueError, match="peft_model: expected 'default' to be of type LORA, got IA3"):
            fastlora.from_peft(other)

    def test_adapters_of_transformers_go_by_files(self, tmp_path):
        model = make_bert()
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
        with pytest.raises(
            TypeError, match=r"expected a peft.PeftModel \(what model.add_adapter has made goes by files"
        ):
            fastlora.from_peft(model)
        with pytest.raises(ValueError, match=r"wrapped by PEFT .*model.save_pretrained\(folder\) writes its adapter"):
            fastlora.inject(model, fastlora.LoraConfig(r=2, target_modules=["query"]))
        model.save_pretrained(tmp_path)
        loaded = fastlora.load(make_bert(), tmp_path)
        assert_equal(logits(loaded), logits(model))
        assert not torch.allclose(logits(loaded), logits(make_bert()))

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


PAGE = pathlib.Path(fastlora.__file__).parent.parent / "docs" / "migration.md"


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class LoralibLinear(nn.Module):
    """loralib 0.1.2's Linear and, with ``enable``, MergedLinear: its update of the weight, as in its source."""

    def __init__(self, base, r, alpha, enable=None, transposed=False):
        super().__init__()
        self.base, self.scaling, self.enable, self.transposed = base, alpha / r, enable, transposed
        K, N = base.weight.shape if transposed else base.weight.shape[::-1]
        parts = sum(enable) if enable else 1
        rows = N // len(enable) * parts if enable else N
        self.lora_A, self.lora_B = nn.Parameter(randn(r * parts, K)), nn.Parameter(randn(rows, r, seed=1))

    def update(self):
        if not self.enable:
            return self.lora_B @ self.lora_A
        delta = F.conv1d(self.lora_A.unsqueeze(0), self.lora_B.unsqueeze(-1), groups=sum(self.enable)).squeeze(0)
        index = torch.tensor(self.enable).repeat_interleave(len(delta) // sum(self.enable))
        return delta.new_zeros(len(index), delta.shape[1]).index_put((index,), delta)

    def forward(self, x):
        return self.base(x) + self.scaling * x @ self.update().t()


def with_lora(model, names, **fields):
    """The model in another library's clothes, and the state dict of its adapters."""
    for name in names:
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, LoralibLinear(model.get_submodule(name), **fields))
    return model, {k: v.detach() for k, v in model.state_dict().items() if "lora_" in k}


def torchtune_keys(state):
    return {k.replace("lora_A", "lora_a.weight").replace("lora_B", "lora_b.weight"): v for k, v in state.items()}


NAMES = ["layer.0.q", "layer.1.k", "vision.layer.1.q"]


@torch.no_grad()
def output_of_nested(model):
    return model(randn(3, 8, seed=5))


@pytest.mark.parametrize("layout", ["loralib", "torchtune"])
def test_linears(layout):
    theirs, state = with_lora(Nested().double(), NAMES, r=3, alpha=5)
    state = state if layout == "loralib" else torchtune_keys(state)
    model = Nested().double()
    assert fastlora.load_layout(model, state, layout, lora_alpha=5) is model
    torch.testing.assert_close(output_of_nested(model), output_of_nested(theirs), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(output_of_nested(model), output_of_nested(Nested().double()))
    assert list(adapted_layers(model)) == NAMES
    fastlora.load_layout(model, state, layout, lora_alpha=10, adapter="twice")
    fastlora.set_adapter(model, "twice")
    assert adapted_layers(model)["layer.0.q"].pairs("twice")[0][2] == 10 / 3


@pytest.mark.parametrize("enable", [(True, False, True), (True, True, True), (False, True, False)])
@pytest.mark.parametrize("family", ["gpt2", "timm_vit"])
def test_merged_linear_becomes_an_adapter_for_each_part(family, enable):
    model = build(family).double()
    name = {"gpt2": "transformer.h.0.attn.c_attn", "timm_vit": "blocks.0.attn.qkv"}[family]
    layer = LoralibLinear(model.get_submodule(name), r=2, alpha=6, enable=enable, transposed=family == "gpt2")
    state = {f"{name}.lora_A": layer.lora_A.detach(), f"{name}.lora_B": layer.lora_B.detach()}
    x = randn(4, 32, seed=9)
    with torch.no_grad():
        expected = layer(x)
        fastlora.load_layout(model, state, "loralib", lora_alpha=6, enable_lora=enable)
        torch.testing.assert_close(model.get_submodule(name)(x), expected, rtol=1e-12, atol=1e-12)
    assert adapted_layers(model)[name].ranks() == {n: 2 * e for n, e in zip("qkv", enable, strict=True)}


@pytest.mark.parametrize("rename", [{"q": "layer.0.q"}, lambda path: "layer.0." + path])
def test_renamed(rename):
    state = {"q.lora_a.weight": randn(2, 8), "q.lora_b.weight": randn(8, 2)}
    model = fastlora.load_layout(Nested().double(), state, "torchtune", lora_alpha=2, rename=rename)
    assert list(adapted_layers(model)) == ["layer.0.q"]


A, B = randn(2, 8), randn(8, 2)
BAD = {
    "another layout": (dict(layout="peft"), "layout: expected one of"),
    "not a mapping": (dict(state_dict=[1]), "state_dict: expected a mapping"),
    "empty": (dict(state_dict={}), "state_dict: has no keys of loralib's layout"),
    "a bias": (
        dict(state_dict={"layer.0.q.lora_A": A, "layer.0.q.bias": A[0]}),
        "no adapters in loralib's layout: layer.0.q.bias",
    ),  # fmt: skip  # noqa: E501
    "a half": (dict(state_dict={"layer.0.q.lora_A": A}), "'layer.0.q' has no B"),
    "no matrix": (
        dict(state_dict={"layer.0.q.lora_A": A[0]}),
        r"state_dict\['layer\.0\.q\.lora_A'\]: expected a floating matrix, got torch\.float64 \(8,\)",
    ),
    "another model": (
        dict(state_dict={"layer.0.g.lora_A": A, "layer.0.g.lora_B": B}),
        r"state_dict: expected linears of Nested, got layer\.0\.g \(did you mean 'layer\.0\.q'\?\)",
    ),  # fmt: skip  # noqa: E501
    "columns": (
        dict(state_dict={"layer.0.q.lora_A": A[:, 1:], "layer.0.q.lora_B": B}),
        r"state_dict: expected A of 'layer\.0\.q' with 8 columns, got \(2, 7\)",
    ),
    "rows": (dict(state_dict={"layer.0.q.lora_A": A, "layer.0.q.lora_B": B[1:]}), "a loralib.MergedLinear needs"),
    "flags": (
        dict(enable_lora=(True, False), state_dict={"layer.0.q.lora_A": A, "layer.0.q.lora_B": B[1:]}),
        "does not go with enable_lora",
    ),  # fmt: skip  # noqa: E501
    "no qkv": (
        dict(enable_lora=(True, False), state_dict={"layer.0.q.lora_A": A, "layer.0.q.lora_B": B[:4]}),
        "enable_lora: expected a flag for each",
    ),  # fmt: skip  # noqa: E501
    "alpha": (dict(lora_alpha=float("nan")), "lora_alpha: expected a finite number"),
    "unknown rename": (
        dict(rename={"layer.0.p": "head"}),
        r"rename: expected paths in state_dict, got 'layer\.0\.p' \(did you mean 'layer\.0\.q'\?\)",
    ),
    "rename to one": (
        dict(rename=lambda path: "head"),
        r"rename: expected one name for each path, for 'layer\.0\.q' too, got 'head'",
    ),
    "rename of no kind": (dict(rename=3), "rename: expected a mapping or a function"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_and_unchanged(case):
    changed, match = BAD[case]
    good = {f"layer.0.{n}.lora_{f}": t for n in "qk" for f, t in (("A", A), ("B", B))}
    model = Nested().double()
    before = snapshot(model)
    with pytest.raises(TypeError if case in ("not a mapping", "rename of no kind") else ValueError, match=match):
        fastlora.load_layout(model, **{"state_dict": good, "layout": "loralib", "lora_alpha": 2, **changed})
    assert_same(before, snapshot(model))


@pytest.mark.filterwarnings("ignore")
def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    assert isinstance(names["peft_model"], peft.PeftModel) and names["model"][0].ranks() == {"weight": 4}
