"""What the callbacks of every trainer do between the events of theirs: tracking, penalty, freezing."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .._utils.errors import check_choice, check_integer, unknown_choice, wrong_type
from .._utils.torch_compat import set_requires_grad
from ..nn.active import NO_ADAPTERS, chosen_adapter
from ..nn.linear import adapted_layers
from ..tracking.tracker import Tracker, track
from .checkpoints import TrainingState


class Session:
    """One training run of a model; the trainer's callback calls :meth:`begin`, then once a step the rest."""

    def __init__(self, options: bool | Mapping[str, Any], penalty: Any, freeze: int, adapter: str | None):
        if not isinstance(options, (bool, Mapping)):
            raise wrong_type("track", "True, False or options of fastlora.track", options)
        if isinstance(penalty, (int, float)) and not isinstance(penalty, bool):
            penalty = {"weight": penalty}
        if penalty is not None and not isinstance(penalty, Mapping):
            raise wrong_type("penalty", "a number, options of Tracker.penalty or None", penalty)
        if penalty is not None and options is False:
            raise ValueError("penalty: is weighed by statistics, and track=False leaves them out")
        _check_names("track", options if isinstance(options, Mapping) else (), track)
        _check_names("penalty", penalty or (), Tracker.penalty)
        check_integer("freeze", freeze, 0, "a number of optimiser steps")
        self.options = {} if options is True else options
        self.penalty, self.freeze, self.adapter = penalty, freeze, adapter
        self.model: nn.Module | None = None
        self.tracker: Tracker | None = None
        self._frozen: list[nn.Parameter] = []

    def begin(self, model: nn.Module, saved: Mapping[str, Any] | None = None) -> None:
        """Track ``model`` from now on, or from where a saved state was. ``ValueError`` for a model without adapters."""
        self.close()
        adapter = chosen_adapter(model, self.adapter)
        layers = [layer for layer in adapted_layers(model).values() if adapter in layer.adapter_names]
        self.model, self.tracker = model, None
        if self.options is not False:
            self.tracker = track(model, **{"adapter": adapter, **self.options})
        try:
            state = TrainingState(model, self.tracker)
            if saved is not None:
                state.load_state_dict(saved)
            factors = [f[adapter] for layer in layers for f in (layer.lora_A, layer.lora_B)]
            self._frozen = [p for f in factors for p in f.parameters()] if self.freeze else []
            self._check_freeze()
        except Exception:
            self.close()
            raise

    def resume(self, saved: Mapping[str, Any]) -> None:
        """Go on from a saved state, after :meth:`begin`."""
        TrainingState(self.model, self.tracker).load_state_dict(saved)

    def _check_freeze(self) -> None:
        if not self.freeze:
            return
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            raise ValueError(
                "freeze: several processes agreed on what has gradients; use "
                "fastlora.training.Cosine(freeze=..., freeze_by='lr')"
            )
        frozen = {id(p) for p in self._frozen}
        if not any(p.requires_grad and id(p) not in frozen for p in self.model.parameters()):
            raise ValueError(f"freeze: nothing else would learn in the first {self.freeze} steps; train a head")

    def hold(self, step: int) -> None:
        """Before the forward of optimiser step ``step`` (from 0): adapters stand still in the first ``freeze``."""
        set_requires_grad(self._frozen, step >= self.freeze)
        if step >= self.freeze:
            self._frozen = []

    def add_penalty(self, scaler: Any = None) -> None:
        """Add the penalty's gradient to ``.grad``; with a scaler, as its scaled gradients have it."""
        if self.penalty is None:
            return
        scale = 1.0 if scaler is None else scaler.get_scale()
        options = {"weight": 1e-4, **self.penalty}
        self.tracker.apply_penalty(**{**options, "weight": options["weight"] * scale})

    def step(self, scaler: Any = None) -> None:
        """After the backward passes of a step, before the optimiser's and ``scaler.update()``."""
        if self.tracker is not None:
            self.tracker.step(scaler)

    def state_dict(self) -> dict[str, Any]:
        return TrainingState(self.model, self.tracker).state_dict()

    def close(self) -> None:
        """Stop tracking and let go of frozen adapters; the tracker's scores stay readable."""
        set_requires_grad(self._frozen, True)
        self._frozen = []
        if self.tracker is not None:
            self.tracker.close()


def _check_names(argument: str, given: Iterable[str], function: Callable[..., Any]) -> None:
    """Refuse options that a function does not have before training begins."""
    known = [name for name in inspect.signature(function).parameters if name not in ("self", "model")]
    for name in given:
        if name not in known:
            raise unknown_choice(argument, name, known)


def adapted_model(module: nn.Module) -> nn.Module:
    """The model inside ``module`` that ``inject`` was called on, or ``module`` where layers were built by hand."""
    if not adapted_layers(module):
        raise ValueError(NO_ADAPTERS)
    found = {name: m for name, m in module.named_modules() if "fastlora_configs" in m.__dict__}
    if len(found) > 1:
        raise ValueError(f"model: several adapted models inside one, {list(found)}; inject into the whole once")
    return next(iter(found.values()), module)


def checked_checkpoints(value: str) -> str:
    return check_choice("checkpoints", value, ("adapters", "full"))
