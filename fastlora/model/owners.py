"""What changes a module's class, and what an owner needs so that it calls an adapted layer."""

from __future__ import annotations

from types import MethodType

from torch import nn

from ..nn.attention import InProjection, MultiheadAttention, TransformerEncoderLayer
from ..nn.experts import ExpertProjection, adapt
from .modules import biases_apart, kept_forwards


def change_class(module: nn.Module, new: type[nn.Module]) -> None:
    """Give a module another class. Its old forward where the instance keeps it, as accelerate's hooks do, follows."""
    kept = kept_forwards(module)
    module.__class__ = new
    for name in kept:
        setattr(module, name, MethodType(new.forward, module))


def passed_by(model: nn.Module, name: str) -> bool:
    """Whether a linear's owner may read its weight without calling it, until ``take_over`` has changed the owner."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if biases_apart(owner):
        return leaf == "qkv" and owner.q_bias is not None and not owner.qkv_bias_separate
    return type(owner) in (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def take_over(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Make the owner of an adapted layer call it: known owners get another class, or their switch is set.

    Owners further up, too: ``nn.TransformerEncoderLayer`` reads the weights of its attention's projections.
    """
    parts = name.split(".")
    for depth in range(len(parts)):
        owner = model.get_submodule(".".join(parts[:depth]))
        if type(owner) is nn.TransformerEncoderLayer:
            change_class(owner, TransformerEncoderLayer)
        elif type(owner) is nn.MultiheadAttention:
            change_class(owner, MultiheadAttention)
        if depth == len(parts) - 1:
            if isinstance(layer, ExpertProjection):
                adapt(owner, layer)
            elif isinstance(layer, InProjection) and "in_proj" not in owner._modules:
                owner.hold(layer)
            elif biases_apart(owner) and parts[-1] == "qkv":
                owner.qkv_bias_separate = True
