"""What can carry an adapter, under which name, and what its owner needs so that the adapter is not passed by."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .nn.attention import InProjection, MultiheadAttention, StackedProjection, TransformerEncoderLayer
from .nn.conv1d import Conv1D
from .nn.foreign import foreign_base, foreign_class
from .nn.linear import Linear, QKVLinear

_CONV1D = ("transformers.pytorch_utils", "Conv1D")

# timm's owners of a fused qkv with biases apart: they multiply by qkv.weight themselves unless told that the biases are
# added to what qkv returns (timm 0.9.9 and later).
_BIAS_APART = (
    ("timm.models.beit", "Attention"),
    ("timm.models.eva", "EvaAttention"),
    ("timm.models.swin_transformer_v2", "WindowAttention"),
)


def class_name(module: Any) -> tuple[str, str]:
    """(module, name) of a class, which tells it without importing its library."""
    kind = type(module)
    return kind.__module__, kind.__qualname__


def conv1d_class() -> type[nn.Module]:
    """The class of transformers that ``Conv1D`` was before it had an adapter."""
    return getattr(importlib.import_module(_CONV1D[0]), _CONV1D[1])


def is_linear(module: Any) -> bool:
    """Whether a module multiplies by one weight matrix: ``nn.Linear``, or transformers' ``Conv1D``."""
    return isinstance(module, nn.Linear) or class_name(module) == _CONV1D


def features(module: nn.Module) -> tuple[int, int]:
    """(K, N) of a linear."""
    return tuple(module.weight.shape) if class_name(module) == _CONV1D else (module.in_features, module.out_features)


def adapted_class(module: nn.Module, split: bool) -> type[Linear] | None:
    """The class that a linear becomes, or None where it is not known what its kind of linear does."""
    if class_name(module) == _CONV1D:
        return Conv1D
    if foreign_base(module) is not None:
        return foreign_class(module)
    if type(module) is StackedProjection:
        return InProjection
    if type(module) in (nn.Linear, NonDynamicallyQuantizableLinear):
        return QKVLinear if split else Linear
    return None


def named_targets(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by name, and ``<path>.in_proj`` for the stacked projection of an ``nn.MultiheadAttention``."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        found.setdefault(name, module)
        if isinstance(module, nn.MultiheadAttention) and "in_proj" not in module._modules:
            found[f"{name}.in_proj" if name else "in_proj"] = StackedProjection(module)
    return found


def torch_attentions(model: nn.Module) -> list[str]:
    """Names of the ``nn.MultiheadAttention`` modules."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]


def biases_apart(owner: nn.Module) -> bool:
    """Whether an owner adds the biases of its qkv itself and can be told to call qkv."""
    return class_name(owner) in _BIAS_APART and hasattr(owner, "qkv_bias_separate")


def passed_by(model: nn.Module, name: str) -> bool:
    """Whether the owner of a linear may read its weight as things are: ``take_over`` has not been here."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if biases_apart(owner):
        return leaf == "qkv" and owner.q_bias is not None and not owner.qkv_bias_separate
    return type(owner) in (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def take_over(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Make the owner of an adapted layer call it: known owners change their class or are told to.

    Owners up the tree come too, because ``nn.TransformerEncoderLayer`` reads the weights of its attention's children.
    """
    parts = name.split(".")
    for depth in range(len(parts)):
        owner = model.get_submodule(".".join(parts[:depth]))
        if type(owner) is nn.TransformerEncoderLayer:
            owner.__class__ = TransformerEncoderLayer
        elif type(owner) is nn.MultiheadAttention:
            owner.__class__ = MultiheadAttention
        if depth == len(parts) - 1:
            if isinstance(layer, InProjection) and "in_proj" not in owner._modules:
                owner.hold(layer)
            elif biases_apart(owner) and parts[-1] == "qkv":
                owner.qkv_bias_separate = True
