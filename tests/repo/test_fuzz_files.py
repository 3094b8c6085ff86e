"""Hostile adapter folders: the fuzzer's fixed inputs, and by hand what it cannot make."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.peft_help import CONFIG, SIDE, TENSORS, edit_json, refused

import fastlora

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import fuzz_adapter_files as fuzz  # noqa: E402

pytestmark = [pytest.mark.skipif(os.name != "posix", reason="links and pipes"), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return fuzz.Target(tmp_path_factory.mktemp("fuzz").resolve())


def test_the_fixed_inputs_are_judged_right(target):
    before = sum(target.outcomes.values())
    for data in fuzz.sequence(600, seed=1):
        target.run(data)
    assert sum(target.outcomes.values()) == before + 600
    assert {"loaded", "ValueError", "FileNotFoundError"} <= set(target.outcomes)


@pytest.mark.parametrize("wrong", ["raw error", "half a load", "writes", "unpickles", "reads elsewhere"])
def test_the_fuzzer_sees_what_is_wrong(tmp_path, monkeypatch, wrong):
    """A reader that misbehaves is caught: each way once."""
    target = fuzz.Target(tmp_path.resolve())

    def load(model, folder):
        if wrong == "raw error":
            raise KeyError("weight")
        if wrong == "half a load":
            with torch.no_grad():
                model.head.weight.add_(1)
            raise ValueError(f"{folder}: too late")
        if wrong == "writes":
            (folder / "new").write_text("")
        elif wrong == "unpickles":
            pickle.loads(b"cos\ngetcwd\n.")
        else:
            Path("/etc/passwd").read_bytes()
        raise ValueError(f"{folder}: refused")

    monkeypatch.setattr(fastlora, "load", load)
    with pytest.raises((AssertionError, KeyError)):
        target.run(b"")


@pytest.fixture
def folder(tmp_path):
    fastlora.save(fuzz.adapted(), tmp_path / "x")
    return tmp_path / "x"


def test_a_huge_file_is_refused_unread(folder):
    os.truncate(folder / TENSORS, 2**40)  # sparse: nothing is on the disk
    for model in (fuzz.plain(), fuzz.adapted()):
        refused(model, folder, rf"{TENSORS}: has {2**40} bytes, expected at most")
    fastlora.save(fuzz.adapted(), folder)
    os.truncate(folder / SIDE, 2**40)
    refused(fuzz.plain(), folder, rf"{SIDE}: has {2**40} bytes, expected at most")


def test_the_largest_adapter_is_within_the_limit(tmp_path):
    """Full rank in each slice: B of a split projection is three times as wide as it has to be."""
    model = fuzz.plain()
    config = fastlora.LoraConfig(r=8, target_modules=["qkv", "proj"], split_qkv=True, adapter_dtype=torch.float64,
                                 modules_to_save=["head"])  # fmt: skip
    fastlora.save(fastlora.inject(model, config), tmp_path / "x")
    from fastlora.peft_io.load import _most_bytes

    assert (tmp_path / "x" / TENSORS).stat().st_size - 2**14 < _most_bytes(fuzz.plain()) - 2**27
    fastlora.load(fuzz.plain(), tmp_path / "x")


def test_a_scale_beyond_float32_is_refused(folder):
    """Found by the fuzzer: it loaded, and could not be saved again."""
    edit_json(folder, CONFIG, lora_alpha=1e200, alpha_pattern={})
    refused(fuzz.plain(), folder, "the scale of .* is .*, which is no float32")
    config = fastlora.LoraConfig(r=2, lora_alpha=1e308, target_modules="qkv", split_qkv=True)
    model = fastlora.inject(fuzz.plain(), config)
    with pytest.raises(ValueError, match="makes a lora_alpha that no file can hold"):
        fastlora.save(model, folder)


@pytest.mark.parametrize("name", ["../../blocks.0.attn.qkv", "/blocks.0.attn.qkv", "blocks.0.attn.qkv/../qkv", "~"])
def test_names_are_names_of_modules_and_never_paths(folder, name):
    (folder / SIDE).unlink()
    tensors = load_file(folder / TENSORS)
    for factor in "AB":
        key = f"base_model.model.blocks.0.attn.qkv.lora_{factor}.weight"
        tensors[key.replace("blocks.0.attn.qkv", name)] = tensors.pop(key)
    save_file(tensors, folder / TENSORS)
    refused(fuzz.plain(), folder, "Model has no module of that name")


def test_links_are_followed_to_files_when_reading_and_never_when_writing(folder, tmp_path):
    """A cache of downloads consists of links; a link in the place of an output is replaced, not written through."""
    (tmp_path / "cache").mkdir()
    for name in (CONFIG, TENSORS, SIDE):
        (folder / name).rename(tmp_path / name)
        (tmp_path / "cache" / name).symlink_to(tmp_path / name)
    fastlora.load(fuzz.plain(), tmp_path / "cache")
    before = {name: (tmp_path / name).read_bytes() for name in (CONFIG, TENSORS, SIDE)}
    model = fuzz.adapted()
    with torch.no_grad():
        model.head.weight.add_(1)
    fastlora.save(model, tmp_path / "cache")
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert not (tmp_path / "cache" / TENSORS).is_symlink()


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_pipes_and_devices_do_not_block_or_feed(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(fuzz.plain(), folder, "no such file", FileNotFoundError)
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    refused(fuzz.plain(), folder, "no such file", FileNotFoundError)


@pytest.mark.parametrize("name", [CONFIG, TENSORS, SIDE])
def test_a_pickle_under_any_name_is_not_run(folder, name, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    (folder / name).write_bytes(pickle.dumps(Bomb()))
    refused(fuzz.plain(), folder, name)
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    refused(fuzz.plain(), folder, name)
    assert not (tmp_path / "ran").exists()
