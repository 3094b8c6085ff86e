"""``unload`` and ``eject``, the inverses of ``inject``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .._utils.distributed import refuse_parallel
from .._utils.torch_compat import remove_forward_hooks
from .._utils.types import ModelT
from ..nn.active import NO_ADAPTERS, kept_inside, refuse_part
from ..nn.attention import InProjection, MultiheadAttention, TransformerEncoderLayer
from ..nn.experts import ExpertProjection, release
from ..nn.frozen import FrozenLinear
from ..nn.layer_view import Conv1D
from ..nn.linear import adapted_layers, detach_state
from ..nn.plain import Plain
from ..nn.quantized import QuantizedLinear, original_class
from ..nn.token_rows import LEAF, TokenRows
from ..tracking.record import records
from .freezing import give_back
from .modules import conv1d_class
from .owners import change_class

_OURS = "fastlora_"  # begins the names of what is kept on modules of other libraries
_HOOKS = [_OURS + name for name in ("saving", "loading", "loaded", "before_load", "after_load")]


def eject(model: nn.Module) -> nn.Module:
    """Remove every adapter in place: classes, keys and hooks are the base's again. Returns the same model.

    What was trained besides (heads, biases) keeps its values, and owners that were made to call their qkv still do.
    """
    for attribute in _HOOKS:
        for hook in kept_inside(model, attribute).values():
            hook.remove()
    layers = adapted_layers(model).values()
    for record in records(layers):
        record.closed = record.over = True  # the trackers have nothing left to follow
    for layer in layers:
        for kept in ("unmerged_weight", "unmerged_bias"):
            layer.__dict__.pop(kept, None)
        detach_state(layer)
        if isinstance(layer, (Conv1D, Plain)):
            change_class(layer, conv1d_class() if isinstance(layer, Conv1D) else layer.original)
            del layer.in_features, layer.out_features
        elif isinstance(layer, QuantizedLinear):
            change_class(layer, original_class(layer))
        elif isinstance(layer, ExpertProjection):
            release(layer)
        elif not isinstance(layer, InProjection):
            change_class(layer, layer.__dict__.pop("base_class", nn.Linear))
    for module in model.modules():
        if type(module) is MultiheadAttention:
            module._modules.pop("in_proj", None)
            change_class(module, nn.MultiheadAttention)
            change_class(module.out_proj, NonDynamicallyQuantizableLinear)
        elif type(module) is TransformerEncoderLayer:
            change_class(module, nn.TransformerEncoderLayer)
        elif type(module) is FrozenLinear:
            change_class(module, nn.Linear)
            module.__dict__.pop("engine", None)
        remove_forward_hooks(module, _is_ours)
        if isinstance(module._modules.get(LEAF), TokenRows):
            del module._modules[LEAF]
        for name in [name for name in vars(module) if name.startswith(_OURS)]:
            del vars(module)[name]
    return model


def unload(model: ModelT) -> ModelT:
    """Remove every adapter in place, as PEFT's ``unload``: modules are the base's, of exactly their classes.

    Weights stay as they are: the base's, or what ``merge`` has made of them. What was trained besides (heads, biases)
    keeps its values. What ``inject`` and ``add_adapter`` froze requires gradients again, which it does not in PEFT;
    what was frozen before them stays so. A tracker of the model is over; its scores stay readable. Returns the same
    model. Raises ``TypeError`` for what is no model, ``ValueError`` without adapters, for one that is sharded or
    wrapped, and for a part of the one that was adapted.

    >>> model = nn.Sequential(fastlora.nn.Linear(8, 8, r=2))
    >>> type(fastlora.unload(model)[0])
    <class 'torch.nn.modules.linear.Linear'>
    """
    refuse_parallel(model, "unload")
    if not adapted_layers(model):
        raise ValueError(NO_ADAPTERS)
    refuse_part(model, "unload")
    give_back(model)
    return eject(model)


def _is_ours(hook: Callable[..., Any]) -> bool:
    owner = getattr(hook, "__self__", None)
    made_in = getattr(hook, "__module__", "") if owner is None else type(owner).__module__
    return (made_in or "").partition(".")[0] == "fastlora"
