"""A whole training step: DeiT-Base at batch 128, and eight layers of a Llama-3-8B at 4 x 2048 tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import fastlora

from .cases import ALPHA, PROBES, compiled

RANK = 8
# What a whole model is timed with, in the order in which it is.
MODEL_VARIANTS = ("frozen", "fastlora", "fastlora_probe", "peft_bf16", "peft_default", "peft_compiled")


@dataclass(frozen=True)
class ModelCase:
    """A model, and the tokens of one step of it."""

    name: str
    build: Callable[[], tuple[nn.Module, Callable[[str], Any]]]
    targets: tuple[str, ...]
    first_norm: str
    tokens: int

    def work(self, parameters: int) -> tuple[float, float]:
        """(operations, least bytes) of a step in bf16: y and dx of every frozen matrix, each read twice."""
        return 4.0 * parameters * self.tokens, 4.0 * parameters


def _deit(tiny: bool) -> ModelCase:
    side, batch = (32, 4) if tiny else (224, 128)

    def build():
        from timm.models.vision_transformer import VisionTransformer

        size = {"embed_dim": 32, "depth": 2, "num_heads": 2} if tiny else {}
        model = VisionTransformer(img_size=side, patch_size=16, num_classes=1000, **size)
        return model, lambda device: {
            "x": torch.randn(batch, 3, side, side, device=device),
            "labels": torch.randint(1000, (batch,), device=device),
        }

    return ModelCase("deit_base_step", build, ("qkv",), "blocks.0.norm1", batch * ((side // 16) ** 2 + 1))


def _llama(tiny: bool) -> ModelCase:
    batch, length = (2, 16) if tiny else (4, 2048)

    def build():
        from transformers import LlamaConfig, LlamaForCausalLM

        width, heads = (32, 4) if tiny else (4096, 32)
        config = LlamaConfig(
            vocab_size=128 if tiny else 32000,
            hidden_size=width,
            intermediate_size=width * 7 // 2,
            num_hidden_layers=2 if tiny else 8,
            num_attention_heads=heads,
            num_key_value_heads=heads // 4,
            use_cache=False,
        )
        size = (batch, length)
        return LlamaForCausalLM(config), lambda device: {
            "x": torch.randint(config.vocab_size, size, device=device),
            "labels": torch.randint(config.vocab_size, size, device=device),
        }

    targets = ("q_proj", "k_proj", "v_proj")
    return ModelCase("llama_8_layers_step", build, targets, "model.layers.0.input_layernorm", batch * length)


def model_cases(tiny: bool) -> dict[str, ModelCase]:
    return {case.name: case for case in (_deit(tiny), _llama(tiny))}


class TrainingStep:
    """Forward, cross-entropy, backward and AdamW of one variant of a model."""

    def __init__(self, case: ModelCase, variant: str, device: str, dtype: torch.dtype):
        torch.manual_seed(0)
        with torch.device(device):
            model, inputs = case.build()
        model = model.to(dtype).requires_grad_(False)
        self.parameters = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
        self.tracker = None
        if variant == "frozen":
            # Training the first norm alone sends the gradient through every layer.
            model.get_submodule(case.first_norm).requires_grad_()
        elif variant.startswith("peft"):
            model = _with_peft(model, case, variant)
        else:
            config = fastlora.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="qkv")
            fastlora.inject(model, config, check="off")
            if variant == "fastlora_probe":
                self.tracker = fastlora.track(model, statistics=("grad_sq",), probes=PROBES)
        self.model, given = model, inputs(device)
        self.x, self.labels = given["x"], given["labels"]
        self.x = self.x.to(dtype) if self.x.is_floating_point() else self.x
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, capturable=device != "cpu", foreach=True)

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        out = self.model(self.x)
        logits = getattr(out, "logits", out)
        torch.nn.functional.cross_entropy(logits.flatten(0, -2), self.labels.flatten()).backward()
        self.optimizer.step()
        if self.tracker is not None:
            self.tracker.step()


def _with_peft(model: nn.Module, case: ModelCase, variant: str) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(case.targets))
    base = get_peft_model(model, config, autocast_adapter_dtype=variant == "peft_default").get_base_model()
    return compiled(base) if variant == "peft_compiled" else base
