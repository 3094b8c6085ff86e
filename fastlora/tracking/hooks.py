"""What a tracker does before each forward of its model: counts micro-batches, finds ranks, watches for missed steps."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._utils.torch_compat import counts_versions, version_of
from ..nn.linear import Linear
from ..nn.probe import TrackedStep
from .all_reduce import Reduction
from .sampling import Sampling

logger = logging.getLogger(__name__)

RANKS_AGREE = "as all data-parallel ranks do"
_STEPS_BEFORE_WARNING = 3
STEPS_WATCHED = 8  # a loop without ``tracker.step()`` in its place shows in them


class ForwardHook:
    """Before each forward of a tracked model. It holds no layer, or a model that is an adapted layer would hold itself.

    Where no number needs to know of a forward it is over after ``STEPS_WATCHED`` steps: a call of a model with a hook
    takes longer. Copies of a model are not tracked: the hook's copy does nothing.
    """

    def __init__(self, step: TrackedStep, watch: StepWatch, reduction: Reduction, sampling: Sampling):
        self._step, self._watch, self._reduction, self._sampling = step, watch, reduction, sampling
        self._left, self._last = STEPS_WATCHED, step.index
        self._stays = step.redraws or step.estimator == "exact"
        self.handle: Any = None  # of the hook itself

    def __reduce__(self) -> tuple:
        return _no_hook, ()

    def __call__(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        step = self._step
        if torch.compiler.is_compiling():
            # Python numbers that change would be compiled in: what counts here are tensors.
            if step.signs is not None and torch.is_grad_enabled():
                step.signs.compiled.forward(*step.signs.place)
        elif torch.is_grad_enabled():
            step.micro += 1
            step.samples = 0
            for given in (*args, *kwargs.values()):
                if isinstance(given, Tensor) and given.dim():
                    step.samples = given.shape[0]
                    break
            if self._reduction.searching and self._reduction.search(module):
                self._sampling.fix(RANKS_AGREE)
                step.sampled = self._sampling.sampled(step.index)
                if step.signs is not None:
                    step.signs.place = self._reduction.place()
            watched = self._watch.parameter
            if watched is not None and version_of(watched) != self._watch.version:
                self._watch.updated()
            if step.index != self._last and not self._stays:
                self._left, self._last = self._left - 1, step.index
                # In the code of a compiled model a hook that goes would be a change.
                if self._left <= 0 and not step.compiled:
                    self.handle.remove()


def _no_hook() -> Any:
    return _do_nothing


def _do_nothing(module: nn.Module, args: Any, kwargs: Any) -> None:
    """The hook of a model's copy."""


class StepWatch:
    """Warns once when parameters were updated several times without ``tracker.step()``."""

    def __init__(self, layers: dict[str, Linear]):
        counted = (p for m in layers.values() for p in m.lora_B.parameters() if counts_versions(p))
        self.parameter = next(counted, None)
        self.version = None if self.parameter is None else version_of(self.parameter)
        self.missed, self._warned = 0, False  # optimizer steps since the last ``tracker.step()``

    def updated(self) -> None:
        """Before a forward that finds the parameter at another version."""
        self.version = version_of(self.parameter)
        self.missed += 1
        if self.missed > _STEPS_BEFORE_WARNING and not self._warned:
            self._warned = True
            logger.warning(
                "track: %d optimizer steps without tracker.step(); their statistics run together", self.missed
            )
