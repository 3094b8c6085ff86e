"""The models of the zoo beside PEFT's adapters on them."""

from __future__ import annotations

import torch

from support.model_zoo import ZOO, build


@torch.no_grad()
def output(name, model):
    """PEFT's adapters on torch's encoder layers take no part in their fused path."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return ZOO[name].run(model)
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def for_peft(name):
    """A model for PEFT, told where need be to call its qkv: otherwise its owner would read the weight past PEFT's."""
    model = build(name)
    for module in model.modules():
        if hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = True
    return model


def assert_equal(mine, other):
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


FUSED = [name for name in ZOO if name.startswith(("timm", "torch", "open_clip", "gpt"))]
