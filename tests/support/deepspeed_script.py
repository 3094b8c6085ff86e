"""One process of a training by DeepSpeed's engine on CPUs, and the same training without it."""

from __future__ import annotations

import os

import torch

import fastlora

from .peft_help import make_bert

STEPS = 3


def model() -> torch.nn.Module:
    base = make_bert()
    torch.manual_seed(1)
    fastlora.inject(base, fastlora.LoraConfig(r=2, target_modules="attention", init_lora_weights=False))
    return base.eval()  # without dropout, whose masks would differ


def batch() -> torch.Tensor:
    return torch.randint(5, 40, (4, 9), generator=torch.Generator().manual_seed(0))


def trained(m: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in m.named_parameters() if p.requires_grad}


def alone() -> torch.nn.Module:
    m = model()
    optimizer = torch.optim.SGD(trained(m).values(), lr=0.1)
    for _ in range(STEPS):
        m(input_ids=batch()).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return m


def engine(rank: int, stage: int, folder: str) -> None:
    """Train in two processes; the first writes what it has learned, and an adapter's files."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_SIZE="2", DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    import deepspeed

    from support.distributed_help import leave

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    m = model()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.SGD(trained(m).values(), lr=0.1)
    running, *_ = deepspeed.initialize(model=m, optimizer=optimizer, config=config)
    running.eval()
    for _ in range(STEPS):
        running.backward(running(input_ids=batch().chunk(2)[rank]).logits.square().mean())
        running.step()
    if stage == 3:
        assert all(p.numel() == 0 for p in trained(m).values())
        try:
            fastlora.save(m, folder)
        except ValueError as error:
            assert "GatheredParameters" in str(error)
        else:
            raise AssertionError("parts of parameters were saved")
    # Of parameters that are whole it does nothing.
    with deepspeed.zero.GatheredParameters(list(m.parameters())):
        if rank == 0:
            torch.save({name: p.detach().clone() for name, p in trained(m).items()}, os.path.join(folder, "learned.pt"))
            fastlora.save(m, os.path.join(folder, "adapter"))
    leave()
