"""Lets owners go on changing the outputs of frozen embeddings in place under transformers' gradient checkpointing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._utils.torch_compat import forward_hooks, unsafe_view

_THEIRS = "make_inputs_require_grads"  # makes the output a leaf that requires gradients


def _changeable(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    """Forward hook: the output as no leaf, where another hook, before or after this one, would make it one.

    BLIP, BLIP-2, GIT and others add positions to it in place, which torch refuses for a leaf.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not output.is_leaf:
        return None
    if not any(getattr(hook, "__name__", "") == _THEIRS for hook in forward_hooks(module)[1].values()):
        return None
    return unsafe_view(output.requires_grad_(), output.shape)


def keep_changeable(model: nn.Module) -> None:
    """Put the hook on the embeddings of a model that transformers may checkpoint."""
    if any(callable(getattr(module, "enable_input_require_grads", None)) for module in model.modules()):
        for module in model.modules():
            if type(module) is nn.Embedding:
                module.register_forward_hook(_changeable)
