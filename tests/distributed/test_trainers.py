"""fully_shard under Hugging Face's Trainer and Lightning: one process's numbers, checkpoints of shards, resumed."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from support.trainer_help import assert_same, bert, images, still, texts, trained, trained_parameters, vit
from torch import nn

import fastlora
from fastlora.integrations.hf import FastLoraCallback

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("lightning")

WORLD, TESTS = 2, pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainers")
    path = os.pathsep.join([str(pathlib.Path(fastlora.__file__).parent.parent), str(TESTS)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    script = TESTS / "support" / "distributed_trainers_script.py"
    command = ["torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD}", script, folder]
    run = subprocess.run(
        [sys.executable, "-m", *command], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(WORLD)], folder


def assert_as_alone(found, losses, parameters, scores, importance):
    for rank, (mine, got, statistics, frozen) in enumerate(found):
        assert mine == pytest.approx(losses[rank], rel=1e-5)
        for name, want in parameters.items():
            torch.testing.assert_close(got[name], want, rtol=1e-3, atol=1e-4)
        assert statistics == pytest.approx(scores, rel=1e-3)
        torch.testing.assert_close(frozen, importance, rtol=1e-3, atol=1e-6)


def test_the_trainer_of_hugging_face(launched, tmp_path):
    """Batches of 8 in one process are those of two with 4 each."""
    from support.distributed_trainers_script import OPTIONS, TRACK

    callback = FastLoraCallback(track=TRACK, penalty=0.1)
    args = transformers.TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=8, **OPTIONS)
    model = bert(dropout=0.0)
    trainer = transformers.Trainer(model=model, args=args, train_dataset=texts(), callbacks=[callback])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found = [each["hf"] for each in launched[0]][:1]  # only the first writes a log
    assert_as_alone(found, [losses], trained(model), dict(callback.tracker.scores()), callback.tracker.importance)


def test_lightning(launched):
    from support.distributed_trainers_script import TRACK

    data, model, losses = images(), still(vit()).train(), [[], []]
    optimizer = torch.optim.AdamW(trained_parameters(model), lr=1e-2)
    with fastlora.track(model, **TRACK) as tracker:
        for first in [0, 8, 16] * 2:
            for rank in range(WORLD):  # the sampler deals the samples out in turn
                batch = data[first + rank : first + 8 : 2]
                x, y = torch.stack([b["pixel_values"] for b in batch]), torch.tensor([b["labels"] for b in batch])
                loss = model(x, y)["loss"]
                losses[rank].append(loss.item())
                (loss / WORLD).backward()
            tracker.apply_penalty(0.1)
            tracker.step()
            optimizer.step()
            optimizer.zero_grad()
    found = [each["lightning"] for each in launched[0]]
    assert_as_alone(found, losses, trained(model), dict(tracker.scores()), tracker.importance)


@pytest.mark.parametrize("trainer, losses", [("hf", 4), ("lightning", 3)])
def test_resumed_bit_for_bit(launched, trainer, losses):
    for rank, found in enumerate(launched[0]):
        whole, again = found[trainer], found[f"{trainer}, resumed"]
        assert again[0] == whole[0][-losses:] and (rank or len(again[0]) == losses)
        assert_same(again[1], whole[1])
        assert again[2] == whole[2] and torch.equal(again[3], whole[3])


def test_checkpoints_of_shards_hold_no_base(launched):
    folder = launched[1]
    for place, inside, model in (
        ("hf/checkpoint-2/pytorch_model_fsdp_0", "model.", bert()),
        ("lightning/epoch=0.ckpt", "state_dict.net.", vit()),
    ):
        stored = dcp.FileSystemReader(folder / place).read_metadata().state_dict_metadata
        names = {name.removeprefix(inside) for name in stored if name.startswith(inside)}
        buffers = {name for name, _ in model.named_buffers()}
        assert names - buffers == trained(model).keys()


def test_the_trainer_s_folder_is_a_whole_adapter(launched):
    folder = launched[1] / "hf" / "checkpoint-4"
    other = bert(r=4)
    fastlora.load(other, folder)
    final = launched[0][0]["hf"][1]
    assert_same(trained(other), final)
    assert_same(load_file(folder / "model.safetensors"), final)
    assert not any(isinstance(m, nn.Module) and "FSDP" in type(m).__name__ for m in other.modules())
