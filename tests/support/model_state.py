"""What a refused call must leave alone in a model."""

from __future__ import annotations

import torch
from torch import nn


def state_of(model: nn.Module) -> dict:
    """Everything that a refused call must leave alone."""
    return {
        "bytes": {k: (id(v), v.detach().contiguous().view(-1).view(torch.uint8).clone()) for k, v in tensors(model)},
        "trainable": {n: p.requires_grad for n, p in model.named_parameters()},
        "classes": {n: (id(m), type(m), m.training) for n, m in model.named_modules()},
        "hooks": {n: (list(m._forward_hooks), list(m._forward_pre_hooks)) for n, m in model.named_modules()},
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
        "configs": dict(getattr(model, "fastlora_configs", {})),
    }


def tensors(model):
    return [*model.named_parameters(), *model.named_buffers()]


def assert_untouched(model, before):
    after = state_of(model)
    assert {k: i for k, (i, _) in after["bytes"].items()} == {k: i for k, (i, _) in before["bytes"].items()}
    assert all(torch.equal(b, before["bytes"][k][1]) for k, (_, b) in after["bytes"].items())
    for kind in ("trainable", "classes", "hooks", "attributes", "configs"):
        assert after[kind] == before[kind], kind
