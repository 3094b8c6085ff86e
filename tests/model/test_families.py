"""The table of families holds: a dozen of its rows made again, and what it says as a whole."""

import logging
import pathlib

import pytest

from benchmarks.families import docs
from benchmarks.families.__main__ import examined
from benchmarks.families.checks import check_slices
from benchmarks.families.models import families
from benchmarks.harness import result_files
from fastlora.model.layouts import LAYOUTS

ROOT = pathlib.Path(__file__).parents[2]
ROWS = result_files.read(ROOT / "benchmarks" / "results" / "families.json")["rows"]
FAMILIES = {f"{family.library}/{family.name}": family for family in families()}
DOZEN = [
    "transformers/bert", "transformers/dbrx", "transformers/deepseek_v3", "transformers/exaone4_5_vision",
    "transformers/gpt_neox", "transformers/levit", "transformers/mamba", "transformers/minimax", "transformers/phi3",
    "timm/twins_svt_small", "timm/vit_tiny_patch16_224", "open_clip/clip", "torch/TransformerEncoder",
]  # fmt: skip


@pytest.fixture(autouse=True)
def quiet():
    off = logging.root.manager.disable
    logging.disable(logging.ERROR)
    yield
    logging.disable(off)


@pytest.mark.parametrize("key", DOZEN)
def test_a_row_made_again(key):
    row = examined(FAMILIES[key], seconds=300)
    assert row["roles"] and row | {"seconds": 0, "compile": "-"} == ROWS[key] | {"seconds": 0, "compile": "-"}


def test_every_family_has_a_row_with_roles_or_a_reason():
    assert ROWS.keys() == FAMILIES.keys()
    assert all(row["roles"] or row["reason"] for row in ROWS.values())
    assert not [key for key, row in ROWS.items() if row["gradients"] not in ("ok", "-")]
    assert sum(bool(row["roles"]) for key, row in ROWS.items() if key.startswith("transformers/")) >= 90


def test_the_page_is_of_the_rows():
    assert (ROOT / "docs" / "families.md").read_text(encoding="utf-8") == docs.page(ROWS)


@pytest.mark.parametrize("key, leaf", [("transformers/gpt_neox", "GPTNeoXAttention.query_key_value"),
                                       ("transformers/phi3", "Phi3MLP.gate_up_proj")])  # fmt: skip
def test_wrong_slices_are_noticed(key, leaf, monkeypatch):
    name = next(name for name in LAYOUTS if name.endswith(leaf))
    right = LAYOUTS[name]

    def turned(owner, N):
        slices = right(owner, N)
        return type(slices)(dict(zip(reversed(slices), slices.values(), strict=True)), slices.blocks)

    monkeypatch.setitem(LAYOUTS, name, turned)
    model = FAMILIES[key].make().double().eval()
    assert "rows of" in check_slices(model, FAMILIES[key].run)
