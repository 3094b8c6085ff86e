"""A model without its adapters, as it was before ``inject``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .nn.attention import InProjection, MultiheadAttention, TransformerEncoderLayer
from .nn.conv1d import Conv1D
from .nn.foreign import ForeignLinear, original_class
from .nn.frozen import FrozenLinear
from .nn.linear import adapted_layers, detach_state
from .targets import conv1d_class

_OF_MODEL = ("fastlora_biases", "fastlora_configs", "fastlora_learning", "fastlora_policy")


def sharing_copy(model: nn.Module, own: Collection[int] = ()) -> nn.Module:
    """A deep copy whose frozen parameters are the very ones of ``model``, but for those whose ids are in ``own``."""
    shared = {id(p): p for p in model.parameters() if not p.requires_grad and id(p) not in own}
    return copy.deepcopy(model, dict(shared))


def eject(model: nn.Module) -> nn.Module:
    """Take every adapter out, in place: classes, keys and hooks are the base's again; owners keep calling their qkv.

    What an adapter trained besides (heads, biases) keeps its values. Returns the same model.
    """
    for layer in adapted_layers(model).values():
        detach_state(layer)
        if isinstance(layer, Conv1D):
            layer.__class__ = conv1d_class()
            del layer.in_features, layer.out_features
        elif isinstance(layer, ForeignLinear):
            layer.__class__ = original_class(layer)
        elif not isinstance(layer, InProjection):
            layer.__class__ = nn.Linear
    for module in model.modules():
        if type(module) is MultiheadAttention:
            module._modules.pop("in_proj", None)
            module.__class__, module.out_proj.__class__ = nn.MultiheadAttention, NonDynamicallyQuantizableLinear
        elif type(module) is TransformerEncoderLayer:
            module.__class__ = nn.TransformerEncoderLayer
        elif type(module) is FrozenLinear:
            module.__class__ = nn.Linear
            module.__dict__.pop("engine", None)
        _drop_hooks(module)
    for name in _OF_MODEL:
        model.__dict__.pop(name, None)
    return model


def _drop_hooks(module: nn.Module) -> None:
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
            del hooks[key]
            for flags in (
                module._forward_pre_hooks_with_kwargs,
                module._forward_hooks_with_kwargs,
                module._forward_hooks_always_called,
            ):
                flags.pop(key, None)


def _is_ours(hook: Callable[..., Any]) -> bool:
    owner = type(getattr(hook, "__self__", hook))
    return owner.__module__.partition(".")[0] == __package__
