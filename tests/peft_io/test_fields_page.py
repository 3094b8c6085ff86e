"""docs/migration.md has every field of ``peft.LoraConfig``, and what it says of each is what happens."""

import dataclasses
import pathlib
import re

import pytest
from support.peft_help import peft

import fastlora
from fastlora.config import LoraConfig
from fastlora.peft_io.names import parse_fields

DOCS = pathlib.Path(fastlora.__file__).parent.parent / "docs"
ROWS = dict(
    re.findall(r"^\| `(\w+)` \| (acts|no effect|refused) \|", (DOCS / "migration.md").read_text(), re.MULTILINE)
)
FIELDS = [f.name for f in dataclasses.fields(peft.LoraConfig)]
# A value that is not the default, where an integer would not do.
VALUES = {
    "target_modules": {"b"}, "exclude_modules": {"b"}, "lora_dropout": 0.25, "bias": "all", "modules_to_save": ["b"],
    "init_lora_weights": "gaussian", "rank_pattern": {"b": 2}, "alpha_pattern": {"b": 2}, "layers_pattern": "h",
    "layers_to_transform": [3], "target_parameters": ["b"], "trainable_token_indices": [3],
    **dict.fromkeys(("use_rslora", "lora_bias", "use_dora", "ensure_weight_tying"), True),
}  # fmt: skip


def given(name):
    """A config with one field set, whatever PEFT itself would say of the others."""
    config = peft.LoraConfig(target_modules=["a"])
    if name == "layers_pattern":
        config.layers_to_transform = [3]
    setattr(config, name, VALUES.get(name, 3))
    return config


def test_the_page_has_every_field():
    assert sorted(ROWS) == sorted(FIELDS)


@pytest.mark.parametrize("name", FIELDS)
def test_a_config(name):
    if ROWS[name] == "refused":
        with pytest.raises(ValueError, match=f"field {name}=3 is set and not implemented"):
            LoraConfig.coerce(given(name))
        return
    taken = LoraConfig.coerce(given(name))
    changed = [
        f.name
        for f in dataclasses.fields(LoraConfig)
        if getattr(taken, f.name) != getattr(LoraConfig.coerce(peft.LoraConfig(target_modules=["a"])), f.name)
    ]
    expected = {"layers_pattern": ["layers_to_transform", "layers_pattern"]}.get(name, [name])
    assert changed == (expected if ROWS[name] == "acts" else [])


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "peft_type"])
def test_a_file(name):
    value = VALUES.get(name, 3)
    raw = {
        "peft_type": "LORA",
        "r": 2,
        "target_modules": ["a"],
        name: sorted(value) if isinstance(value, set) else value,
    }
    if ROWS[name] == "refused":
        with pytest.raises(ValueError, match=f"PEFT's field {name}=3 is set and not implemented"):
            parse_fields(raw, "file")
    else:
        fields = parse_fields(raw, "file")
        assert getattr(fields, name, raw[name]) == raw[name]


def test_the_limits_name_those_that_are_refused():
    found = re.search(
        r"\*\*Fields of `peft.LoraConfig`\*\* that are refused: ([^.]*)\.", (DOCS / "limits.md").read_text()
    )
    assert sorted(re.findall(r"`(\w+)`", found[1])) == sorted(name for name, how in ROWS.items() if how == "refused")
