"""diffusers, where it is there: rows of the table of families, fused projections, and the guide as it stands."""

from __future__ import annotations

import copy
import pathlib
import re

import pytest
import torch

import fastlora
from benchmarks.families import checks
from benchmarks.families.__main__ import examined
from benchmarks.families.models import families
from benchmarks.harness import result_files
from fastlora.model.layouts import LAYOUTS
from fastlora.model.modules import attention_blocks, role_targets
from fastlora.testing import enable_torchvision

enable_torchvision()
pytest.importorskip("diffusers", reason="diffusers is an extra: pip install 'fastlora-kernels[diffusers]'")

ROOT = pathlib.Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "diffusers.md"
ROWS = result_files.read(ROOT / "benchmarks" / "results" / "families.json")["rows"]
FAMILIES = {family.name: family for family in families() if family.library == "diffusers"}


@pytest.mark.parametrize("name", ["Flux2Transformer2DModel", "SD3Transformer2DModel, fused"])
def test_a_row_made_again(name):
    row = examined(FAMILIES[name], seconds=300)
    assert row["compile"] == "ok" and row | {"seconds": 0} == ROWS[f"diffusers/{name}"] | {"seconds": 0}


@pytest.mark.parametrize("name, leaf", [
    ("DiTTransformer2DModel", None), ("MochiTransformer3DModel", "attention.FeedForward.net.0.proj"),
    ("FluxTransformer2DModel, fused", "transformer_flux.FluxAttention.to_added_qkv"),
    ("Flux2Transformer2DModel", "transformer_flux2.Flux2ParallelSelfAttention.to_qkv_mlp_proj"),
    ("Flux2Transformer2DModel", "transformer_flux2.Flux2FeedForward.linear_in"),
    ("PRXTransformer2DModel", "transformer_prx.PRXAttention.txt_kv_proj"),
])  # fmt: skip
def test_wrong_slices_are_noticed(name, leaf, monkeypatch):
    model = FAMILIES[name].make().double().eval()
    if leaf is None:  # neither gates nor fused projections
        assert checks.check_slices(model, FAMILIES[name].run) == checks.NONE
        return
    assert checks.check_slices(model, FAMILIES[name].run) == checks.OK
    right = LAYOUTS[leaf]

    def turned(owner, N):
        slices = right(owner, N)
        return slices and type(slices)(dict(zip(reversed(slices), slices.values(), strict=True)), slices.blocks)

    monkeypatch.setitem(LAYOUTS, leaf, turned)
    assert "rows of" in checks.check_slices(model, FAMILIES[name].run)


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "PixArtTransformer2DModel", "FluxTransformer2DModel"])
def test_fused_projections_run_and_the_separate_ones_when_fused_no_more(name):
    family = FAMILIES[name]
    model = family.make().double().eval()
    before = role_targets(model, "attention")
    model.fuse_qkv_projections()
    separate = set(before) - set(role_targets(model, "attention"))
    assert separate and not separate & set(role_targets(model, "all-linear"))
    called = _called(model, family.run)
    assert all(set(block.names) <= called for block in attention_blocks(model)) and not called & separate
    idle = sorted(separate)[0]
    with pytest.raises(ValueError, match=rf"{re.escape(repr(idle))} cannot be adapted: .* in its place"):
        fastlora.inject(copy.deepcopy(model), fastlora.LoraConfig(r=2, target_modules=[idle]))
    model.unfuse_qkv_projections()
    assert role_targets(model, "attention") == before
    assert set(before) <= _called(model, family.run)


def _called(model, run):
    """The modules that a pass calls, by name."""
    found = set()
    handles = [m.register_forward_pre_hook(lambda m, a, n=n: found.add(n)) for n, m in model.named_modules()]
    with torch.no_grad():
        run(model)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_what_the_roles_take_runs(name):
    """Every projection that a role takes is called: none was left over by something that took its place."""
    if ROWS[f"diffusers/{name}"].get("structure"):
        pytest.skip("no small model runs in float64")
    model = FAMILIES[name].make().double().eval()
    called = _called(model, FAMILIES[name].run)
    refused = checks.refusals(model, "attention")
    idle = {n for role in ("qkv", "attention", "mlp") for n in role_targets(model, role)} - called - refused.keys()
    assert not idle


def test_the_guide_runs(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    scope, text = {"__name__": "guide"}, GUIDE.read_text(encoding="utf-8")
    for match in re.finditer(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile("\n" * text[: match.start(1)].count("\n") + match[1], str(GUIDE), "exec"), scope)
    assert {"scores", "theirs", "again", "merged"} <= scope.keys()
