"""Finds trainable adapters that rest under DistributedDataParallel, which waits for their gradients in vain."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch
from torch import nn

from .._utils.distributed import running_ddp
from ..nn.linear import adapted_layers

logger = logging.getLogger(__name__)


class RestingCheck:
    """Hook of a model with several adapters: looks once at each adapter that a DDP wrapper runs.

    ``RuntimeError`` where the active adapter runs and another is trainable; a warning in ``use_adapters``, since
    further forwards before the backward may run the others.
    """

    def __init__(self) -> None:
        self.seen: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple:
        return RestingCheck, ()

    def __call__(self, model: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        ddp = running_ddp(model)
        if ddp is None or ddp.find_unused_parameters or ddp.static_graph or not ddp.require_backward_grad_sync:
            return
        layers = adapted_layers(model)
        router = next(iter(layers.values())).router
        route, seen = router.current(), self.seen.setdefault(ddp, set())
        if not route.enabled or route.batch is not None or route.adapter in seen:
            return
        resting = {
            name
            for layer in layers.values()
            for side in (layer.lora_A, layer.lora_B)
            for name, factors in side.items()
            if name != route.adapter and any(p.requires_grad for p in factors.parameters())
        }
        if resting:
            text = (
                f"model: {route.adapter!r} runs alone, and DistributedDataParallel waits for gradients of "
                f"{sorted(resting)}, too, so that the next step fails; freeze their factors before the model is "
                "wrapped, or wrap it with find_unused_parameters=True"
            )
            if route is router.default:
                raise RuntimeError(text)
            logger.warning("%s", text)
        seen.add(route.adapter)


def watch_resting(model: nn.Module) -> None:
    """See to it that adapters which rest under DDP are told of."""
    if not hasattr(model, "fastlora_resting"):
        model.fastlora_resting = RestingCheck()
        model.register_forward_pre_hook(model.fastlora_resting)
