"""``fastlora merge BASE ADAPTER OUT``: a folder that transformers loads by itself, and refusals that leave none."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file
from support.helpers import randomise

import fastlora
import fastlora.testing
from fastlora.cli.__main__ import main

fastlora.testing.enable_torchvision()
transformers = pytest.importorskip("transformers")

SIZES = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32)
IDS = torch.randint(3, 32, (2, 6), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folders(tmp_path):
    """A base and an adapter on disk, and the adapted model's logits."""
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=False)).eval()
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    model = fastlora.inject(base, fastlora.LoraConfig(r=2, target_modules="attention"))
    fastlora.save(randomise(model), tmp_path / "adapter")
    with torch.no_grad():
        return tmp_path, model(input_ids=IDS).logits


def test_the_merged_folder_needs_no_adapter(folders, capsys):
    path, expected = folders
    assert main(["merge", *(str(path / name) for name in ("base", "adapter", "out"))]) == 0
    assert "merged 8 matrices" in capsys.readouterr().out
    merged = transformers.LlamaForCausalLM.from_pretrained(path / "out")
    torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    keys = load_file(path / "out" / "model.safetensors").keys()
    assert keys == load_file(path / "base" / "model.safetensors").keys()
    assert (path / "out" / "tokenizer.json").read_text() == "{}"


def test_cache_folders_of_the_hub(folders, capsys):
    path, _ = folders
    cached = path / "models--someone--something"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0123abcd")
    (cached / "snapshots" / "0123abcd").mkdir(parents=True)
    for file in (path / "adapter").iterdir():
        os.symlink(file, cached / "snapshots" / "0123abcd" / file.name)
    assert main(["inspect", str(cached)]) == 0
    assert "8 matrices, rank 16 in all" in capsys.readouterr().out
    assert main(["merge", str(path / "base"), str(cached), str(path / "out")]) == 0


@pytest.mark.parametrize("kind", ["no base", "no adapter", "another base", "unknown class", "full"])
def test_refusals_make_no_folder(folders, kind, capsys):
    path, _ = folders
    base, adapter, out = (path / name for name in ("base", "adapter", "out"))
    said = {"no base": "BASE: expected a folder with the config.json", "no adapter": "no such file",
            "another base": "adapts 'model.layers.1", "unknown class": "BASE: expected a config.json whose archi",
            "full": "OUT: expected a folder that is empty"}[kind]  # fmt: skip
    if kind == "no base":
        base = path / "nothing"
    elif kind == "no adapter":
        adapter = path / "base"
    elif kind == "another base":
        small = transformers.LlamaConfig(**{**SIZES, "num_hidden_layers": 1})
        transformers.LlamaForCausalLM(small).save_pretrained(base := path / "small")
    elif kind == "unknown class":
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, "architectures": ["OfMyOwn"]}))
    else:
        (out / "something").mkdir(parents=True)
    assert main(["merge", str(base), str(adapter), str(out)]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists() or kind == "full"
