"""A step of a small mixture of experts with adapters on every expert, against the frozen model and PEFT's way."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torch
from torch import nn

import fastlora

from .harness.interleave import Times, paired, spread

LAYERS, EXPERTS, ACTIVE, TOKENS, WIDTH, INNER, RANK, ROUNDS = 2, 32, 4, 512, 512, 256, 8, 15
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
LABELS = {
    "frozen": "frozen model",
    "fastlora": "fastlora",
    "experts_probes": "fastlora + probes",
    "experts_probes_step": "fastlora + probes + tracker.step()",
    "control": "fastlora again (control: same code)",
    "experts_peft": "PEFT, target_parameters",
}

needs = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("peft", "transformers")),
    reason="peft and transformers are what this compares with",
)


def frozen(dtype: torch.dtype = torch.float32) -> nn.Module:
    import transformers

    config = transformers.Qwen3MoeConfig(
        vocab_size=256, hidden_size=WIDTH, intermediate_size=INNER, moe_intermediate_size=INNER, num_experts=EXPERTS,
        num_hidden_layers=LAYERS, num_attention_heads=8, num_key_value_heads=4, head_dim=WIDTH // 8,
        num_experts_per_tok=ACTIVE, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen3MoeModel(config)
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.05)
    return model.requires_grad_(False).to(dtype)


class Step:
    """Forward and backward of a model, with the gradient of its input and of every adapter."""

    every, tracker = 1, None

    def __init__(self, name: str, model: nn.Module):
        self.name, self.model = name, model
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(1, TOKENS, WIDTH, generator=generator).requires_grad_()
        self.y = torch.empty(0)

    def forget(self) -> None:
        self.model.zero_grad()
        self.x.grad = None

    def call(self) -> None:
        y = self.model(inputs_embeds=self.x).last_hidden_state
        y.square().mean().backward()
        self.y = y.detach()


def adapted(base: nn.Module) -> nn.Module:
    """With B away from zero, the same for everybody."""
    config = fastlora.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="experts")
    model = fastlora.inject(copy.deepcopy(base), config, check="off")
    generator = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.03)
    return model


def variants(base: nn.Module) -> list[Step]:
    built = [Step("frozen", base), *(Step(name, adapted(base)) for name in ("fastlora", "control", "experts_probes"))]
    tracked = built[-1]
    tracked.tracker = fastlora.track(tracked.model, every=1)
    built.append(Step("experts_peft", fastlora.to_peft(adapted(base))))
    return built


def check(built: list[Step]) -> None:
    """Everybody computes what the model does whose weights have the updates in them, up to rounding."""
    ours = adapted(built[0].model)
    exact = Step("exact", fastlora.merge(ours, unload=True))
    exact.call()
    for step in built[1:]:
        torch.testing.assert_close(step.y, exact.y, rtol=1e-3, atol=1e-4, msg=lambda text, s=step: f"{s.name}: {text}")
        torch.testing.assert_close(step.x.grad, exact.x.grad, rtol=1e-2, atol=1e-7)


def rows(times: Times) -> list[dict[str, Any]]:
    ratios = paired(times, "frozen")
    named = ((name, own) for name, own in times.items() if name in LABELS)
    return [
        {"variant": n, "label": LABELS[n], "ms": spread([1e3 * t for t in own.values()]), "ratio_to_frozen": ratios[n]}
        for n, own in named
    ]


@needs
@pytest.mark.benchmark(group="experts")
def test_experts(interleaved, record, benchmark):
    """At most 1.15 of the frozen model's step, where PEFT, which forms every expert's update, takes about twice it."""
    built = variants(frozen())
    for step in built:
        step.call()
    check(built)
    found = interleaved(built, ROUNDS, 1, summarise=rows)
    if not benchmark.disabled:
        record({"kind": "experts", "model": f"Qwen3-MoE of width {WIDTH} / {INNER}", "layers": LAYERS,
                "experts": EXPERTS, "active": ACTIVE, "tokens": TOKENS, "rank": RANK, "rows": found})  # fmt: skip
