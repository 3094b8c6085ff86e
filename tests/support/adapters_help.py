"""A small attention model with three adapters, and a batch for them."""

from __future__ import annotations

import torch
from torch import nn

import fastlora
from fastlora import LoraConfig


class Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.query, self.key, self.value, self.dense = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        q, k, v = self.query(x), self.key(x), self.value(x)
        return x + self.dense(torch.softmax(q @ k.transpose(-1, -2), -1) @ v)


def model(dtype=torch.float64, dropout=0.0, blocks=2):
    torch.manual_seed(0)
    m = nn.Sequential(*[Attention(8) for _ in range(blocks)], nn.Linear(8, 3)).to(dtype)
    fresh = {"init_lora_weights": False, "lora_dropout": dropout}
    fastlora.inject(m, LoraConfig(r=2, target_modules="qkv", **fresh))
    fastlora.add_adapter(m, "b", LoraConfig(r=3, target_modules="attention", **fresh))
    fastlora.add_adapter(m, "c", LoraConfig(r=1, lora_alpha=3, target_modules=["query"], **fresh))
    return m


NAMES = ("default", "b", "c")


IDS = torch.tensor([0, 2, 1, -1, 1, 0])


def batch(dtype=torch.float64):
    return torch.randn(6, 4, 8, dtype=dtype, generator=torch.Generator().manual_seed(1))


def gradients(m):
    return {n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None}
