"""A whole training step (forward, backward, AdamW) of small real architectures, against PEFT on the same model."""

from __future__ import annotations

import copy
import importlib.util
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora

from .harness.peers import LABELS
from .harness.shapes import MODEL_TARGETS

RANK = 8
ROUNDS = 11
LABELS |= {
    "model_accelerated": "fastlora, accelerate_frozen",
    "model_probes": "fastlora + probes + tracker.step()",
}


@dataclass(frozen=True)
class Architecture:
    """Random weights of a published shape, a batch for it, and the names of its q, k, v as PEFT takes them."""

    build: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Tensor]]
    targets: list[str]
    head: str


def _deit(name: str, images: int) -> Architecture:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=10)

    return Architecture(build, lambda: {"x": torch.randn(images, 3, 224, 224)}, ["qkv"], "head")


def _minilm() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=2
    )
    return BertForSequenceClassification(config)


ARCHITECTURES = {
    "deit_tiny": _deit("deit_tiny_patch16_224", 6),
    "deit_small": _deit("deit_small_patch16_224", 3),
    "minilm": Architecture(
        _minilm, lambda: {"input_ids": torch.randint(1000, 20000, (16, 64))}, ["query", "key", "value"], "classifier"
    ),
}


class Step:
    """A model with an optimiser; ``call`` is one training step."""

    def __init__(self, name: str, model: nn.Module, batch: dict[str, Tensor], tracked: bool = False):
        self.name, self.model, self.batch = name, model.train(), batch
        self.tracker, self.every = None, 1
        self.tracked = fastlora.track(model) if tracked else None
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        self.labels = torch.zeros(next(iter(batch.values())).shape[0], dtype=torch.long)

    def forget(self) -> None:
        """Nothing is kept between steps."""

    def loss(self) -> Tensor:
        out = self.model(**self.batch)
        return nn.functional.cross_entropy(out if isinstance(out, Tensor) else out.logits, self.labels)

    def call(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()
        if self.tracked is not None:
            self.tracked.step()


def _steps(architecture: Architecture) -> list[Step]:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base, batch = architecture.build(), architecture.batch()
    # Without dropout: every variant then computes the same function.
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    frozen = copy.deepcopy(base).requires_grad_(False)
    head = getattr(frozen, architecture.head)
    head.requires_grad_(True)
    peft_config = LoraConfig(
        r=RANK, lora_alpha=16, target_modules=architecture.targets, modules_to_save=[architecture.head]
    )
    peft = get_peft_model(copy.deepcopy(base), peft_config).get_base_model()
    steps = [Step("model_head", frozen, batch), Step("peft", peft, batch)]
    ours: list[tuple[str, dict[str, Any], bool]] = [
        ("fastlora", {}, False),
        ("model_accelerated", {"accelerate_frozen": True}, False),
        ("model_probes", {}, True),
        ("control", {}, False),
    ]
    for name, options, tracked in ours:
        config = fastlora.LoraConfig(
            r=RANK, lora_alpha=16, target_modules=architecture.targets, modules_to_save=[architecture.head]
        )
        steps.append(Step(name, fastlora.inject(copy.deepcopy(base), config, **options), batch, tracked))
    return steps


@pytest.mark.skipif(
    any(importlib.util.find_spec(m) is None for m in ("peft", "timm", "transformers")), reason="peers are not installed"
)
@pytest.mark.benchmark(group="model", timer=time.thread_time)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training_step(name, interleaved, record):
    """Paired ratios of a step; the losses of PEFT and of ours agree before anything is timed (B = 0 in both)."""
    architecture = ARCHITECTURES[name]
    steps = _steps(architecture)
    with torch.no_grad():
        losses = {step.name: float(step.loss()) for step in steps}
    assert max(losses.values()) - min(losses.values()) < 1e-4 * abs(losses["peft"]), losses
    found = interleaved(steps, ROUNDS, 1)
    if found:
        tokens = {key: list(value.shape) for key, value in architecture.batch().items()}
        record({"kind": "model", "model": name, "rank": RANK, "batch": tokens, "rows": found,
                "targets": [asdict(target) for target in MODEL_TARGETS]})  # fmt: skip
