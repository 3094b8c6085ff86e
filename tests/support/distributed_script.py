"""What a user runs with ``torchrun``: plain DDP, then Accelerate with DDP and with fully_shard. Argument: a folder."""

from __future__ import annotations

import os
import sys
import warnings

import torch
import torch.distributed as dist

import fastlora
from fastlora.testing import enable_torchvision

enable_torchvision()

import accelerate  # noqa: E402
import transformers  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin  # noqa: E402

from support.distributed_help import batch, leave, optimiser, read, train_rank  # noqa: E402
from support.tracker_help import loss_of, model  # noqa: E402

STEPS = range(3)


def with_torchrun(rank, folder):
    m = model()
    parallel = torch.nn.parallel.DistributedDataParallel(m)
    optimizer = optimiser(m)
    with fastlora.track(parallel) as tracker:
        losses = train_rank(parallel, tracker, rank, STEPS, micros=1, optimizer=optimizer)
    fastlora.save(parallel, f"{folder}/torchrun")
    return losses, read(tracker)


def with_accelerate(rank, folder, sharded):
    AcceleratorState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True)
    if sharded:
        # Accelerate turns FSDP on for accelerators only; its code is the same on a CPU.
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=100, cpu_ram_efficient_loading=False
        )
        AcceleratorState._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    m = model()
    prepared, optimizer = accelerator.prepare(m, optimiser(m))
    losses = []
    with fastlora.track(prepared, every=1) as tracker:
        for step in STEPS:
            loss = loss_of(prepared, batch(step, 0, rank))
            accelerator.backward(loss)
            tracker.step()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    fastlora.save(prepared, f"{folder}/accelerate{int(sharded)}")
    return losses, read(tracker), type(prepared).__name__


def tensor_parallel(folder):
    """What inject says to a model that transformers split by its plan."""
    warnings.simplefilter("ignore")
    m = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/llama", tp_plan="auto")
    try:
        fastlora.inject(m, fastlora.LoraConfig(r=2, target_modules="qkv"))
    except ValueError as error:
        return str(error)


def main(folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = {
        "torchrun": with_torchrun(rank, folder),
        "accelerate": with_accelerate(rank, folder, sharded=False),
        "accelerate, sharded": with_accelerate(rank, folder, sharded=True),
        "tensor parallel": tensor_parallel(folder),
    }
    torch.save(found, os.path.join(folder, f"rank{rank}.pt"))
    dist.barrier()
    leave()


if __name__ == "__main__":
    main(sys.argv[1])
