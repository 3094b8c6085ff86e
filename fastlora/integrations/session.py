"""What the callbacks of every trainer do between the events of theirs: tracking, penalty, freezing."""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from .._utils.distributed import several_processes
from .._utils.errors import check_choice, check_instance, check_integer, unknown_choice, wrong_type
from .._utils.torch_compat import set_requires_grad
from ..nn.active import NO_ADAPTERS, adapted_models, chosen_adapter
from ..nn.linear import adapted_layers
from ..tracking.tracker import Tracker, track
from .checkpoints import TrainingState

logger = logging.getLogger(__name__)

_running: weakref.WeakKeyDictionary[nn.Module, Session] = weakref.WeakKeyDictionary()


class Session:
    """One training run of a model; the trainer's callback calls :meth:`begin`, then once a step the rest."""

    def __init__(self, options: bool | Mapping[str, Any], penalty: Any, freeze: int, adapter: str | None):
        check_instance("track", options, (bool, Mapping), "True, False or options of fastlora.track")
        if isinstance(penalty, (int, float)) and not isinstance(penalty, bool):
            penalty = {"weight": penalty}
        if penalty is not None and not isinstance(penalty, Mapping):
            raise wrong_type("penalty", "a number, options of Tracker.penalty or None", penalty)
        if penalty is not None and options is False:
            raise ValueError("penalty: is weighed by statistics, and track=False leaves them out")
        _check_names("track", options if isinstance(options, Mapping) else (), track)
        _check_names("penalty", penalty or (), Tracker.penalty)
        check_integer("freeze", freeze, 0, "a number of optimizer steps")
        self.options = {} if options is True else options
        self.penalty, self.freeze, self.adapter = penalty, freeze, adapter
        # Weakly: what a model's run leads to, the model may hold.
        self._model: Callable[[], nn.Module | None] = _nothing
        self.tracker: Tracker | None = None
        self._frozen: list[nn.Parameter] = []
        self._held = False  # whether a step has begun with adapters that stand still

    @property
    def model(self) -> nn.Module | None:
        """The model of the last run, as long as it is there."""
        return self._model()

    def begin(self, model: nn.Module, saved: Mapping[str, Any] | None = None, steps: int | None = None) -> None:
        """Track ``model`` from now on, or from where a saved state was. ``ValueError`` for a model without adapters.

        ``steps`` of the whole training, where they are known: warns of what they are too few for. A run of the model
        that has not been closed is over.
        """
        self.close()
        if model in _running:
            _running[model].close()
        adapter = chosen_adapter(model, self.adapter)
        layers = [layer for layer in adapted_layers(model).values() if adapter in layer.adapter_names]
        self._model, self.tracker = weakref.ref(model), None
        _running[model] = self
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
        self._warn_of_few(steps)

    def _warn_of_few(self, steps: int | None) -> None:
        if not steps:
            return
        warmup = self.tracker.warmup if self.tracker is not None and self.tracker.importance is None else None
        # A penalty acts in the steps after the warmup.
        if warmup is not None and warmup + (self.penalty is not None) > steps:
            logger.warning(
                "track: warmup=%d is too long for %d steps of training: %s", warmup, steps,
                "importance is never frozen" if self.penalty is None else "the penalty is 0 to the end",
            )  # fmt: skip
        if self.freeze >= steps:
            logger.warning("freeze=%d: the adapters stand still in all %d steps of training", self.freeze, steps)

    def resume(self, saved: Mapping[str, Any]) -> None:
        """Go on from a saved state, after :meth:`begin`."""
        TrainingState(self.model, self.tracker).load_state_dict(saved)

    def _check_freeze(self) -> None:
        if not self.freeze:
            return
        if several_processes():
            raise ValueError(
                "freeze: several processes agreed on what has gradients; use "
                "fastlora.training.Cosine(freeze=..., freeze_by='lr')"
            )
        frozen = {id(p) for p in self._frozen}
        if not any(p.requires_grad and id(p) not in frozen for p in self.model.parameters()):
            raise ValueError(f"freeze: nothing else would learn in the first {self.freeze} steps; train a head")

    def hold(self, step: int) -> None:
        """Before the forward of optimizer step ``step`` (from 0): adapters stand still in the first ``freeze``."""
        set_requires_grad(self._frozen, step >= self.freeze)
        self._held = True
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
        """After the backward passes of a step, before the optimizer's and ``scaler.update()``."""
        if self.tracker is not None:
            self.tracker.step(scaler)

    def state_dict(self) -> dict[str, Any]:
        return TrainingState(self.model, self.tracker).state_dict()

    def close(self) -> None:
        """Stop tracking and let go of frozen adapters; scores stay readable. Warns of what never acted."""
        if self._held and self._frozen:
            logger.warning("freeze=%d: training is over, and the adapters stood still to the end", self.freeze)
        if self.model is not None and _running.get(self.model) is self:
            del _running[self.model]
        set_requires_grad(self._frozen, True)
        self._frozen, self._held = [], False
        if self.tracker is not None:
            self.tracker.close()


def _nothing() -> None:
    """The model before the first run."""


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
    found = adapted_models(module)
    if len(found) > 1:
        raise ValueError(f"model: several adapted models inside one, {list(found)}; inject into the whole once")
    return next(iter(found.values()))


def checked_checkpoints(value: str) -> str:
    return check_choice("checkpoints", value, ("adapters", "full"))
