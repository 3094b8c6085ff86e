"""Finds optimizers that were built too early: before ``inject``, or before factors were replaced."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .._utils.errors import listed
from ..nn.linear import adapted_layers

logger = logging.getLogger(__name__)

_models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_looked_at: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
_hooks: list[Any] = []


def watch_optimizers(model: nn.Module) -> None:
    """Look once at each optimizer that steps from now on, whether it holds what is trained of ``model``.

    ``RuntimeError`` for one with factors that others have replaced; a warning for one that holds frozen parameters of
    the model and none of its factors, and where PEFT has frozen the factors.
    """
    _models.add(model)
    _looked_at.clear()
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling() or optimizer in _looked_at:
        return
    held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    for model in list(_models):
        _look(model, held)
    _looked_at.add(optimizer)


def _look(model: nn.Module, held: dict[int, nn.Parameter]) -> None:
    factors = {
        f"{path}.lora_{side}.{name}": p
        for path, layer in adapted_layers(model).items()
        for side, adapters in (("A", layer.lora_A), ("B", layer.lora_B))
        for name, p in adapters.named_parameters()
    }
    stale = {id(new()) for p in held.values() if (new := getattr(p, "fastlora_replaced_by", None)) is not None}
    lost = [name for name, p in factors.items() if id(p) in stale and id(p) not in held]
    if lost:
        raise RuntimeError(
            f"optimizer: holds the factors that others have replaced, so that these do not learn: {listed(lost)}; "
            "build the optimizer after fastlora.set_ranks and reallocate"
        )
    own = [p for p in model.parameters() if id(p) in held]
    by_peft = any(type(module).__module__.startswith("peft.") for module in model.modules())
    if own and by_peft and not any(p.requires_grad for p in factors.values()):
        logger.warning(
            "optimizer: peft.get_peft_model has frozen the adapters of fastlora.inject, so that these do not "
            "learn: %s; call fastlora.to_peft to go on in PEFT, or fastlora.add_adapter for another adapter",
            listed(list(factors)),
        )
        return
    if factors and own and not all(p.requires_grad for p in own) and not any(id(p) in held for p in factors.values()):
        logger.warning(
            "optimizer: holds frozen parameters of the model and none of its adapters, which this optimizer does not "
            "train; build it after fastlora.inject"
        )
