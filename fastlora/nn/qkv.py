"""Separate q, k, v projections that share an input, found when they are called and run in one operator call."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .linear import Linear, forward_together


def _in_backward() -> bool:
    # Recomputation under activation checkpointing runs inside the autograd engine.
    return torch._C._current_graph_task_id() != -1


# An owner whose forward is called directly never reaches its exit hook: start afresh after this many launches.
_MAX_LAUNCHES = 64


@dataclass
class _Visit:
    """One pass of a thread through the owner: what was computed ahead, and how it was used."""

    launches: int = 0
    trigger: tuple[int, int] | None = None  # (launch number, index of the sibling that started it)
    x: Tensor | None = None
    state: tuple | None = None
    waiting: dict[int, Tensor] = field(default_factory=dict)
    used: dict[tuple[int, int], set[int]] = field(default_factory=dict)


class ProjectionGroup:
    """Runs sibling projections together when they are given the same tensor.

    The first sibling that is called computes the outputs of those that are expected to follow, each of which takes its
    own when it is called with the same tensor object at the same version under the same modes; otherwise it computes
    alone. What is expected is learned: a result that nobody took by the owner's exit is not computed ahead again.
    """

    def __init__(self, layers: list[Linear]):
        self.layers = layers
        self._visits: dict[int, _Visit] = {}
        self._plan: dict[tuple[int, int], frozenset[int]] = {}
        self._learned: dict[tuple[int, int], frozenset[int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_visits": {}}

    def __call__(self, layer: Linear, x: Tensor) -> Tensor:
        index = next(i for i, member in enumerate(self.layers) if member is layer)
        thread = threading.get_ident()
        visit = self._visits.get(thread)
        if visit is None or visit.launches >= _MAX_LAUNCHES:
            visit = self._visits[thread] = _Visit()
        if visit.x is x and index in visit.waiting and visit.state == self._state(x):
            visit.used[visit.trigger].add(index)
            out = visit.waiting.pop(index)
            if not visit.waiting:
                visit.x = None
            return out
        return self._launch(visit, index, x)

    def _launch(self, visit: _Visit, index: int, x: Tensor) -> Tensor:
        if visit.launches == 0 and not _in_backward():
            self._plan.update(self._learned)
        trigger = (visit.launches, index)
        together = [index, *(i for i in self._expected(trigger, index) if self._joinable(self.layers[i], index))]
        outputs = forward_together([self.layers[i] for i in together], x)
        visit.launches += 1
        visit.trigger, visit.x, visit.state = trigger, x, self._state(x)
        visit.used[trigger] = {index}
        visit.waiting = dict(zip(together[1:], outputs[1:], strict=True))
        if not visit.waiting:
            visit.x = None
        return outputs[0]

    def _expected(self, trigger: tuple[int, int], index: int) -> list[int]:
        planned = self._plan.get(trigger)
        return [i for i in range(len(self.layers)) if i != index and (planned is None or i in planned)]

    def _joinable(self, other: Linear, index: int) -> bool:
        mine = self.layers[index]
        return not (
            other.bypassed
            or "forward" in other.__dict__
            or other._forward_hooks
            or other._forward_pre_hooks
            or other._backward_hooks
            or other._backward_pre_hooks
            or other.weight.device != mine.weight.device
            or other.weight.dtype != mine.weight.dtype
            or type(other.weight) is not type(mine.weight)
            or other.active_adapter != mine.active_adapter
            or other.training != mine.training
            or other.dropout_p() != mine.dropout_p()
            or other.backend != mine.backend
            or (other.probe is None) != (mine.probe is None)
        )

    @staticmethod
    def _state(x: Tensor) -> tuple:
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        return (
            None if x.is_inference() else x._version,
            torch.is_grad_enabled(),
            autocast and torch.get_autocast_dtype(device),
        )

    def release(self, owner: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the owner: free what nobody took, and learn from a pass that went through."""
        if torch.compiler.is_compiling():
            return
        visit = self._visits.pop(threading.get_ident(), None)
        # A failed pass returns None here, and a recomputation may stop half-way: neither says what is used.
        if visit is None or output is None or _in_backward():
            return
        for trigger, used in visit.used.items():
            self._learned[trigger] = self._plan.get(trigger, frozenset(range(len(self.layers)))) & used


def group_projections(owner: nn.Module, layers: list[Linear]) -> ProjectionGroup:
    """Let sibling projections of ``owner`` share one operator call wherever they share their input."""
    group = ProjectionGroup(layers)
    for layer in layers:
        layer.group = group
    owner.register_forward_hook(group.release, always_call=True)
    return group
