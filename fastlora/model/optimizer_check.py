"""Finds optimizers that train no adapter, or not all: built before they came, or while they are merged."""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .._utils.distributed import is_sharded
from .._utils.errors import listed
from ..nn.linear import adapted_layers

logger = logging.getLogger(__name__)

# By its number each model marks the factors that an optimizer has held, that came with inject, or that were told of:
# on the parameters themselves, since torch swaps none that anything refers to weakly.
_models: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_numbers = itertools.count(1)
# Number of each optimizer's next step since something has changed; 0 where nothing is left to look for.
_steps: weakref.WeakKeyDictionary[torch.optim.Optimizer, int] = weakref.WeakKeyDictionary()
_hooks: list[Any] = []
_PATIENCE = 4  # steps that an optimizer takes before it is said that others hold nothing either


def watch_optimizers(model: nn.Module, injected: bool = False) -> None:
    """Look at the optimizers that step from now on, whether they hold what is trained of ``model``.

    ``RuntimeError`` for one with factors that others have replaced; a warning for one that holds frozen parameters of
    the model and none of its factors, for one with factors of a merged model, and where PEFT has frozen the factors. Of
    factors which came after ``inject``, and have gradients, a warning where none of the optimizers holds them.
    ``injected``: those of now came with it.
    """
    if model not in _models:
        _models[model] = next(_numbers)
        if injected:
            _mark(model, _factors(model).values())
    for optimizer in list(_steps):
        _steps[optimizer] = 1
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling() or not (step := _steps.get(optimizer, 1)):
        return
    if step & (step - 1) == 0:  # 1, 2, 4, 8, ...: an adapter may rest for long before it is trained
        held = {id(p): p for p in _parameters(optimizer)}
        if not any([_look(model, held, step) for model in list(_models)]):
            step = -1
    _steps[optimizer] = step + 1


def _look(model: nn.Module, held: dict[int, nn.Parameter], step: int) -> bool:
    """Whether the model has factors left that no optimizer has held so far, and this one has something of it."""
    factors = _factors(model)
    stale = {id(_successor(p)) for p in held.values() if hasattr(p, "fastlora_place")}
    lost = [name for name, p in factors.items() if id(p) in stale and id(p) not in held]
    if lost:
        raise RuntimeError(
            f"optimizer: holds the factors that others have replaced, so that these do not learn: {listed(lost)}; "
            "build the optimizer after fastlora.set_ranks and reallocate"
        )
    own = [p for p in model.parameters() if id(p) in held]
    by_peft = step == 1 and any(type(module).__module__.startswith("peft.") for module in model.modules())
    if own and by_peft and not any(p.requires_grad for p in factors.values()):
        logger.warning(
            "optimizer: peft.get_peft_model has frozen the adapters of fastlora.inject, so that these do not "
            "learn: %s; call fastlora.to_peft to go on in PEFT, or fastlora.add_adapter for another adapter",
            listed(list(factors)),
        )
        return False
    merged = {path: layer.merged[0] for path, layer in adapted_layers(model).items() if step == 1 and layer.merged}
    if merged and any(id(p) in held and p.requires_grad for p in factors.values()):
        logger.warning(
            "optimizer: %r is merged into %s, so that the adapters which this optimizer holds get no gradient; call "
            "fastlora.unmerge before training",
            next(iter(merged.values())), listed(merged),
        )  # fmt: skip
    frozen = step == 1 and not all(p.requires_grad for p in own)
    if factors and frozen and not any(id(p) in held for p in factors.values()):
        logger.warning(
            "optimizer: holds frozen parameters of the model and none of its adapters, which this optimizer does not "
            "train; build it after fastlora.inject"
        )
        _mark(model, factors.values())
    concerned = bool(own) or any(_marked(model, p) for p in held.values())
    _mark(model, (p for p in factors.values() if id(p) in held))
    new = {n: p for n, p in factors.items() if p.requires_grad and not is_sharded(p) and not _marked(model, p)}
    if new and concerned and step >= _PATIENCE:
        elsewhere = {id(p) for optimizer in list(_steps) for p in _parameters(optimizer)}
        idle = [n for n, p in new.items() if id(p) not in elsewhere and p.grad is not None and p.grad.any()]
        if idle:
            logger.warning(
                "optimizer: none that has stepped so far holds these, which have gradients and do not learn: %s; "
                "build it after fastlora.add_adapter and set_ranks",
                listed(idle),
            )
            _mark(model, new.values())
            return False
    return concerned and bool(new)


def _mark(model: nn.Module, factors: Iterable[nn.Parameter]) -> None:
    for factor in factors:
        factor.fastlora_known = _models[model]


def _marked(model: nn.Module, factor: nn.Parameter) -> bool:
    return getattr(factor, "fastlora_known", None) == _models[model]


def _factors(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        f"{path}.lora_{side}.{name}": p
        for path, layer in adapted_layers(model).items()
        for side, adapters in (("A", layer.lora_A), ("B", layer.lora_B))
        for name, p in adapters.named_parameters()
    }


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _successor(replaced: nn.Parameter) -> nn.Parameter | None:
    """What is now in the place of a factor, through any number of changes."""
    layer, side, adapter, name = replaced.fastlora_place
    adapters = getattr(layer(), side, {})
    return adapters[adapter]._parameters.get(name) if adapter in adapters else None
