"""A model of two parameter groups, its optimiser, and a backward pass."""

from __future__ import annotations

import torch
from torch import nn


def grouped(optimizer=torch.optim.SGD, rates=(0.5, 0.1), **kwargs):
    torch.manual_seed(0)
    model = nn.ModuleDict({"lora": nn.Linear(4, 4), "head": nn.Linear(4, 2)}).double()
    groups = [{"name": n, "params": list(model[n].parameters()), "lr": lr} for n, lr in zip(model, rates, strict=True)]
    return model, optimizer(groups, **kwargs)


def backward(model, seed=0):
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)).double()
    model["head"](model["lora"](x)).square().mean().backward()
