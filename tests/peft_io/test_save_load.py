"""What save writes the real PEFT loads, and what PEFT writes load loads, to the same logits; trained biases."""

import copy
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from support.peft_help import (
    CONFIG,
    KEY,
    MODELS,
    SIDE,
    TENSORS,
    Nested,
    adapted,
    assert_close,
    edit_tensors,
    logits,
    make_vit,
    peft,
    refused,
    saved_by_peft,
    train,
)
from torch import nn

import fastlora
from fastlora.nn.linear import adapted_layers

pytestmark = pytest.mark.filterwarnings("ignore")


OURS = {
    "vit split": ("vit", dict(r=4, lora_alpha=8, target_modules="qkv", modules_to_save=["head"])),
    "vit split, mixed": (
        "vit",
        dict(
            r=4, lora_alpha=6, target_modules="qkv", modules_to_save=["head"],
            rank_pattern={"blocks.0.attn.qkv[q]": 1, "blocks.0.attn.qkv[k]": 0, "blocks.1.attn.qkv[v]": 7},
            alpha_pattern={"blocks.1.attn.qkv[k]": 20, "blocks.0.attn.qkv[v]": -3.5},
        ),
    ),
    "vit split, per rank": (
        "vit",
        dict(r=4, lora_alpha=6, target_modules="qkv", scale="per_rank", rank_pattern={"blocks.0.attn.qkv[q]": 3}),
    ),
    "vit attention": ("vit", dict(r=3, lora_alpha=7, target_modules="attention", bias="all", modules_to_save=["head"])),
    "vit dense": ("vit", dict(r=4, lora_alpha=8, target_modules=["qkv", "fc1"], use_rslora=True)),
    "vit one block left out": ("vit", dict(target_modules=["qkv"], rank_pattern={"blocks.0.attn.qkv": 0})),
    "bert": (
        "bert",
        dict(
            r=4, lora_alpha=5, target_modules="all-linear", modules_to_save=["classifier"],
            rank_pattern={"layer.0.attention.self.query": 7, "bert.encoder.layer.1.output.dense": 0},
        ),
    ),
    "bert bias": ("bert", dict(r=2, target_modules="qkv", bias="lora_only", modules_to_save=["classifier"])),
    "roberta": (
        "roberta",
        dict(r=2, target_modules="qkv", bias="all", modules_to_save=["classifier"], use_rslora=True),
    ),
    "roberta pooled head": ("roberta", dict(r=2, target_modules=["query", "value"], modules_to_save=["out_proj"])),
    "tails": (
        "nested",
        dict(
            r=2, target_modules=r"(vision\.)?layer\.\d\.q|layer\.1\.k",
            rank_pattern={"layer.1.q": 5, "vision.layer.1.q": 3}, alpha_pattern={"layer.0.q": 9},
        ),
    ),
    "a tail alone": ("nested", dict(r=2, target_modules=r"layer\.1\.q", modules_to_save=["head"])),
}  # fmt: skip


