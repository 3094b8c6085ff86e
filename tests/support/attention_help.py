"""An ``nn.MultiheadAttention`` under a name, its adapted copy, and ways to call both."""

from __future__ import annotations

import copy

import torch
from torch import nn

import fastlora
from support.helpers import config, randomise

E, H = 16, 4


class Holder(nn.Module):
    """An attention module under a name."""

    def __init__(self, **options):
        super().__init__()
        self.attn = nn.MultiheadAttention(E, H, **options)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)

    def forward(self, *args, **kwargs):
        return self.attn(*args, **kwargs)


def pair(target="attention", train=False, **options):
    """A base and its adapted copy with B not zero."""
    base = Holder(**options).train(train)
    return base, randomise(fastlora.inject(copy.deepcopy(base), config(target_modules=target)), 0.2)


def random(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]), dtype=torch.float64).to(dtype)


def mask_2d(kind, rows, columns):
    blocked = torch.ones(rows, columns, dtype=torch.bool).triu(1)
    return blocked if kind is bool else random(rows, columns).masked_fill(blocked, -torch.inf).float()


OPTIONS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no_bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True, "batch_first": True},
    "zero_attn": {"add_zero_attn": True},
    "both": {"add_zero_attn": True, "add_bias_kv": True},
}


def arguments(which, batch_first, dtype):
    L, S, N = 5, 7, 3
    shape = lambda t: (N, t, E) if batch_first else (t, N, E)  # noqa: E731
    query, key, value = (random(*shape(t), dtype=dtype) * k for t, k in ((L, 1), (S, 2), (S, 3)))
    short = key[:, :L] if batch_first else key[:L]
    found = {
        "self": (query,) * 3,
        "cross": (query, key, key),
        "apart": (query, key, value),
        "odd": (query, query, short),
    }
    return found[which]


def outputs(model, args, **kwargs):
    y, weights = model(*args, **kwargs)
    return y if weights is None else torch.cat([y.flatten(), weights.flatten()])


def run(which, batch_first, mask=None, padding=None, **kwargs):
    def call(model):
        dtype = model.attn.out_proj.weight.dtype
        args = arguments(which, batch_first, dtype)
        given = {
            "attn_mask": mask.to(dtype) if mask is not None and mask.is_floating_point() else mask,
            "key_padding_mask": padding.to(dtype) if padding is not None and padding.is_floating_point() else padding,
        }
        return outputs(model, args, **given, **kwargs)

    return call
