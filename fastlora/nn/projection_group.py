"""Separate q, k, v projections that share an input, found when they are called and run in one operator call."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._utils.torch_compat import autocasting, has_hooks, in_backward, saving_hooks, version_of
from .linear import Linear, forward_together
from .routing import Route


class _Token:
    """Alive while a recomputation of a pass may still come."""


@dataclass
class _Visit:
    """One pass of a thread through the owner: what was computed ahead, and how it was used."""

    hooks: Any
    launches: int = 0
    trigger: tuple[int, int] | None = None  # (launch number, index of the sibling that started it)
    x: Tensor | None = None
    state: tuple | None = None
    waiting: dict[int, Tensor] = field(default_factory=dict)
    unused: dict[tuple[int, int], set[int]] = field(default_factory=dict)
    token: _Token = field(default_factory=_Token)


class ProjectionGroup:
    """Runs sibling projections together when they are given the same tensor inside one forward of their owner.

    The first sibling that is called computes the outputs of those that are expected to follow, each of which takes its
    own when it is called with the same tensor object at the same version under the same modes; otherwise it computes
    alone. What is expected is learned: a result that nobody took by the owner's exit is not computed ahead again.
    While dropout is active every projection runs alone, with its own mask.
    """

    def __init__(self, layers: list[Linear]):
        self.layers = layers
        self._clear()

    def regroup(self, layers: list[Linear]) -> None:
        """Take in other siblings; what was learned of the old ones is forgotten."""
        for layer in self.layers:
            layer.group = None
        self.layers = layers
        for layer in layers:
            layer.group = self
        self._clear()

    def _clear(self) -> None:
        self._visits: dict[int, list[_Visit]] = {}
        self._plan: dict[tuple[int, int], frozenset[int]] = {}  # trigger -> siblings not worth computing ahead
        self._learned: dict[tuple[int, int], frozenset[int]] = {}
        self._pending: weakref.WeakSet[_Token] = weakref.WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.layers = state["layers"]
        self._clear()

    def __call__(self, layer: Linear, x: Tensor, route: Route) -> Tensor:
        visits = self._visits.get(threading.get_ident())
        index = next((i for i, member in enumerate(self.layers) if member is layer), None)
        if not visits or index is None or _alone(layer, visits[-1], route):
            return forward_together([layer], x, route)[0]
        visit = visits[-1]
        if visit.x is x and visit.state == _state(x, route):
            if index not in visit.waiting:
                return forward_together([layer], x, route)[0]
            visit.unused[visit.trigger].discard(index)
            out = visit.waiting.pop(index)
            if not visit.waiting:
                visit.x = None
            return out
        return self._launch(visit, index, x, route)

    def _launch(self, visit: _Visit, index: int, x: Tensor, route: Route) -> Tensor:
        trigger = (visit.launches, index)
        skip = self._plan.get(trigger, frozenset()) | {index}
        ahead = [i for i in range(len(self.layers)) if i not in skip and self._joinable(self.layers[i], index, route)]
        outputs = forward_together([self.layers[i] for i in (index, *ahead)], x, route)
        visit.launches += 1
        visit.trigger, visit.x, visit.state = trigger, x, _state(x, route)
        visit.unused[trigger] = set(ahead)
        visit.waiting = dict(zip(ahead, outputs[1:], strict=True))
        if not visit.waiting:
            visit.x = None
        if visit.hooks is not None and outputs[0].grad_fn is not None and not in_backward():
            self._await_backward(outputs[0].grad_fn, visit.token)
        return outputs[0]

    def _await_backward(self, node: Any, token: _Token) -> None:
        # A recomputation must launch what its forward launched: until then, or until the graph dies, the plan stands.
        pending = self._pending
        pending.add(token)
        node.register_prehook(lambda grads: pending.discard(token))

    def _joinable(self, other: Linear, index: int, route: Route) -> bool:
        mine = self.layers[index]
        return not (
            other.bypassed(route)
            or "forward" in other.__dict__
            or has_hooks(other)
            or other.weight.device != mine.weight.device
            or other.weight.dtype != mine.weight.dtype
            or type(other.weight) is not type(mine.weight)
            or other.router is not mine.router
            or other.training != mine.training
            or other.dropout_p(route) != mine.dropout_p(route)
            or (other.backend, other.engine) != (mine.backend, mine.engine)
            or other.probes.keys() != mine.probes.keys()
        )

    def enter(self, owner: nn.Module, args: Any) -> None:
        """Forward pre-hook of the owner: open a visit, and take up what earlier passes taught."""
        if torch.compiler.is_compiling():
            return
        if not in_backward() and not self._pending:
            self._plan.update(self._learned)
        visits = self._visits.setdefault(threading.get_ident(), [])
        for interrupted in visits:
            # KeyboardInterrupt passes by the exit hook.
            interrupted.x, interrupted.waiting = None, {}
        visits.append(_Visit(saving_hooks()))

    def release(self, owner: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the owner: free what nobody took, and learn from a pass that went through."""
        if torch.compiler.is_compiling():
            return
        thread = threading.get_ident()
        visits = self._visits.get(thread)
        if not visits:
            return
        visit = visits.pop()
        if not visits:
            del self._visits[thread]
        # A failed pass returns None here, and a recomputation may stop half-way: neither says what is used.
        if output is None or in_backward():
            return
        for trigger, unused in visit.unused.items():
            if unused:
                self._learned[trigger] = self._plan.get(trigger, frozenset()) | unused


def _alone(layer: Linear, visit: _Visit, route: Route) -> bool:
    """Whether a call must not compute ahead.

    With dropout, masks would depend on what runs together, and so on what was learned: not reproducible. A checkpoint
    around the projection alone is recomputed outside its owner, where nothing is computed ahead.
    """
    return any(layer.dropout_p(route)) or saving_hooks() != visit.hooks


def _state(x: Tensor, route: Route) -> tuple:
    return (
        route,
        None if x.is_inference() else version_of(x),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_autocast_dtype(x.device.type) if autocasting(x) else None,
    )


def group_projections(owner: nn.Module, layers: list[Linear]) -> ProjectionGroup:
    """Let sibling projections of ``owner`` share one operator call wherever they share their input."""
    group = ProjectionGroup(layers)
    for layer in layers:
        layer.group = group
    owner.register_forward_pre_hook(group.enter)
    owner.register_forward_hook(group.release, always_call=True)
    return group