@pytest.mark.parametrize("fold", [False, True], ids=["scale", "folded"])
@pytest.mark.parametrize("case", OURS)
def test_peft_loads_what_save_writes(tmp_path, case, fold):
    kind, config = OURS[case]
    model = adapted(kind, **config)
    expected = logits(model)
    assert not torch.allclose(expected, logits(MODELS[kind]()), atol=1e-3)
    fastlora.save(model, tmp_path, fold_scale=fold)

    raw = json.loads((tmp_path / CONFIG).read_text())
    assert raw["use_rslora"] is False
    assert set(raw) <= {f.name for f in peft.LoraConfig.__dataclass_fields__.values()}
    theirs = peft.PeftModel.from_pretrained(MODELS[kind](), str(tmp_path))
    assert_close(logits(theirs), expected)
    layers = {n: m for n, m in theirs.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert set(layers) == {n for n, x in fastlora.nn.linear.adapted_layers(model).items() if any(x.ranks().values())}
    if fold:
        assert all(layer.scaling["default"] == 1 for layer in layers.values())
        assert raw["lora_alpha"] == raw["r"]

    fresh = fastlora.load(MODELS[kind](), tmp_path)
    assert_close(logits(fresh), expected)
    again = fastlora.load(fastlora.inject(MODELS[kind](), fastlora.LoraConfig(**config)), tmp_path)
    assert_close(logits(again), expected)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    assert {n: p.requires_grad for n, p in again.named_parameters()} == flags
    assert all(flags[n] == p.requires_grad for n, p in fresh.named_parameters())
    if not fold:
        mine, theirs = fastlora.summary(model).rows, fastlora.summary(fresh).rows
        live = lambda rows: {r.key: (r.rank, r.scale) for r in rows if r.rank}  # noqa: E731
        assert live(mine).keys() == live(theirs).keys()
        for key, (rank, scale) in live(mine).items():
            assert live(theirs)[key] == (rank, pytest.approx(scale, rel=1e-12))


THEIRS = {
    "vit": ("vit", dict(r=4, lora_alpha=8, target_modules=["qkv"], modules_to_save=["head"])),
    "vit, bias all": ("vit", dict(r=4, lora_alpha=8, target_modules=["qkv"], modules_to_save=["head"], bias="all")),
    "vit, regex": ("vit", dict(r=4, lora_alpha=8, target_modules=r".*\.attn\.(qkv|proj)", bias="lora_only")),
    "vit, exclude": ("vit", dict(r=2, target_modules=["qkv", "fc1"], exclude_modules=["0.attn.qkv"])),
    "vit, layers": ("vit", dict(r=2, target_modules=["qkv"], layers_to_transform=[1], layers_pattern="blocks")),
    "bert, layer": ("bert", dict(r=2, target_modules=["query"], layers_to_transform=0)),
    "bert, task": ("bert", dict(r=4, lora_alpha=8, target_modules="all-linear", task_type="SEQ_CLS")),
    "bert, patterns": (
        "bert",
        dict(
            r=4, lora_alpha=8, target_modules=["query", "key"], use_rslora=True, init_lora_weights="gaussian",
            rank_pattern={"layer.0.attention.self.query": 2, "key": 7, "layer.1.*": 5},
            alpha_pattern={"^bert.encoder.layer.1.attention.self.query": 3.5, "query": 20},
        ),
    ),
    "roberta": ("roberta", dict(r=3, target_modules=["query", "dense"], modules_to_save=["classifier"], bias="all")),
    "tails": (
        "nested",
        dict(r=3, target_modules=["layer.1.q"], rank_pattern={"layer.1.q": 2}, modules_to_save=["head"]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", THEIRS)
def test_load_reads_what_peft_writes(tmp_path, case):
    kind, config = THEIRS[case]
    expected = saved_by_peft(kind, tmp_path / "a", **config)
    model = fastlora.load(MODELS[kind](), tmp_path / "a")
    assert_close(logits(model), expected)
    assert all(set(x.slices) == {"weight"} for x in fastlora.nn.linear.adapted_layers(model).values())

    fastlora.save(model, tmp_path / "b")
    assert_close(logits(peft.PeftModel.from_pretrained(MODELS[kind](), str(tmp_path / "b"))), expected)
    loaded = fastlora.load(fastlora.load(MODELS[kind](), tmp_path / "b"), tmp_path / "a")
    assert_close(logits(loaded), expected)


def test_peft_can_train_on_and_come_back(tmp_path):
    fastlora.save(adapted("vit", r=2, target_modules="qkv", modules_to_save=["head"]), tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(make_vit(), str(tmp_path / "a"), is_trainable=True)
    train(theirs)
    theirs.save_pretrained(str(tmp_path / "b"))
    assert_close(logits(fastlora.load(make_vit(), tmp_path / "b")), logits(theirs))


def test_split_leaves_block_diagonal_and_comes_back_bit_for_bit(tmp_path):
    ranks = {"blocks.0.attn.qkv[q]": 1, "blocks.0.attn.qkv[k]": 0, "blocks.0.attn.qkv[v]": 5}
    model = adapted("vit", r=3, lora_alpha=4, target_modules="qkv", rank_pattern=ranks)
    fastlora.save(model, tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    layer = model.blocks[0].attn.qkv
    A, B = tensors[KEY.format("blocks.0.attn.qkv", "A")], tensors[KEY.format("blocks.0.attn.qkv", "B")]
    assert torch.equal(A, torch.cat([layer.lora_A.default.q, layer.lora_A.default.v]))
    expected = torch.zeros(72, 6)
    expected[:24, :1], expected[48:, 1:] = layer.lora_B.default.q.detach(), layer.lora_B.default.v.detach()
    assert torch.equal(B, expected)

    loaded = fastlora.load(make_vit(), tmp_path)
    assert type(loaded.blocks[0].attn.qkv) is fastlora.nn.QKVLinear
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())
    train(loaded, steps=1)
    fastlora.save(loaded, tmp_path)
    assert fastlora.load(make_vit(), tmp_path).blocks[1].attn.qkv.ranks() == {"q": 3, "k": 3, "v": 3}


def test_untrained_split_stays_split_and_foreign_stays_dense(tmp_path):
    model = fastlora.inject(make_vit(), fastlora.LoraConfig(target_modules="qkv", r=2))
    fastlora.save(model, tmp_path)
    assert set(fastlora.load(make_vit(), tmp_path).blocks[0].attn.qkv.slices) == {"q", "k", "v"}
    (tmp_path / SIDE).unlink()
    assert set(fastlora.load(make_vit(), tmp_path).blocks[0].attn.qkv.slices) == {"weight"}
    refused(model, tmp_path, r"does not fit the model's adapter 'default': blocks\.0\.attn\.qkv is split into q k v")


def test_equal_ranks_write_one_pair_and_short_names(tmp_path):
    fastlora.save(adapted("vit", r=4, lora_alpha=6, target_modules=["qkv"]), tmp_path)
    raw = json.loads((tmp_path / CONFIG).read_text())
    assert (raw["r"], raw["lora_alpha"], raw["rank_pattern"], raw["alpha_pattern"]) == (4, 6, {}, {})
    assert raw["target_modules"] == ["qkv"] and raw["bias"] == "none" and raw["modules_to_save"] is None
    assert type(raw["lora_alpha"]) is int


def test_patterns_are_anchored_full_names(tmp_path):
    ranks = {"layer.1.q": 5, "vision.layer.1.q": 3}
    targets = r"(vision\.)?layer\.\d\.q"
    model = adapted("nested", r=2, lora_alpha=3, target_modules=targets, rank_pattern=ranks)
    fastlora.save(model, tmp_path)
    raw = json.loads((tmp_path / CONFIG).read_text())
    assert raw["rank_pattern"] == {r"^layer\.1\.q": 5, r"^vision\.layer\.1\.q": 3}
    assert raw["alpha_pattern"] == {r"^layer\.1\.q": 7.5, r"^vision\.layer\.1\.q": 4.5}
    assert raw["target_modules"] == ["q"]

    model = adapted("nested", r=2, target_modules=r"layer\.1\.q")
    fastlora.save(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == r"^(?:layer\.1\.q)$"
    model = adapted("nested", r=2, target_modules=["vision.layer.1.q", "vision.layer.0.k"])
    fastlora.save(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == ["vision.layer.0.k", "vision.layer.1.q"]


def test_set_ranks_then_save(tmp_path):
    model = fastlora.inject(make_vit(), fastlora.LoraConfig(r=4, lora_alpha=8, target_modules="qkv"))
    fastlora.set_ranks(model, {"blocks.0.attn.qkv[q]": 9, "blocks.0.attn.qkv[k]": 0, **dict.fromkeys(
        [f"blocks.1.attn.qkv[{s}]" for s in "qkv"], 0)})  # fmt: skip
    train(model)
    fastlora.save(model, tmp_path)
    assert not any("blocks.1" in key for key in load_file(tmp_path / TENSORS))
    theirs = peft.PeftModel.from_pretrained(make_vit(), str(tmp_path))
    assert_close(logits(theirs), logits(model))
    loaded = fastlora.load(make_vit(), tmp_path)
    assert_close(logits(loaded), logits(model))
    assert loaded.fastlora_configs["default"].scale == "constant"
    fastlora.load(model, tmp_path)
    fastlora.set_ranks(model, {r.key: 0 for r in fastlora.summary(model).rows}, reinit=True)
    with pytest.raises(ValueError, match="every matrix of 'default' has rank 0"):
        fastlora.save(model, tmp_path / "empty")
    assert not (tmp_path / "empty").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_adapter_dtypes(tmp_path, dtype):
    config = dict(r=4, lora_alpha=6, target_modules="qkv", adapter_dtype=dtype)
    model = fastlora.inject(make_vit().to(dtype), fastlora.LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    fastlora.save(model, tmp_path)
    assert {t.dtype for t in load_file(tmp_path / TENSORS).values()} == {dtype}
    loaded = fastlora.load(make_vit().to(dtype), tmp_path)
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())
    assert {p.dtype for n, p in loaded.named_parameters() if "lora_" in n} == {dtype}
    # PEFT reads bf16 as fp32; compared in fp32, both must be the same function.
    if dtype == torch.bfloat16:
        theirs = peft.PeftModel.from_pretrained(make_vit().to(dtype).float(), str(tmp_path))
        assert_close(logits(theirs.float()), logits(copy.deepcopy(model).float()))


def test_lossy_loading_is_told_and_overflow_refused(tmp_path, caplog):
    fastlora.save(adapted("vit", r=2, target_modules=["qkv"]), tmp_path)
    low = dict(r=2, target_modules=["qkv"], adapter_dtype=torch.float16)
    model = fastlora.inject(make_vit(), fastlora.LoraConfig(**low))
    fastlora.load(model, tmp_path)
    assert "rounded on loading" in caplog.text
    shutil.rmtree(tmp_path)
    saved_by_peft("vit", tmp_path, r=2, target_modules=["qkv"])
    edit_tensors(tmp_path, lambda t: t[KEY.format("blocks.1.attn.qkv", "A")].fill_(1e6))
    refused(model, tmp_path, r"lora_A of 'blocks.1.attn.qkv' has values too large for the model's torch.float16")


def test_importance_is_in_the_side_file_only(tmp_path):
    model = adapted("vit", r=2, target_modules="qkv")
    scores = {row.key: torch.tensor(0.5) for row in fastlora.summary(model).rows}
    fastlora.save(model, tmp_path, importance=scores)
    assert json.loads((tmp_path / SIDE).read_text())["importance"] == dict.fromkeys(scores, 0.5)
    assert "importance" not in (tmp_path / CONFIG).read_text()
    fastlora.load(make_vit(), tmp_path)
    for bad in ({"a": math.nan}, {"a": "x"}, {1: 2.0}, [1.0]):
        with pytest.raises(ValueError if isinstance(bad, dict) else TypeError, match="importance"):
            fastlora.save(model, tmp_path / "new", importance=bad)
    assert not (tmp_path / "new").exists()


def test_save_refuses_what_the_files_cannot_hold(tmp_path):
    model = adapted("vit", r=2, target_modules="qkv", modules_to_save=["head"])
    fastlora.save(model, tmp_path / "fine")
    model.norm.weight.requires_grad_(True)
    model.blocks[0].attn.proj.bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"trained parameters.*blocks\.0\.attn\.proj\.bias, norm\.weight"):
        fastlora.save(model, tmp_path / "a")
    with pytest.raises(ValueError, match="has no adapters"):
        fastlora.save(make_vit(), tmp_path / "a")
    with pytest.raises(ValueError, match=r"adapter: expected one of \['default'\], got 'b'"):
        fastlora.save(model, tmp_path / "a", adapter="b")
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module"):
        fastlora.save({}, tmp_path / "a")
    with pytest.raises(ValueError, match="no name in a file"):
        fastlora.save(fastlora.nn.Linear(4, 4, r=2), tmp_path / "a")
    shared = Nested()
    shared.layer[0]["q"] = shared.vision["layer"][0]["q"]
    fastlora.inject(shared, fastlora.LoraConfig(r=2, target_modules=["q"]))
    with pytest.raises(ValueError, match="several names"):
        fastlora.save(shared, tmp_path / "a")
    tied = Nested()
    tied.head = nn.Linear(8, 8)
    tied.head.weight = tied.layer[0]["k"].weight
    fastlora.inject(tied, fastlora.LoraConfig(r=2, target_modules=["q"]))
    tied.fastlora_configs["default"].modules_to_save = ["head"]
    with pytest.raises(ValueError, match=r"shared with 'layer\.0\.k\.weight'"):
        fastlora.save(tied, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="expected a folder"):
        fastlora.save(adapted("vit", target_modules="qkv"), tmp_path / "file")


def test_layers_built_by_hand(tmp_path):
    def make(r=3):
        torch.manual_seed(1)
        head = nn.Linear(5, 2).requires_grad_(False)
        return nn.Sequential(fastlora.nn.Linear(6, 5, r=r, lora_alpha=4), nn.ReLU(), head)

    model = make()
    nn.init.normal_(model[0].lora_B.default.weight)
    fastlora.save(model, tmp_path)
    torch.manual_seed(1)
    x = torch.randn(4, 6)
    assert_close(fastlora.load(make(), tmp_path)(x), model(x))
    refused(make(2), tmp_path, "0 has rank 2 in the model and 3 in the file")


def test_merged_compiled_and_copied_models(tmp_path):
    model = adapted("vit", r=2, target_modules="qkv")
    expected = logits(model)
    fastlora.save(torch.compile(model, backend="eager"), tmp_path / "compiled")
    fastlora.merge(model)
    fastlora.save(copy.deepcopy(model), tmp_path)
    refused(model, tmp_path, "merged")
    for path in (tmp_path, tmp_path / "compiled"):
        assert_close(logits(peft.PeftModel.from_pretrained(make_vit(), str(path))), expected)
        assert_close(logits(fastlora.load(make_vit(), path)), expected)


def test_head_that_peft_cannot_name_alone(tmp_path):
    """PEFT compares the ends of names: "classifier" also takes "pre_classifier", and needs its tensors."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.q, self.pre_classifier, self.classifier = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.classifier(self.pre_classifier(self.q(x)).relu())

    x = torch.randn(4, 8)
    model = fastlora.inject(Two(), fastlora.LoraConfig(r=2, target_modules=["q"], modules_to_save=["classifier"]))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(0, 0.3)
    fastlora.save(model, tmp_path / "a")
    assert_close(peft.PeftModel.from_pretrained(Two(), str(tmp_path / "a"))(x), model(x))
    loaded = fastlora.load(Two(), tmp_path / "a")
    assert_close(loaded(x), model(x))
    assert not loaded.pre_classifier.weight.requires_grad and loaded.classifier.weight.requires_grad
    fastlora.load(model, tmp_path / "a")

    theirs = peft.get_peft_model(Two(), peft.LoraConfig(r=2, target_modules=["q"], modules_to_save=["classifier"]))
    theirs.save_pretrained(str(tmp_path / "b"))
    assert fastlora.load(Two(), tmp_path / "b").pre_classifier.weight.requires_grad


def test_scale_of_the_file_wins(tmp_path):
    fastlora.save(adapted("vit", r=2, lora_alpha=6, target_modules="qkv"), tmp_path / "a")
    fastlora.save(adapted("vit", r=2, lora_alpha=6, target_modules="qkv"), tmp_path / "b", fold_scale=True)
    for name in "ab":
        model = fastlora.inject(make_vit(), fastlora.LoraConfig(r=2, lora_alpha=2, target_modules="qkv"))
        before = [id(p) for p in model.parameters()]
        fastlora.load(model, tmp_path / name)
        assert [id(p) for p in model.parameters()] == before
        assert_close(logits(model), logits(adapted("vit", r=2, lora_alpha=6, target_modules="qkv")))


PATH = "blocks.1.attn.qkv"
BIAS_KEY = f"base_model.model.{PATH}.bias"
FIELDS = dict(r=3, lora_alpha=6, target_modules=["qkv"], bias="lora_only")


def at_first():
    """Without a rank from the start."""
    model = fastlora.inject(make_vit(), fastlora.LoraConfig(**FIELDS, rank_pattern={PATH: 0}))
    return train(model)


def later():
    """Its rank went to zero when it had been trained."""
    model = fastlora.inject(make_vit(), fastlora.LoraConfig(**FIELDS))
    train(model)
    return fastlora.set_ranks(model, {PATH: 0}, keep=True)


EVERY = pytest.mark.parametrize("make", [at_first, later])


def bias_of(model):
    return model.get_submodule(PATH).bias


@EVERY
def test_nothing_is_lost(make, tmp_path):
    model = make()
    assert not torch.equal(bias_of(model), bias_of(make_vit())) and bias_of(model).requires_grad
    fastlora.save(model, tmp_path / "a")
    assert BIAS_KEY in load_file(tmp_path / "a" / TENSORS)
    loaded = fastlora.load(make_vit(), tmp_path / "a")
    assert torch.equal(bias_of(loaded), bias_of(model)) and bias_of(loaded).requires_grad
    assert PATH not in adapted_layers(loaded)
    assert_close(logits(loaded), logits(model))
    # Frozen for inference and saved again: still there.
    loaded.requires_grad_(False)
    fastlora.save(loaded, tmp_path / "b")
    assert (tmp_path / "b" / TENSORS).read_bytes() == (tmp_path / "a" / TENSORS).read_bytes()


@EVERY
def test_peft_takes_it(make, tmp_path):
    model = make()
    fastlora.save(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["bias"] == "lora_only"
    theirs = peft.PeftModel.from_pretrained(make_vit(), str(tmp_path))
    assert_close(logits(theirs), logits(model))
    assert_close(logits(fastlora.to_peft(model)), logits(model))


def test_a_model_that_has_the_adapter_takes_it_or_says_what_differs(tmp_path):
    model = later()
    fastlora.save(model, tmp_path / "a")
    other = at_first()
    fastlora.load(other, tmp_path / "a")
    assert torch.equal(bias_of(other), bias_of(model))
    without = fastlora.inject(make_vit(), fastlora.LoraConfig(**{**FIELDS, "target_modules": ["blocks.0.attn.qkv"]}))
    before = bias_of(without).clone()
    with pytest.raises(ValueError, match=f"{PATH}.bias is trained in the file and not in the model"):
        fastlora.load(without, tmp_path / "a")
    assert torch.equal(bias_of(without), before)
    fastlora.save(without, tmp_path / "b")
    with pytest.raises(ValueError, match=f"{PATH}.bias is trained in the model and not in the file"):
        fastlora.load(other, tmp_path / "b")


def test_what_was_frozen_stays_frozen(tmp_path):
    fastlora.save(later(), tmp_path)
    model = make_vit()
    bias_of(model).requires_grad_(False)
    fastlora.load(model, tmp_path)
    assert not bias_of(model).requires_grad


def test_without_biases_nothing_changes(tmp_path):
    model = fastlora.inject(make_vit(), fastlora.LoraConfig(**{**FIELDS, "bias": "none"}, rank_pattern={PATH: 0}))
    fastlora.save(model, tmp_path)
    assert not any(key.endswith(".bias") for key in load_file(tmp_path / TENSORS))
    assert not bias_of(model).requires_grad
