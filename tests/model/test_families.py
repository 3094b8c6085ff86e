"""The table of families holds: a dozen of its rows made again, and what it says as a whole."""

import logging
import pathlib

import pytest

from benchmarks.families import docs
from benchmarks.families.__main__ import COLUMNS, LIBRARIES, examined
from benchmarks.families.checks import check_slices
from benchmarks.families.models import families
from benchmarks.harness import result_files
from benchmarks.harness.machine import versions
from fastlora.model.layouts import LAYOUTS
from fastlora.model.modules import role_targets

ROOT = pathlib.Path(__file__).parents[2]
TABLE = result_files.read(ROOT / "benchmarks" / "results" / "families.json")
ROWS = TABLE["rows"]
of_the_table = pytest.mark.skipif(versions(LIBRARIES) != TABLE["of"], reason=f"the table is of {TABLE['of']}")
FAMILIES = {f"{family.library}/{family.name}": family for family in families()}
DOZEN = [
    "transformers/bert", "transformers/dbrx", "transformers/deepseek_v3", "transformers/exaone4_5_vision",
    "transformers/gpt_neox", "transformers/levit", "transformers/mamba", "transformers/minimax", "transformers/mixtral",
    "transformers/phi3", "timm/twins_svt_small", "timm/visformer_tiny", "timm/vit_tiny_patch16_224",
    "open_clip/clip", "torch/TransformerEncoder", "torchvision/maxvit",
]  # fmt: skip


@pytest.fixture(autouse=True)
def quiet():
    off = logging.root.manager.disable
    logging.disable(logging.ERROR)
    yield
    logging.disable(off)


@of_the_table
@pytest.mark.parametrize("key", DOZEN)
def test_a_row_made_again(key):
    row = examined(FAMILIES[key], seconds=300)
    assert row["roles"] and row | {"seconds": 0} == ROWS[key] | {"seconds": 0}


def test_the_dozen_asks_for_every_column_and_role():
    rows = [ROWS[key] for key in DOZEN]
    assert all(sum(row[column] == "ok" for row in rows) >= 5 for column in COLUMNS)
    assert {role for row in rows for role in row["roles"]} == {"qkv", "attention", "mlp", "mixer", "experts"}


@of_the_table
def test_every_family_has_a_row():
    assert ROWS.keys() == FAMILIES.keys()


def test_every_row_has_roles_or_a_reason():
    assert all(row["roles"] or row["reason"] for row in ROWS.values())
    wrong = {key: row["gradients"] for key, row in ROWS.items() if row["gradients"] not in ("ok", "-")}
    assert all(verdict.endswith("the model itself computes in float32 inside") for verdict in wrong.values()), wrong
    assert sum(bool(row["roles"]) for key, row in ROWS.items() if key.startswith("transformers/")) >= 90


def test_the_page_is_of_the_rows():
    assert (ROOT / "docs" / "families.md").read_text(encoding="utf-8") == docs.page(ROWS)


@pytest.mark.parametrize("key, leaf", [
    ("transformers/gpt_neox", "GPTNeoXAttention.query_key_value"), ("transformers/phi3", "Phi3MLP.gate_up_proj"),
    ("torchvision/maxvit", "RelativePositionalMultiHeadAttention.to_qkv"),
    ("timm/visformer_tiny", "visformer.Attention.qkv"),
])  # fmt: skip
def test_wrong_slices_are_noticed(key, leaf, monkeypatch):
    name = next(name for name in LAYOUTS if name.endswith(leaf))
    right = LAYOUTS[name]

    def turned(owner, N):
        slices = right(owner, N)
        return type(slices)(dict(zip(reversed(slices), slices.values(), strict=True)), slices.blocks)

    monkeypatch.setitem(LAYOUTS, name, turned)
    model = FAMILIES[key].make().double().eval()
    assert "rows of" in check_slices(model, FAMILIES[key].run)


def test_attention_whose_positions_are_projected_apart():
    model = FAMILIES["transformers/conditional_detr"].make()
    names = role_targets(model, "attention")
    owner = "decoder.layers.1.encoder_attn"
    assert {f"{owner}.{leaf}" for leaf in ("q_content_proj", "k_content_proj", "v_proj", "o_proj")} <= set(names)
