"""A step of adapted layers with DoRA, against plain LoRA and PEFT's DoRA."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torch
from torch import nn

import fastlora

from .harness.interleave import Times, paired, spread

WIDTH, DEPTH, TOKENS, RANK, ROUNDS = 768, 4, 512, 8, 15
GOAL = 1.15
PAIRS = {"lora": "fastlora", "dora": "dora"}  # what PEFT does as well
LABELS = {
    "fastlora": "fastlora",
    "control": "fastlora again (control: same code)",
    "dora": "fastlora, use_dora",
    "peft_lora": "PEFT",
    "peft_dora": "PEFT, use_dora",
}


class Step:
    """Forward and backward of a model, with the gradient of its input and of every adapter."""

    every, tracker = 1, None

    def __init__(self, name: str, model: nn.Module):
        self.name, self.model = name, model
        self.x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
        self.y = torch.empty(0)

    def forget(self) -> None:
        self.model.zero_grad()
        self.x.grad = None

    def call(self) -> None:
        y = self.model(self.x)
        y.square().mean().backward()
        self.y = y.detach()


def adapted(use_dora: bool) -> nn.Module:
    """With B away from zero, the same for everybody."""
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))).requires_grad_(False)
    targets = [str(i) for i in range(DEPTH)]
    config = fastlora.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, use_dora=use_dora)
    model, generator = fastlora.inject(base, config, check="off"), torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if ".lora_" in name and "magnitude" not in name:
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.03)
    return model


def variants() -> list[Step]:
    models = {"fastlora": adapted(False), "control": adapted(False), "dora": adapted(True)}
    models |= {f"peft_{n}": fastlora.to_peft(copy.deepcopy(models[own])) for n, own in PAIRS.items()}
    return [Step(name, models[name]) for name in LABELS]


def check(built: list[Step]) -> None:
    """Outputs and input gradients of ours are PEFT's, up to rounding."""
    steps = {step.name: step for step in built}
    for name, own in PAIRS.items():
        ours, theirs = steps[own], steps[f"peft_{name}"]
        torch.testing.assert_close(ours.y, theirs.y, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
        torch.testing.assert_close(ours.x.grad, theirs.x.grad, rtol=1e-3, atol=1e-8)


def rows(times: Times) -> list[dict[str, Any]]:
    ratios = {base: paired(times, base) for base in ("fastlora", "peft_lora")}
    return [
        {"variant": n, "label": LABELS[n], "ms": spread([1e3 * t for t in own.values()]),
         **{f"ratio_to_{base}": found[n] for base, found in ratios.items()}}
        for n, own in times.items()
    ]  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed: nothing to compare with")
@pytest.mark.benchmark(group="dora")
def test_dora(interleaved, record, benchmark):
    """Ratios to plain LoRA's step, of which the goal is ``GOAL``; PEFT's DoRA forms W + s B A in each."""
    built = variants()
    for step in built:
        step.call()
    check(built)
    found = interleaved(built, ROUNDS, 1, summarise=rows)
    if not benchmark.disabled:
        record({"kind": "dora", "model": f"{DEPTH} matrices {WIDTH} x {WIDTH}", "tokens": TOKENS, "rank": RANK,
                "goal": GOAL, "rows": found})  # fmt: skip
