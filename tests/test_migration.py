"""State dicts of loralib and torchtune, against these libraries' formulas in float64; the page on migration runs."""

from __future__ import annotations

import pathlib
import re

import pytest
import torch
import torch.nn.functional as F
from model_zoo import build
from peft_help import Nested, assert_same, snapshot
from torch import nn

import fastlora
from fastlora.nn.linear import adapted_layers

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
def logits(model):
    return model(randn(3, 8, seed=5))


@pytest.mark.parametrize("layout", ["loralib", "torchtune"])
def test_linears(layout):
    theirs, state = with_lora(Nested().double(), NAMES, r=3, alpha=5)
    state = state if layout == "loralib" else torchtune_keys(state)
    model = Nested().double()
    assert fastlora.load_layout(model, state, layout, lora_alpha=5) is model
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(logits(model), logits(Nested().double()))
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
    "no matrix": (dict(state_dict={"layer.0.q.lora_A": A[0]}), "'layer.0.q.lora_A': expected a floating matrix"),
    "another model": (
        dict(state_dict={"layer.0.g.lora_A": A, "layer.0.g.lora_B": B}),
        "adapts layer.0.g, which Nested has no linear for .did you mean 'layer.0.q'",
    ),  # fmt: skip  # noqa: E501
    "columns": (dict(state_dict={"layer.0.q.lora_A": A[:, 1:], "layer.0.q.lora_B": B}), "expected 8 columns"),
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
    "unknown rename": (dict(rename={"layer.0.p": "head"}), "rename: 'layer.0.p' is not in state_dict .did you mean"),
    "rename to one": (dict(rename=lambda path: "head"), "rename: 'layer.0.q' becomes 'head'"),
    "rename of no kind": (dict(rename=3), "rename: expected a mapping or a function"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_and_unchanged(case):
    changed, match = BAD[case]
    good = {f"layer.0.{n}.lora_{f}": t for n in "qk" for f, t in (("A", A), ("B", B))}
    model = Nested().double()
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        fastlora.load_layout(model, **{"state_dict": good, "layout": "loralib", "lora_alpha": 2, **changed})
    assert_same(before, snapshot(model))


@pytest.mark.filterwarnings("ignore")
def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    assert (tmp_path / "served" / "adapter_config.json").is_file()
