"""A backend whose calls are repeated by plans."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layout import Dropout, Gradients, LoraCall, Need, Rows
from .base import Backend
from .plan import Plans, launcher, said
from .triton import TritonBackend

_SHARED_CAPACITY = 512


def plans_of(backend: Backend) -> Plans | None:
    """Plans for the calls of one owner where the backend's kernels can be recorded, else None."""
    return Plans() if isinstance(backend, TritonBackend) else None


@functools.cache
def shared(backend: Backend) -> Backend:
    """The backend with plans for all calls that have no owner, where its kernels can be recorded."""
    return PlannedBackend(backend, _SHARED_CAPACITY) if isinstance(backend, TritonBackend) else backend


def launch_remarks(backend: Backend) -> list[str]:
    """Why some or all of a backend's kernels are launched by Triton and not by plans."""
    if not isinstance(backend, TritonBackend):
        return []
    reason = launcher()[1]
    if reason is not None:
        return [f"launched by Triton: {reason}"]
    return [f"in some calls launched by Triton: {reason}" for reason in said()]


class PlannedBackend:
    """``forward`` and ``backward`` of a backend through plans, everything else as it has it.

    For the calls of one owner, which come with the same weights, factors and scales, or of any.
    """

    def __init__(self, backend: Backend, capacity: int | None = None):
        self.backend, self.name = backend, backend.name
        self.plans = Plans() if capacity is None else Plans(capacity)
        self._fixed = _Fixed((), (), (), (), None, [], None, [], [])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.backend, name)

    def __reduce__(self) -> tuple:
        return PlannedBackend, (self.backend, self.plans.capacity)

    def forward(self, call: LoraCall) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """As ``Backend.forward``."""
        fixed = self._take(call)
        inputs = [call.x, *fixed.forward_inputs, *call.P]
        key = (fixed.scope, call.moments, len(call.P), *_varying(call, inputs))
        out = self.plans.run(key, inputs, lambda given: self._forward(call, given))
        n = len(call.W)
        return out[:n], out[n], out[n + 1 :]

    def backward(self, call: LoraCall, h: Tensor, dy: Sequence[Tensor | None], need: Need) -> Gradients:
        """As ``Backend.backward``."""
        fixed = self._take(call)
        live = [g for g in dy if g is not None]
        inputs = [call.x, h, *fixed.backward_inputs, *live]
        missing = tuple([g is None for g in dy]) if len(live) < len(dy) else ()
        key = (fixed.scope, need, missing, tuple(call.probes), *_varying(call, inputs))
        out = self.plans.run(key, inputs, lambda given: self._backward(call, dy, need, given))
        first, n = int(need.dx), len(call.A)
        parts = []
        for wanted in need[1:4]:
            parts.append(out[first : first + n] if wanted else [])
            first += n if wanted else 0
        return Gradients(out[0] if need.dx else None, *parts)

    def _take(self, call: LoraCall) -> _Fixed:
        """What calls of one owner have in common, worked out once."""
        fixed = self._fixed
        if (
            call.W is fixed.W
            and call.bias is fixed.bias
            and call.A is fixed.A
            and call.B is fixed.B
            and call.layout is fixed.layout
            and call.scale == fixed.scale
        ):
            return fixed
        backward_inputs = [*call.W, *call.A, *call.B]
        absent = tuple([b is None for b in call.bias])
        fixed = _Fixed(
            call.W,
            call.bias,
            call.A,
            call.B,
            call.layout,
            list(call.scale),
            _scope(self.name, tuple(call.scale), absent, len(call.A), tuple(call.layout.starts)),
            [*backward_inputs, *[b for b in call.bias if b is not None]],
            backward_inputs,
        )
        if isinstance(call.W, tuple):
            # A list is made anew for every call, and would be kept alive for nothing.
            self._fixed = fixed
        return fixed

    def _forward(self, call: LoraCall, given: list[Tensor]) -> list[Tensor]:
        cut = _Cut(given)
        x = cut.one()
        W, A, B = cut.like(call.W), cut.like(call.A), cut.like(call.B)
        bias, P = cut.like(call.bias), cut.like(call.P)
        rows, drop = cut.varying(call)
        y, h, moments = self.backend.forward(call._replace(x=x, W=W, A=A, B=B, bias=bias, P=P, rows=rows, drop=drop))
        return [*y, h, *moments]

    def _backward(self, call: LoraCall, dy: Sequence[Tensor | None], need: Need, given: list[Tensor]) -> list:
        cut = _Cut(given)
        x, h = cut.one(), cut.one()
        W, A, B, dy = cut.like(call.W), cut.like(call.A), cut.like(call.B), cut.like(dy)
        rows, drop = cut.varying(call)
        found = self.backend.backward(call._replace(x=x, W=W, A=A, B=B, rows=rows, drop=drop), h, dy, need)
        n = len(A)
        parts = [(part or [None] * n) if wanted else [] for part, wanted in zip(found[1:], need[1:4], strict=True)]
        return [*([found.dx] if need.dx else []), *[g for part in parts for g in part]]


class _Fixed(NamedTuple):
    """The operands of one owner's calls, and what is made of them alone."""

    W: Sequence[Tensor]
    bias: Sequence[Tensor | None]
    A: Sequence[Tensor]
    B: Sequence[Tensor]
    layout: Any
    scale: list[float]
    scope: object
    forward_inputs: list[Tensor]
    backward_inputs: list[Tensor]


def _varying(call: LoraCall, inputs: list[Tensor]) -> tuple:
    """Take the rows' tensors and the dropout's as inputs; what else of a call differs from time to time."""
    p = ()
    if call.rows is not None:
        inputs += call.rows
    if call.drop is not None:
        inputs.append(call.drop.key)
        p = tuple(call.drop.p)
    return call.rows is None, p, precision(call.x.dtype)


class _Cut:
    """Takes the tensors of a call from a flat list, in the order in which they were put there."""

    def __init__(self, tensors: Sequence[Tensor]):
        self._next = iter(tensors)

    def one(self) -> Tensor:
        return next(self._next)

    def like(self, given: Sequence[Tensor | None]) -> list[Tensor | None]:
        return [None if t is None else next(self._next) for t in given]

    def varying(self, call: LoraCall) -> tuple[Rows | None, Dropout | None]:
        rows = None if call.rows is None else Rows(*self.like(call.rows))
        return rows, None if call.drop is None else call.drop._replace(key=self.one())


@functools.lru_cache(maxsize=4096)
def _scope(*parts: Hashable) -> object:
    """One object for equal parts, which is quicker to look up than they are."""
    return object()


def precision(dtype: torch.dtype) -> str:
    """How kernels multiply fp32 numbers, which a flag of torch's says."""
    if dtype != torch.float32:
        return ""
    from ...kernels import primitives

    return primitives.precision(dtype)
