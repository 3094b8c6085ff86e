"""Adapter files that are damaged, foreign or of another model: refused by name, and the model is as it was."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from support.peft_help import (
    CONFIG,
    KEY,
    SIDE,
    TENSORS,
    adapted,
    assert_close,
    assert_same,
    edit_json,
    edit_tensors,
    logits,
    make_bert,
    make_vit,
    peft,
    refused,
    saved_by_peft,
    snapshot,
)
from torch import nn

import fastlora

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Our folder and PEFT's for the same kind of adapter."""
    root = tmp_path_factory.mktemp("good")
    fastlora.save(adapted("vit", r=2, target_modules="qkv", modules_to_save=["head"]), root / "ours")
    saved_by_peft("vit", root / "theirs", r=2, target_modules=["qkv"], modules_to_save=["head"])
    return root


@pytest.fixture(params=["ours", "theirs"])
def folder(request, good, tmp_path):
    shutil.copytree(good / request.param, tmp_path / "x")
    return tmp_path / "x"


@pytest.fixture
def ours(good, tmp_path):
    shutil.copytree(good / "ours", tmp_path / "x")
    return tmp_path / "x"


@pytest.fixture
def theirs(good, tmp_path):
    shutil.copytree(good / "theirs", tmp_path / "x")
    return tmp_path / "x"


