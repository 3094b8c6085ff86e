"""``fastlora convert`` and ``inspect``: what PEFT and ``load`` read again, and the library's own errors."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.peft_help import assert_close, logits, make_vit, peft, train

import fastlora
from fastlora.cli.__main__ import main


@pytest.fixture
def ours(tmp_path):
    """A folder with a split matrix, and its logits."""
    config = fastlora.LoraConfig(r=2, lora_alpha=7, target_modules="attention", alpha_pattern={"attn.qkv[k]": 3})
    model = train(fastlora.inject(make_vit(), config))
    fastlora.save(model, tmp_path / "ours")
    return tmp_path / "ours", logits(model)


def test_ours_as_plain_files(ours, tmp_path, capsys):
    folder, wanted = ours
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 0
    assert f"wrote {len(load_file(folder / 'adapter_model.safetensors'))} tensors" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert_close(logits(peft.PeftModel.from_pretrained(make_vit(), str(tmp_path / "out"))), wanted)
    again = fastlora.load(make_vit(), tmp_path / "out")
    assert_close(logits(again), wanted)
    assert set(again.blocks[0].attn.qkv.ranks()) == {"weight"}


def test_dtype(ours, tmp_path, capsys):
    folder, _ = ours
    before = load_file(folder / "adapter_model.safetensors")
    assert main(["convert", str(folder), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(torch.equal(after[k], t.bfloat16()) for k, t in before.items()) and after.keys() == before.keys()
    before[next(iter(before))].fill_(1e6)
    save_file(before, tmp_path / "out" / "adapter_model.safetensors")
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "half"), "--dtype", "float16"]) == 2
    assert "--dtype: expected one that holds the values of" in capsys.readouterr().err
    assert not (tmp_path / "half").exists()


NAMES = {"loralib": ("lora_A", "lora_B"), "torchtune": ("lora_a.weight", "lora_b.weight")}


@pytest.mark.parametrize("layout, names", NAMES.items())
def test_other_libraries(layout, names, tmp_path):
    torch.manual_seed(0)
    paths = ["blocks.0.mlp.fc1", "blocks.1.attn.proj"]
    sizes = {"blocks.0.mlp.fc1": (96, 24, 2), "blocks.1.attn.proj": (24, 24, 3)}
    state = {}
    for path in paths:
        N, K, r = sizes[path]
        state |= {f"{path}.{names[0]}": torch.randn(r, K), f"{path}.{names[1]}": torch.randn(N, r)}
    save_file(state, tmp_path / "state.safetensors")
    wanted = logits(fastlora.load_layout(make_vit(), state, layout=layout, lora_alpha=5.0))
    command = ["convert", str(tmp_path / "state.safetensors"), str(tmp_path / "out"), "--layout", layout]
    assert main([*command, "--alpha", "5"]) == 0
    assert_close(logits(fastlora.load(make_vit(), tmp_path / "out")), wanted)
    assert_close(logits(peft.PeftModel.from_pretrained(make_vit(), str(tmp_path / "out"))), wanted)


REFUSED = {
    "no folder": "no such folder",
    "no adapter": "adapter_config.json: no such file",
    "torn": "truncated or not a safetensors file",
    "bad json": "not valid JSON",
    "two snapshots": "refs/main or one snapshot, got ['a', 'b']",
}


def broken(kind, folder):
    if kind == "no folder":
        return folder / "nothing"
    if kind == "no adapter":
        (folder / "adapter_config.json").unlink()
    elif kind == "torn":
        (folder / "adapter_model.safetensors").write_bytes(b"torn")
    elif kind == "bad json":
        (folder / "adapter_config.json").write_text("{")
    else:
        for name in "ab":
            shutil.copytree(folder, folder.parent / "cached" / "snapshots" / name)
        return folder.parent / "cached"
    return folder


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_the_librarys_own_errors(ours, kind, command, tmp_path, capsys):
    folder = broken(kind, ours[0])
    assert main([command, str(folder), *([str(tmp_path / "out")] if command == "convert" else [])]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fastlora: ") and said.count("\n") == 1 and REFUSED[kind] in said
    assert not (tmp_path / "out").exists()
    if kind != "two snapshots":
        with pytest.raises((ValueError, OSError)) as error:
            fastlora.load(make_vit(), folder)
        assert said == f"fastlora: {error.value}\n"


def test_the_only_snapshot_of_a_cache_folder(ours, tmp_path, capsys):
    shutil.copytree(ours[0], tmp_path / "cached" / "snapshots" / "0123")
    assert main(["inspect", str(tmp_path / "cached")]) == 0
    assert "blocks.0.attn.qkv[q]" in capsys.readouterr().out


def test_what_convert_refuses(ours, tmp_path, capsys):
    folder, _ = ours
    file, out = tmp_path / "state.safetensors", str(tmp_path / "out")
    save_file({"a.lora_A": torch.ones(4, 8), "a.lora_B": torch.ones(8, 2)}, file)
    for arguments, said in (
        ([str(folder), str(folder)], "OUT: expected a folder that is empty"),
        ([str(folder), out, "--alpha", "3"], "--alpha: expected a number with --layout"),
        ([str(file), out, "--layout", "loralib"], "--alpha: expected a number with --layout"),
        ([str(file), out, "--layout", "torchtune", "--alpha", "1"], "no adapters in torchtune's layout"),
        ([str(file), out, "--layout", "loralib", "--alpha", "1"], "which are not of one rank"),
        ([str(file), out, "--layout", "loralib", "--alpha", "nan"], "lora_alpha: expected a finite number"),
    ):
        assert main(["convert", *arguments]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and (folder / "fastlora.json").exists()
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
