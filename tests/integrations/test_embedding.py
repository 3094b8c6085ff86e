"""Smoke tests with libraries as their users call them: ``pytest -m embedding``; docs/your_trainer.md has the table."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support import embedding_script as script
from support.peft_help import assert_close, logits, make_bert, peft, train, transformers

import fastlora

pytestmark = pytest.mark.embedding
ROOT = pathlib.Path(fastlora.__file__).parent.parent
PAGE = (ROOT / "docs" / "your_trainer.md").read_text()


def test_sentence_transformers(tmp_path):
    """Inject into the model that it holds, train with its loss, encode, save, load, merge."""
    library = pytest.importorskip("sentence_transformers", minversion="6.0")
    from sentence_transformers.base.modules.transformer import Transformer
    from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
    from sentence_transformers.sentence_transformer.modules.pooling import Pooling

    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "d"]))
    base = make_bert().bert
    base.save_pretrained(tmp_path / "bert")
    transformers.BertTokenizer(str(vocabulary)).save_pretrained(tmp_path / "bert")

    def fresh():
        words = Transformer(str(tmp_path / "bert"))
        return library.SentenceTransformer(modules=[words, Pooling(16)], device="cpu")

    model = fresh()
    fastlora.inject(model, fastlora.LoraConfig(r=2, target_modules="attention"))
    before = model.encode(["a b", "c d"])
    loss = CosineSimilarityLoss(model)
    optimizer = torch.optim.AdamW(fastlora.param_groups(model, lr_lora=1e-2))
    for _ in range(3):
        features = [model.tokenize(["a b", "c"]), model.tokenize(["c d", "a"])]
        loss(features, torch.tensor([1.0, 0.0])).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = torch.tensor(model.encode(["a b", "c d"]))
    assert not torch.allclose(after, torch.tensor(before))
    fastlora.save(model, tmp_path / "adapter")
    again = fastlora.load(fresh(), tmp_path / "adapter")
    assert_close(torch.tensor(again.encode(["a b", "c d"])), after)
    merged = fastlora.merge(again, unload=True)
    merged.save(str(tmp_path / "merged"))
    read = library.SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    torch.testing.assert_close(torch.tensor(read.encode(["a b", "c d"])), after, rtol=1e-4, atol=1e-5)


def test_accelerate_launch(tmp_path):
    """One process: on CPUs the command starts more by MPI alone. Several are in tests/distributed/test_launch.py."""
    pytest.importorskip("accelerate")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1",
               "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
    program = [str(ROOT / "tests" / "support" / "embedding_script.py"), str(tmp_path / "out")]
    run = subprocess.run(
        [sys.executable, "-m", *command, *program],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    alone = script.model()
    optimizer = torch.optim.SGD(fastlora.param_groups(alone), lr=0.1)
    script.train(alone, optimizer, [script.batch(i, 0) for i in range(3)])
    fastlora.save(alone, tmp_path / "alone")
    mine, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("alone", "out"))
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        torch.testing.assert_close(theirs[key], tensor, rtol=1e-5, atol=1e-6)


AXOLOTL = """
adapter: lora
lora_r: 4
lora_alpha: 8
lora_dropout: 0.0
lora_target_modules: [query, value]
lora_modules_to_save: [classifier]
"""


def test_a_config_as_axolotl_writes_it(tmp_path):
    """Its YAML becomes a ``peft.LoraConfig``, which ``inject`` takes; what is trained here PEFT reads."""
    told = yaml.safe_load(AXOLOTL)
    config = peft.LoraConfig(
        r=told["lora_r"], lora_alpha=told["lora_alpha"], lora_dropout=told["lora_dropout"],
        target_modules=told["lora_target_modules"], modules_to_save=told["lora_modules_to_save"], task_type="SEQ_CLS",
    )  # fmt: skip
    ours = train(fastlora.inject(make_bert(), config))
    fastlora.save(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make_bert(), str(tmp_path))
    assert_close(logits(theirs), logits(ours))


def test_a_loop_as_torchtunes_recipes_have_it(tmp_path):
    """Adapter parameters are those that are trained: a checkpoint holds them alone, loaded with ``strict=False``."""
    config = fastlora.LoraConfig(r=2, target_modules="attention")
    model = fastlora.inject(make_bert(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    ids = torch.randint(5, 40, (4, 9), generator=torch.Generator().manual_seed(0))
    for step in range(4):  # gradients of two batches a step, clipped
        (model(input_ids=ids).logits.square().mean() / 2).backward()
        if step % 2:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            scheduler.step()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    torch.save({k: v for k, v in model.state_dict().items() if k in trained}, tmp_path / "adapter.pt")
    again = fastlora.inject(make_bert(), config)
    missing = again.load_state_dict(torch.load(tmp_path / "adapter.pt"), strict=False)
    assert not missing.unexpected_keys and not trained & set(missing.missing_keys)
    assert_close(logits(again), logits(model))


def test_fsdp1_learns_and_says_nothing_false(tmp_path):
    """Processes hold empty tensors of what others hold; that is no adapter without a gradient."""
    torch.multiprocessing.spawn(script.fsdp1, (str(tmp_path),), nprocs=2)
    alone = script.model()
    trained = [p for p in alone.parameters() if p.requires_grad]
    batches = [torch.cat([script.batch(i, rank) for rank in range(2)]) for i in range(4)]
    script.train(alone, torch.optim.SGD(trained, lr=0.1), batches)
    for rank in range(2):
        said, full = torch.load(tmp_path / f"rank{rank}.pt")
        assert said == []
        own = {n: p for n, p in alone.named_parameters() if "lora_" in n}
        assert full.keys() == own.keys()
        for name, tensor in full.items():
            torch.testing.assert_close(tensor, own[name].detach(), rtol=1e-5, atol=1e-6)


def test_fsdp1_around_each_layer_or_factor_is_refused_by_name(tmp_path):
    torch.multiprocessing.spawn(script.fsdp1_of_single, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        layer, factor = torch.load(tmp_path / f"rank{rank}.pt")
        assert "lora_A.default.weight' is held in parts by FullyShardedDataParallel (FSDP1); wrap the blocks" in layer
        assert factor.startswith("model: 'lora_A.default' is wrapped by FullyShardedDataParallel (FSDP1)")


def test_the_page_says_what_ran_and_what_did_not():
    """With the versions that are here, if they are."""
    rows = dict(re.findall(r"^\| ([\w-]+) (\d[\w.]*) \|", PAGE, re.MULTILINE))
    named = "accelerate lightning sentence-transformers open-clip-torch bitsandbytes torchao deepspeed trl litgpt"
    assert set(named.split()) <= set(rows)
    for name, version in rows.items():
        try:
            assert importlib.metadata.version(name).partition("+")[0] == version
        except importlib.metadata.PackageNotFoundError:
            continue
    for name in ("Ray Train", "Liger", "Opacus", "ONNX"):
        assert name in PAGE.partition("## What was run with it")[2]
