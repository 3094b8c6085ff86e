"""Peak memory of a LoRA-GA start, for a process of its own: ``python -m benchmarks.harness.lora_ga VARIANT``."""

from __future__ import annotations

import json
import sys

import torch
from torch import Tensor, nn

import fastlora

from . import memory

WIDTH, DEPTH, RANK, ROWS, BATCHES = 1024, 12, 8, 64, 2
GRADIENTS_BYTES = 4 * DEPTH * WIDTH * WIDTH  # of all weights in fp32
LABELS = {"fastlora": "fastlora", "peft": "PEFT"}


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def start(name: str, width: int = WIDTH, depth: int = DEPTH) -> tuple[nn.Module, object]:
    """A model, and a call that gives its adapters the start."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth))).requires_grad_(False)
    batches, targets = [torch.randn(ROWS, width) for _ in range(BATCHES)], [str(i) for i in range(depth)]
    if name == "fastlora":
        config = fastlora.LoraConfig(r=RANK, target_modules=targets, init_lora_weights="lora_ga")
        fastlora.inject(model, config)
        return model, lambda: fastlora.initialize_lora_ga(model, batches, _loss, steps=None)
    import peft
    from peft.tuners.lora.config import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    config = peft.LoraConfig(r=RANK, target_modules=targets, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())

    def as_peft() -> None:
        preprocess_loraga(model, config, lambda: [_loss(model, x).backward() for x in batches])
        peft.get_peft_model(model, config)

    return model, as_peft


def measured(name: str) -> int:
    """Bytes of resident memory that the start adds at most, in a fresh process."""
    return memory.in_child("benchmarks.harness.lora_ga", name)


if __name__ == "__main__":
    from fastlora import testing

    testing.enable_torchvision()
    torch.set_num_threads(1)
    _, warm = start(sys.argv[1], 64, 1)
    warm()
    _, call = start(sys.argv[1])
    sys.stdout.write(json.dumps(memory.resident_peak(call)) + "\n")