def test_truncated_at_any_length(folder):
    data = (folder / TENSORS).read_bytes()
    header = int.from_bytes(data[:8], "little")
    bare, model = make_vit(), fastlora.load(make_vit(), folder)
    end = 8 + header
    for length in (0, 1, 7, 8, 9, 8 + header // 2, end - 1, end, end + 1, len(data) - 4, len(data) - 1):
        (folder / TENSORS).write_bytes(data[:length])
        for target in (bare, model):
            refused(target, folder, f"{re.escape(str(folder / TENSORS))}: truncated")
    (folder / TENSORS).write_bytes(data + b"\0\0\0\0")
    refused(bare, folder, re.escape(str(folder / TENSORS)))


def test_damaged_header(folder):
    data = bytearray((folder / TENSORS).read_bytes())
    header = int.from_bytes(data[:8], "little")
    bare = make_vit()
    accepted = []
    for position in [*range(8), *range(8, 8 + header, 5)]:
        damaged = bytearray(data)
        damaged[position] ^= 0x15
        (folder / TENSORS).write_bytes(bytes(damaged))
        before = snapshot(bare)
        try:
            fastlora.load(bare, folder)
        except ValueError as error:
            assert str(folder) in str(error)
            assert_same(before, snapshot(bare))
        else:
            accepted.append(position)
            bare = make_vit()
    # Only what means nothing to a foreign file may be damaged unseen: the metadata and the padding.
    metadata = () if (folder / SIDE).exists() else range(8, data.index(b"}"))
    assert set(accepted) <= set(metadata), [bytes(data[p - 9 : p + 9]) for p in accepted]


def test_flipped_value_is_seen_in_our_files(ours):
    data = bytearray((ours / TENSORS).read_bytes())
    data[-3] ^= 1
    (ours / TENSORS).write_bytes(bytes(data))
    refused(make_vit(), ours, "fastlora.json: was written for other tensors")


@pytest.mark.parametrize("name", [TENSORS, CONFIG])
def test_foreign_contents(folder, name):
    for content in (b"PK\x03\x04 not this", b"\x80\x04\x95", b"\xff\xfe", b"[]", b"null", b"{", b"[" * 100000, b""):
        (folder / name).write_bytes(content)
        refused(make_vit(), folder, re.escape(str(folder / name)))


def test_missing_files(folder, tmp_path):
    refused(make_vit(), tmp_path / "nowhere", "nowhere: no such folder", FileNotFoundError)
    refused(make_vit(), folder / CONFIG, "expected a folder")
    moved = (folder / TENSORS).rename(folder / "adapter_model.bin")
    refused(make_vit(), folder, r"adapter_model\.bin: pickle files can run code")
    moved.unlink()
    refused(make_vit(), folder, re.escape(f"{folder / TENSORS}: no such file"), FileNotFoundError)
    (folder / CONFIG).unlink()
    refused(make_vit(), folder, re.escape(f"{folder / CONFIG}: no such file"), FileNotFoundError)


QKV = "blocks.1.attn.qkv"


def set_key(key, value):
    return lambda tensors: tensors.__setitem__(key, value)


BAD_TENSORS = {
    "missing A": (lambda t: t.pop(KEY.format(QKV, "A")), rf"missing key '{re.escape(KEY.format(QKV, 'A'))}'"),
    "missing module": (
        lambda t: [t.pop(KEY.format(QKV, f)) for f in "AB"],
        rf"missing: adapters of {re.escape(QKV)}, which target_modules",
    ),
    "missing head": (lambda t: t.pop("base_model.model.head.bias"), r"missing: base_model\.model\.head\.bias"),
    "unknown module": (
        lambda t: t.update({KEY.format("blocks.9.attn.qkv", f): torch.zeros(2, 2) for f in "AB"}),
        "VisionTransformer has no module of that name",
    ),
    "untargeted module": (
        lambda t: t.update({KEY.format("blocks.0.attn.proj", f): torch.zeros(24, 24) for f in "AB"}),
        r"unexpected: adapters of blocks\.0\.attn\.proj",
    ),
    "extra key": (
        set_key("base_model.model.norm.weight", torch.ones(24)),
        r"unexpected: base_model\.model\.norm\.weight",
    ),
    "no prefix": (set_key("head.weight", torch.ones(5, 24)), "unexpected: head.weight"),
    "magnitude": (set_key(f"base_model.model.{QKV}.lora_magnitude_vector", torch.ones(72)), "unexpected: base"),
    "A too wide": (
        lambda t: t.update({KEY.format(QKV, "A"): t[KEY.format(QKV, "A")].repeat(1, 2)}),
        r"has shape \((2|6), 48\), expected \((2|6), 24\)",
    ),
    "B of other rank": (set_key(KEY.format(QKV, "B"), torch.zeros(72, 5)), r"has shape \(72, 5\), expected \(72, \d\)"),
    "B of other rows": (set_key(KEY.format(QKV, "B"), torch.zeros(71, 2)), r"has shape \(71, 2\), expected \(72, \d\)"),
    "B flat": (set_key(KEY.format(QKV, "B"), torch.zeros(144)), r"expected a floating matrix"),
    "B of integers": (set_key(KEY.format(QKV, "B"), torch.zeros(72, 2).char()), "a floating matrix, got torch.int8"),
    "head of other shape": (
        set_key("base_model.model.head.weight", torch.zeros(7, 24)),
        r"head.weight' has shape \(7, 24\), expected \(5, 24\)",
    ),
    "head of integers": (
        set_key("base_model.model.head.weight", torch.zeros(5, 24, dtype=torch.int32)),
        "head.weight' is torch.int32, expected torch.float32",
    ),
    "nothing": (lambda t: t.clear(), "holds no tensors"),
    "only the head": (
        lambda t: [t.pop(KEY.format(f"blocks.{i}.attn.qkv", f)) for i in (0, 1) for f in "AB"],
        "has no keys like",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors(folder, case):
    change, match = BAD_TENSORS[case]
    model = fastlora.load(make_vit(), folder)
    edit_tensors(folder, change)
    for target in (make_vit(), model):
        assert str(folder) in refused(target, folder, match)


BAD_CONFIG = {
    "use_dora": (dict(use_dora=True), r"missing: base_model.model.blocks.[01].attn.qkv.lora_magnitude_vector"),
    "use_dora text": (dict(use_dora="yes"), "use_dora: expected true or false, got 'yes'"),
    "lora_bias": (dict(lora_bias=True), r"missing: base_model.model.blocks.[01].attn.qkv.lora_B.bias"),
    "target_parameters": (dict(target_parameters=["a.b"]), "target_parameters"),
    "tokens": (dict(trainable_token_indices=[1]), "trainable_token_indices: expected names of embeddings and linears"),
    "tokens text": (dict(trainable_token_indices="1"), "trainable_token_indices: expected one or several different"),
    "replication": (dict(layer_replication=[[0, 1]]), "layer_replication"),
    "future": (dict(some_new_thing={"a": 1}), "some_new_thing"),
    "pissa_niter": (dict(init_lora_weights="pissa_niter_4"), "init_lora_weights: expected true, false or one of"),
    "other method": (dict(peft_type="LOHA"), "peft_type: only 'LORA'"),
    "r zero": (dict(r=0), "r: expected an integer >= 1, got 0"),
    "r float": (dict(r=2.0), "r: expected an integer"),
    "r missing": (dict(r=None), "field r is missing"),
    "r other": (dict(r=3, rank_pattern={}), "shape"),
    "alpha text": (dict(lora_alpha="8"), "lora_alpha: expected a finite number"),
    "alpha huge": (dict(lora_alpha=10**400), "lora_alpha: expected a finite number"),
    "rank_pattern": (dict(rank_pattern={"qkv": True}), "rank_pattern"),
    "regex": (dict(rank_pattern={"(": 2}), "not a regular expression"),
    "regex of targets": (dict(target_modules="("), "not a regular expression"),
    "no targets": (dict(target_modules=[]), "target_modules"),
    "numbers as targets": (dict(target_modules=[1]), "target_modules: expected"),
    "other targets": (dict(target_modules=["qkv", "fc1"]), r"missing: adapters of blocks\.0\.mlp\.fc1"),
    "no such targets": (dict(target_modules=["query"]), r"unexpected: adapters of blocks\.0\.attn\.qkv"),
    "bias": (dict(bias="some"), "bias: expected"),
    "bias without tensors": (
        dict(bias="lora_only"),
        r"missing: base_model\.model\.blocks\.0\.attn\.qkv\.base_layer\.bias",
    ),
    "dropout": (dict(lora_dropout=1.0), "lora_dropout"),
    "head": (dict(modules_to_save="head"), "modules_to_save: expected a list"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CONFIG)
def test_bad_config(folder, case):
    changes, match = BAD_CONFIG[case]
    model = fastlora.load(make_vit(), folder)
    edit_json(folder, CONFIG, **changes)
    for target in (make_vit(), model):
        assert str(folder) in refused(target, folder, match)


def test_numbers_that_are_none(folder):
    text = (folder / CONFIG).read_text()
    for constant in ("NaN", "Infinity", "-Infinity", "1e999"):
        (folder / CONFIG).write_text(re.sub(r'"lora_dropout": [0-9.]+', f'"lora_dropout": {constant}', text))
        refused(make_vit(), folder, re.escape(str(folder / CONFIG)))


def test_fields_that_mean_nothing_are_accepted(theirs):
    edit_json(theirs, CONFIG, task_type="SEQ_CLS", base_model_name_or_path="x", qalora_group_size=32, future_field=None)
    fastlora.load(make_vit(), theirs)


def split_of(raw, **changes):
    split = json.loads(json.dumps(raw["split"]))
    split[QKV][0].update(changes)
    return split


BAD_SIDE = {
    "newer": (lambda raw: dict(format_version=3), "format_version 3 is newer"),
    "no version": (lambda raw: dict(format_version=None), "format_version: expected an integer"),
    "no split": (lambda raw: dict(split=None), "missing or malformed"),
    "rank": (lambda raw: dict(split=split_of(raw, rank=1)), r"ranks of sum 5, expected 72 and 6"),
    "rank below zero": (lambda raw: dict(split=split_of(raw, rank=-1)), "rank: expected"),
    "rows": (lambda raw: dict(split=split_of(raw, rows=23)), "into 71 rows"),
    "name": (lambda raw: dict(split=split_of(raw, name="x")), "splits 'blocks.1.attn.qkv' into"),
    **{
        f"name {name!r}": (
            lambda raw, name=name: dict(split=split_of(raw, name=name)), "name of a slice: expected names of slices"
        )
        for name in ("a.b", "", "bias", "forward", "start_q", 3)
    },
    "slice": (lambda raw: dict(split={**raw["split"], QKV: [{}]}), "missing or malformed"),
    "unknown matrix": (lambda raw: dict(split={**raw["split"], "blocks.7": raw["split"][QKV]}), "unexpected: split of"),
    "blocks": (lambda raw: dict(split=split_of(raw, blocks=5)), "blocks: expected a divisor of 24 rows, got 5"),
    "blocks of one slice": (lambda raw: dict(split=split_of(raw, blocks=2)), "slices of different numbers of blocks"),
    "no blocks": (lambda raw: dict(split=split_of(raw, blocks=0)), "blocks: expected"),
    "rule": (lambda raw: dict(scale={**raw["scale"], "mode": "odd"}), "scale: expected one of"),
    "head": (lambda raw: dict(modules_to_save=["norm"]), "modules_to_save"),
    "digest": (lambda raw: dict(sha256="0"), "was written for other tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_SIDE)
def test_bad_side_file(ours, case):
    change, match = BAD_SIDE[case]
    edit_json(ours, SIDE, **change(json.loads((ours / SIDE).read_text())))
    assert str(ours) in refused(make_vit(), ours, match)


def test_split_with_something_off_the_diagonal(ours):
    def fill(tensors):
        tensors[KEY.format(QKV, "B")][0, 5] = 1e-20

    edit_tensors(ours, fill)
    refused(make_vit(), ours, f"'{re.escape(QKV)}' is split in fastlora.json, and its lora_B is not block-diagonal")
    (ours / SIDE).unlink()
    assert_close(logits(fastlora.load(make_vit(), ours)), logits(peft.PeftModel.from_pretrained(make_vit(), str(ours))))


def test_models_that_do_not_fit(good):
    ours, theirs = good / "ours", good / "theirs"
    config = dict(r=2, target_modules="qkv", modules_to_save=["head"])
    inject = lambda **kwargs: fastlora.inject(make_vit(), fastlora.LoraConfig(**{**config, **kwargs}))  # noqa: E731
    refused(inject(r=3), ours, r"blocks\.0\.attn\.qkv\[k\] has rank 3 in the model and 2 in the file")
    refused(inject(), theirs, r"blocks\.1\.attn\.qkv is split into q k v in the model and one matrix in the file")
    attention = inject(target_modules="attention")
    refused(attention, ours, r"blocks\.0\.attn\.proj has rank 2 in the model and 0 in the file")
    refused(inject(modules_to_save=None), ours, r"modules_to_save are \[\] in the model and \['head'\] in the file")
    refused(inject(bias="all"), ours, r"bias is 'all' in the model and 'none' in the file")
    assert fastlora.adapter_names(fastlora.load(make_vit(), ours, adapter="b")) == ["b"]
    refused(make_bert(), ours, "BertForSequenceClassification has no module of that name")
    refused(make_vit(depth=3), theirs, r"missing: adapters of blocks\.2\.attn\.qkv")
    wrapped = peft.get_peft_model(make_vit(), peft.LoraConfig(target_modules=["qkv"]))
    refused(wrapped, ours, "wrapped by PEFT")
    with pytest.raises(TypeError, match="model: expected"):
        fastlora.load(None, ours)


def test_saved_tensors_own_their_memory_and_files_have_ordinary_modes(tmp_path):
    model = adapted("vit", r=2, target_modules="qkv", modules_to_save=["head"])
    with torch.no_grad():
        model.head.weight = nn.Parameter(model.head.weight.t().contiguous().t())
    fastlora.save(model, str(tmp_path / "deep" / "folder"))
    tensors = load_file(tmp_path / "deep" / "folder" / TENSORS)
    assert torch.equal(tensors["base_model.model.head.weight"], model.head.weight)
    (tmp_path / "plain").write_text("")
    for name in (CONFIG, TENSORS, SIDE):
        assert (tmp_path / "deep" / "folder" / name).stat().st_mode == (tmp_path / "plain").stat().st_mode
