"""The same through the launchers that people use: torchrun and Accelerate, with DDP and fully_shard."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from support.distributed_help import assert_read, optimiser, read, train_alone
from support.tracker_help import model

import fastlora

WORLD, TESTS = 2, pathlib.Path(__file__).parents[1]
FOLDERS = {"torchrun": "torchrun", "accelerate": "accelerate0", "accelerate, sharded": "accelerate1"}


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    import transformers

    folder = tmp_path_factory.mktemp("launch")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "llama")
    path = os.pathsep.join([str(pathlib.Path(fastlora.__file__).parent.parent), str(TESTS)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    script = TESTS / "support" / "distributed_script.py"
    command = ["torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD}", script, folder]
    run = subprocess.run(
        [sys.executable, "-m", *command], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(WORLD)], folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process with the data of all."""
    m = model()
    optimizer = optimiser(m)
    with fastlora.track(m, every=1) as tracker:
        losses = train_alone(m, tracker, WORLD, range(3), micros=1, optimizer=optimizer)
    folder = tmp_path_factory.mktemp("alone")
    fastlora.save(m, folder)
    return losses, read(tracker), load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("how", FOLDERS)
def test_losses_statistics_and_files_are_those_of_one_process(launched, alone, how):
    ranks, folder = launched
    losses, scores, tensors = alone
    for rank, found in enumerate(ranks):
        torch.testing.assert_close(found[how][0], losses[rank], rtol=1e-9, atol=0)
        assert_read(found[how][1], scores)
    saved = load_file(folder / FOLDERS[how] / "adapter_model.safetensors")
    assert saved.keys() == tensors.keys()
    for key, want in tensors.items():
        torch.testing.assert_close(saved[key], want, rtol=1e-7, atol=1e-9)


def test_accelerate_wrapped_as_was_meant(launched):
    for found in launched[0]:
        assert found["accelerate"][2] == "DistributedDataParallel"
        assert found["accelerate, sharded"][2].startswith("FSDP")


def test_a_tensor_parallel_plan_of_transformers_is_refused(launched):
    for found in launched[0]:
        assert "LlamaForCausalLM is split by a tensor-parallel plan (tp_plan) over 2" in found["tensor parallel"]
