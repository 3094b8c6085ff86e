"""Optimiser parameter groups by role."""

from __future__ import annotations

from typing import Any

from torch import nn

from .nn.linear import DEFAULT, adapted_layers
from .overview import saved_modules

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)


def param_groups(
    model: nn.Module, lr_lora: float = 5e-4, lr_norm: float = 1e-3, lr_head: float = 1e-3,
    weight_decay: float = 0.0, adapter: str = DEFAULT,
) -> list[dict[str, Any]]:  # fmt: skip
    """Trainable parameters as groups named lora, norm, head and other, for any torch optimiser.

    Weight decay applies to head and other; adapters and norms get 0. ``other`` takes ``lr_head``. Empty groups are left
    out. Raises ``ValueError`` without adapters.
    """
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("model: has no adapters; call fastlora.inject first")
    role: dict[int, str] = {}
    for module in model.modules():
        if isinstance(module, _NORMS) or "RMSNorm" in type(module).__name__:
            role.update((id(p), "norm") for p in module.parameters(recurse=False))
    saved = saved_modules(model, adapter)
    for name, parameter in model.named_parameters():
        if any(name.startswith(prefix + ".") for prefix in saved):
            role[id(parameter)] = "head"
    for layer in layers.values():
        role.update((id(p), "lora") for f in (layer.lora_A, layer.lora_B) for p in f.parameters())
    rates = {"lora": (lr_lora, 0.0), "norm": (lr_norm, 0.0)}
    rates |= {"head": (lr_head, weight_decay), "other": (lr_head, weight_decay)}
    groups = {n: {"name": n, "params": [], "lr": lr, "weight_decay": wd} for n, (lr, wd) in rates.items()}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[role.get(id(parameter), "other")]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]
