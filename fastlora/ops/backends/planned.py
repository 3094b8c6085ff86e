"""A backend whose calls are repeated by plans, for calls that nobody owns: those of the operator."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..._utils.torch_compat import apart
from ..layout import Dropout, Gradients, LoraCall, Need, Rows
from .base import Backend
from .plan import Plans, launcher, said

_CAPACITY = 512


def planned(backend: Backend) -> Backend:
    """The backend with plans where what it does may be written down, else the backend itself."""
    return _planned(backend) if backend.plannable else backend


@functools.cache
def _planned(backend: Backend) -> Backend:
    return PlannedBackend(backend)


def launch_remarks(backend: Backend) -> list[str]:
    """Why some or all of a backend's kernels are launched by Triton and not by plans."""
    if not backend.plannable:
        return []
    reason = launcher()[1]
    if reason is not None:
        return [f"launched by Triton: {reason}"]
    return [f"in some calls launched by Triton: {reason}" for reason in said()]


class PlannedBackend:
    """``forward`` and ``backward`` of a backend through plans, everything else as it has it."""

    def __init__(self, backend: Backend):
        self.backend, self.name = backend, backend.name
        self.plans = Plans(("any call", self.name), _CAPACITY)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.backend, name)

    def __reduce__(self) -> tuple:
        return PlannedBackend, (self.backend,)

    def forward(self, call: LoraCall) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """As ``Backend.forward``."""
        inputs = [call.x, *call.W, *call.A, *call.B, *[b for b in call.bias if b is not None], *call.P]
        key = ("forward", call.moments, tuple([b is None for b in call.bias]), len(call.P), *_rest(call, inputs))
        out = self.plans.run(key, inputs, lambda given: self._forward(call, given))
        n = len(call.W)
        return out[:n], out[n], out[n + 1 :]

    def backward(self, call: LoraCall, h: Tensor, dy: Sequence[Tensor | None], need: Need) -> Gradients:
        """As ``Backend.backward``."""
        inputs = [call.x, h, *call.W, *call.A, *call.B, *[g for g in dy if g is not None]]
        key = ("backward", need, tuple([g is None for g in dy]), tuple(call.probes), *_rest(call, inputs))
        out = self.plans.run(key, inputs, lambda given: self._backward(call, dy, need, given))
        first, n, parts = int(need.dx), len(call.A), []
        for wanted in (need.dA, need.dB, need.dZ):
            parts.append(out[first : first + n] if wanted else [])
            first += n * wanted
        return Gradients(out[0] if need.dx else None, *parts)

    def _forward(self, call: LoraCall, given: list[Tensor]) -> list[Tensor]:
        cut = _Cut(given)
        x = cut.one()
        W, A, B = cut.like(call.W), cut.like(call.A), cut.like(call.B)
        bias, P = cut.like(call.bias), cut.like(call.P)
        rows, drop = cut.rest(call)
        y, h, moments = self.backend.forward(call._replace(x=x, W=W, A=A, B=B, bias=bias, P=P, rows=rows, drop=drop))
        return [*y, h, *_apart(call, moments)]

    def _backward(self, call: LoraCall, dy: Sequence[Tensor | None], need: Need, given: list[Tensor]) -> list:
        cut = _Cut(given)
        x, h = cut.one(), cut.one()
        W, A, B, dy = cut.like(call.W), cut.like(call.A), cut.like(call.B), cut.like(dy)
        rows, drop = cut.rest(call)
        found = self.backend.backward(call._replace(x=x, W=W, A=A, B=B, rows=rows, drop=drop), h, dy, need)
        out = [found.dx] if need.dx else []
        for part, wanted in ((found.dA, need.dA), (found.dB, need.dB), (found.Q, need.dZ)):
            out += (_apart(call, part) or [None] * len(A)) if wanted else []
        return out


def _apart(call: LoraCall, found: Sequence[Tensor]) -> Sequence[Tensor]:
    """Of several adapters, copies: what an operator gives must not share memory."""
    return found if call.rows is None else apart(found)


def _rest(call: LoraCall, inputs: list[Tensor]) -> tuple:
    """Take the rows' tensors and the dropout's as inputs; gives what else a call depends on beside its tensors."""
    p = ()
    if call.rows is not None:
        inputs += call.rows
    if call.drop is not None:
        inputs.append(call.drop.key)
        p = (*call.drop.p, *call.drop.streams)
    layout = tuple(call.layout.starts), call.layout.blocks
    return len(call.W), len(call.A), tuple(call.scale), *layout, call.rows is None, p, call.engine


class _Cut:
    """Takes the tensors of a call from a flat list, in the order in which they were put there."""

    def __init__(self, tensors: Sequence[Tensor]):
        self._next = iter(tensors)

    def one(self) -> Tensor:
        return next(self._next)

    def like(self, given: Sequence[Tensor | None]) -> list[Tensor | None]:
        return [None if t is None else next(self._next) for t in given]

    def rest(self, call: LoraCall) -> tuple[Rows | None, Dropout | None]:
        rows = None if call.rows is None else Rows(*self.like(call.rows))
        return rows, None if call.drop is None else call.drop._replace(key=self.one())
