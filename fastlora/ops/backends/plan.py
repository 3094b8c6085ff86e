"""Call plans: what a backend did for a call on a GPU, run again by one native call.

A backend's Python works out tiles, splits, operands and arguments anew at every call, although they are the same as
long as shapes, dtypes and ranks are. ``Plans.run`` lets it do so twice; the second time the launches, allocations and
library calls are recorded, and from then on ``torch.ops.fastlora.run_plan`` repeats them with the tensors of the call.
``FASTLORA_TRITON_LAUNCHER=triton`` turns that off. Where it cannot be done the reason is logged once, and Triton's own
launcher is used.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._utils.errors import check_choice
from ..._utils.torch_compat import dispatch_mode, schema_of
from .. import native

try:
    from ..._plan import Cache, find, registry
except ImportError:
    Cache = None

logger = logging.getLogger(__name__)

LAUNCHERS = ("native", "triton")
VARIABLE = "FASTLORA_TRITON_LAUNCHER"
DRIVER = "libcuda.so.1"
# Plans an owner keeps: batches come in few lengths, or in so many that no plan pays.
CAPACITY = 32
_REMEMBERED = 1024
_PLAIN = frozenset((Tensor, torch.nn.Parameter))

Compute = Callable[[list[Tensor]], Sequence[Tensor | None]]


class _Recent(OrderedDict):
    """The entries that were set last, ``_REMEMBERED`` of them."""

    def __setitem__(self, key: Hashable, value: Any) -> None:
        super().__setitem__(key, value)
        self.move_to_end(key)
        if len(self) > _REMEMBERED:
            self.popitem(last=False)


# What was met before, by key and inputs: None (once), the reason why there is no plan, or (plan's number, constants).
# Layers of the same sizes share their plans.
_known: _Recent = _Recent()
# As many as there are compiled kernels: Triton keeps those too, as long as its own cache is not cleared.
_kernels: dict[int, Any] = {}
_numbers = itertools.count()
_said: dict[str, None] = {}
_disabled: list[str] = []


def _say(reason: str) -> None:
    if reason not in _said:
        _said[reason] = None
        logger.warning("kernels are launched by Triton: %s", reason)


@functools.cache
def _wanted() -> str:
    return check_choice(VARIABLE, os.environ.get(VARIABLE, LAUNCHERS[0]), LAUNCHERS)


@functools.cache
def _missing() -> str | None:
    """Why plans cannot run in this process."""
    if not native.available():
        return native.reason()
    if Cache is None:
        return "fastlora._plan was not built (reinstall with FASTLORA_BUILD=1 to see why)"
    if dispatch_mode is None or schema_of is None:
        return "this torch does not show what is called: see fastlora doctor"
    return torch.ops.fastlora.open_plans(registry(), DRIVER) or None


def launcher() -> tuple[str, str | None]:
    """Who launches kernels, one of ``LAUNCHERS``, and why not the native launcher.

    Raises ``ValueError`` for another name in ``FASTLORA_TRITON_LAUNCHER``.
    """
    if _wanted() == "triton":
        return "triton", f"{VARIABLE} says so"
    reason = _disabled[0] if _disabled else _missing()
    return ("native", None) if reason is None else ("triton", reason)


def said() -> list[str]:
    """Every reason so far for which a call was not planned."""
    return list(_said)


class Plans:
    """The plans of one owner: a layer, or layers that run together. At most ``capacity`` of them, the last used.

    ``scope``: whatever the owner's computations depend on beside their inputs and keys, as its scales; owners of an
    equal scope share their plans. None: nobody else computes the same. ``reason``: why the last call that had no plan
    did not get one, or None.
    """

    def __init__(self, scope: Hashable = None, capacity: int = CAPACITY):
        self.scope, self.capacity = scope, capacity
        self.reason: str | None = None
        self._shared = object() if scope is None else scope
        self._variants: dict[Hashable, int] = {}
        self._cache = None

    def __deepcopy__(self, memo: dict) -> Plans:
        return Plans(self.scope, self.capacity)

    def __reduce__(self) -> tuple:
        return Plans, (self.scope, self.capacity)

    def __len__(self) -> int:
        return 0 if self._cache is None else len(self._cache)

    def clear(self) -> None:
        """Forget all plans."""
        self._cache = None
        self._variants.clear()

    def run(self, key: Hashable, inputs: Sequence[Tensor], compute: Compute) -> list[Tensor | None]:
        """``compute(inputs)``, by a plan where there is one.

        ``compute`` may depend on its inputs, on ``key``, on the owner's scope, on how torch multiplies fp32 matrices,
        and on nothing else; it changes no input, reads no value back, and its outputs, of which some may be None, are
        not differentiated. ``inputs`` are strided tensors, the first of them on the GPU, and no mode watches the
        dispatcher.
        """
        if inputs[0].dtype is torch.float32:
            key = (key, _precision())
        variant, cache = self._variants.get(key), self._cache
        if variant is not None and cache is not None:
            try:
                out = _run_plan(cache.number, variant, inputs)
            except RuntimeError as error:
                return self._without(inputs, compute, error)
            if out:
                return out
        return self._first(key, inputs, compute)

    def number(self, key: Hashable, dtype: torch.dtype) -> tuple[int, int] | None:
        """The cache and the variant of a plan, which do not change as long as it is there; None where there is none, or
        where it depends on more than ``run`` is told."""
        variant = None if dtype is torch.float32 else self._variants.get(key)
        return None if variant is None or self._cache is None else (self._cache.number, variant)

    def _without(self, inputs: Sequence[Tensor], compute: Compute, error: RuntimeError) -> list[Tensor | None]:
        """After a plan failed: what Triton's launcher makes of it, or its error."""
        out = list(compute(list(inputs)))
        reason = str(error).partition("\n")[0]
        if "native launch" in reason:
            _disabled.append(reason)
            self.clear()
        self.reason = reason
        _say(reason)
        return out

    def _first(self, key: Hashable, inputs: Sequence[Tensor], compute: Compute) -> list[Tensor | None]:
        """A call that has no plan yet."""
        name, self.reason = launcher()
        if name == "triton" or not _PLAIN.issuperset(map(type, inputs)):
            if _wanted() == "native" and self.reason is not None:
                _say(self.reason)
            return list(compute(list(inputs)))
        met = (self._shared, key, tuple(map(_described, inputs)))
        if met not in _known:
            _known[met] = None
            return list(compute(list(inputs)))
        known = _known[met]
        if isinstance(known, str):
            self.reason = known
            return list(compute(list(inputs)))
        plan = None if known is None else find(known[0])
        if plan is None:
            return self._record(key, met, inputs, compute)
        cache, variant = self._keep(key, inputs, plan, known[1])
        try:
            return _run_plan(cache.number, variant, inputs)
        except RuntimeError as error:
            return self._without(inputs, compute, error)

    def _record(self, key: Hashable, met: tuple, inputs: Sequence[Tensor], compute: Compute) -> list:
        from . import program, recorder

        recording = recorder.Recorder(inputs)
        out, found = recording.record(compute)
        if found is None:
            if recording.problem != recorder.BUSY:
                self.reason = _known[met] = recording.problem
                _say(recording.problem)
            return out
        plan, constants = program.build(found), list(found.constants.values())
        _kernels.update(found.kernels)
        _known[met] = plan.number, constants
        self._keep(key, inputs, plan, constants)
        return out

    def _keep(self, key: Hashable, inputs: Sequence[Tensor], plan: Any, constants: list[Tensor]) -> tuple[Any, int]:
        """The cache that has the plan now, and the variant that is it there."""
        cache = self._cache
        if cache is None or len(self._variants) > 4 * self.capacity:
            # A key that differs at every call, as a scale that is annealed, would fill the memory.
            self._variants.clear()
            cache = self._cache = Cache(self.capacity)
        # A number is never given twice: another thread may still hold one of a cache that is gone.
        variant = self._variants.setdefault(key, next(_numbers))
        torch.ops.fastlora.keep_plan(cache.number, variant, plan.number, inputs, constants)
        return cache, variant


def _precision() -> str:
    """How kernels multiply fp32 numbers, which a flag of torch's says."""
    from ...kernels import primitives

    return primitives.precision(torch.float32)


def _described(tensor: Tensor) -> tuple:
    """What a backend may depend on, beside the values."""
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride(), tensor.data_ptr() % 16 == 0


@functools.cache
def _operator() -> Any:
    return torch.ops.fastlora.run_plan.default


def _run_plan(cache: int, variant: int, inputs: Sequence[Tensor]) -> list[Tensor]:
    return _operator()(cache, variant, inputs)
