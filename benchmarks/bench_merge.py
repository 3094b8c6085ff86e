"""``merge`` of a model: bf16 weights against fp32 ones, and PEFT's merge of the same."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import nn

import fastlora

from .harness.interleave import Times, paired, spread

BLOCKS, WIDTH, RANK, ROUNDS = 6, 768, 16, 15
LABELS = {
    "merge_fp32": "fastlora, fp32 weights",
    "fastlora": "fastlora, bf16 weights",
    "merge_peft_fp32": "PEFT, fp32 weights",
    "merge_peft_bf16": "PEFT, bf16 weights",
}


def stack(dtype: torch.dtype) -> nn.Module:
    """Attention and feed-forward matrices of a few blocks, 7.1 M weights each."""
    torch.manual_seed(0)
    sizes = [(WIDTH, WIDTH)] * 4 + [(WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)]
    blocks = (nn.ModuleDict({f"m{i}": nn.Linear(k, n) for i, (k, n) in enumerate(sizes)}) for _ in range(BLOCKS))
    return nn.ModuleList(blocks).to(dtype)


def filled(model: nn.Module) -> nn.Module:
    """B away from zero, the same for everybody."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 32)
    return model


class Merge:
    """One merge a call; what it did is taken back outside of the time."""

    every, tracker = 1, None

    def __init__(self, name: str, dtype: torch.dtype):
        self.name = name
        fields = {"r": RANK, "lora_alpha": RANK, "target_modules": [f"m{i}" for i in range(6)]}
        self.model = filled(fastlora.inject(stack(dtype), fastlora.LoraConfig(**fields), check="off"))
        self.merged = False

    def forget(self) -> None:
        if self.merged:
            fastlora.unmerge(self.model)

    def call(self) -> None:
        fastlora.merge(self.model, progress=False)
        self.merged = True

    def weights(self) -> list[torch.Tensor]:
        return [p.detach() for n, p in self.model.named_parameters() if n.endswith(".weight") and "lora_" not in n]


class PeftMerge(Merge):
    """``merge_adapter`` of PEFT, with adapters in the dtype that it gives them."""

    def __init__(self, name: str, dtype: torch.dtype):
        import peft

        self.name = name
        config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=[f"m{i}" for i in range(6)])
        self.model = filled(peft.get_peft_model(stack(dtype), config))
        self.merged = False

    def forget(self) -> None:
        if self.merged:
            self.model.unmerge_adapter()

    def call(self) -> None:
        self.model.merge_adapter(safe_merge=True)  # which looks for what is not finite, as ours does
        self.merged = True


def rows(times: Times) -> list[dict[str, Any]]:
    ratios = paired(times, "merge_fp32")
    return [
        {
            "variant": name,
            "label": LABELS[name],
            "ms": spread([1e3 * t for t in own.values()]),
            "ratio_to_fp32": ratios[name],
        }
        for name, own in times.items()
    ]


def check(variants: list[Merge]) -> None:
    """Everybody has merged the same, up to one rounding to bf16 of a weight, or two of PEFT's."""
    exact = [w.double() for w in variants[0].weights()]
    for variant in variants:
        for mine, true in zip(variant.weights(), exact, strict=True):
            roundings = {torch.float32: 2**-20, torch.bfloat16: 2**-6}[mine.dtype]
            assert (mine.double() - true).abs().max() <= roundings * true.abs().max(), variant.name


@pytest.mark.benchmark(group="merge")
def test_merge(interleaved, record, benchmark):
    """A bf16 merge on a CPU is not slower than the fp32 merge, which moves twice the bytes."""
    variants = [Merge("merge_fp32", torch.float32), Merge("fastlora", torch.bfloat16)]
    if importlib.util.find_spec("peft") is not None:
        variants += [PeftMerge("merge_peft_fp32", torch.float32), PeftMerge("merge_peft_bf16", torch.bfloat16)]
    for variant in variants:
        variant.call()
    check(variants)
    found = interleaved(variants, ROUNDS, 1, summarise=rows)
    if not benchmark.disabled:
        count = sum(w.numel() for w in variants[0].weights())
        record({"kind": "merge", "weights": count, "matrices": 6 * BLOCKS, "rank": RANK, "rows": found})
