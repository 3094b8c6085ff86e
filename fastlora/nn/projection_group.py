"""Separate q, k, v projections that share an input, found when they are called and run in one operator call."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from .._utils.torch_compat import (
    being_traced,
    has_hooks,
    in_backward,
    saving_hooks,
    seen,
    unseen_checkpoints,
)
from ..ops.lora import new_seed
from ..ops.node import Pending
from .adapter import Bundle
from .linear import Linear, forward_together
from .routing import Route


@dataclass(slots=True)
class _Visit:
    """One pass of a thread through the owner: what was computed ahead, and how it was used.

    It knows siblings by index: a pass that ``KeyboardInterrupt`` ends stays, and would keep the layers that keep it.
    """

    hooks: Any
    launches: int = 0
    trigger: tuple[int, int] | None = None  # (launch number, index of the sibling that started it)
    first: tuple[int, int] | None = None  # the launch whose input later ones are compared with
    x: Tensor | None = None
    state: tuple | None = None
    waiting: dict[int, Tensor] = field(default_factory=dict)
    unused: dict[tuple[int, int], set[int]] = field(default_factory=dict)
    shared: tuple[Tensor, tuple] | None = None  # the input of the last launch and its state, while they are compared
    wanted: dict[tuple[int, int], set[int]] = field(default_factory=dict)  # siblings that came for a launch's input
    checkpoints: int = 0  # that it runs in without gradients
    drawn: dict[int, int] = field(default_factory=dict)  # calls of each sibling with dropout
    seeds: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict)  # of the siblings' n-th calls
    number: int | None = None  # of the seed of the last launch, None without dropout

    def seed(self, mine: int, device: torch.device) -> Tensor:
        """What all siblings draw the masks of their n-th call from, whichever of them run together."""
        number = self.drawn.get(mine, 0)
        self.drawn[mine] = number + 1
        if (number, device) not in self.seeds:
            self.seeds[(number, device)] = new_seed(device)
        return self.seeds[(number, device)]


class ProjectionGroup:
    """Runs sibling projections together when they are given the same tensor inside one forward of their owner.

    The first sibling that is called computes the outputs of those that are expected to follow, each of which takes its
    own when it is called with the same tensor object at the same version under the same modes; otherwise it computes
    alone. What is expected is learned: a result that nobody took by the owner's exit is not computed ahead again, and
    siblings that are not ``expected`` to share an input are computed ahead once they were seen to.
    Their dropout masks come from one seed a visit of the owner, each from a stream of its own, so that they do not
    depend on what runs together.
    """

    def __init__(self, layers: list[Linear], expected: bool = True):
        self.expected = expected
        self._adopt(layers)

    @property
    def layers(self) -> list[Linear]:
        """The siblings that are still there."""
        return [layer for member in self._members if (layer := member()) is not None]

    def _hold(self, layers: list[Linear]) -> None:
        # Weakly: every layer holds its group.
        self._members = [ref(layer) for layer in layers]
        self._clear()

    def regroup(self, layers: list[Linear]) -> None:
        """Take in other siblings; what was learned of the old ones is forgotten."""
        for layer in self.layers:
            layer.group = None
        self._adopt(layers)

    def _adopt(self, layers: list[Linear]) -> None:
        stream = 0
        for layer in layers:
            layer.group, layer.bundle = self, None
            layer.dropout_salt, layer.stream = layers[0].dropout_salt, stream
            stream += len(layer.slices)
        self._hold(layers)

    def _clear(self) -> None:
        self._visits: dict[int, list[_Visit]] = {}
        self._plan: dict[tuple[int, int], frozenset[int]] = {}  # trigger -> siblings not worth computing ahead
        self._learned: dict[tuple[int, int], frozenset[int]] = {}
        self._pending = Pending()  # graphs whose recomputation must launch what their forward launched
        self._index = {member: i for i, member in enumerate(self._members)}
        self._bundles: dict[tuple[int, ...], Bundle] = {}
        self._unknown = frozenset() if self.expected else frozenset(self._index.values())
        self._refused: set[tuple[tuple[int, int], int]] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers, "expected": self.expected}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.expected = state["expected"]
        self._hold(state["layers"])

    def forget_operands(self) -> None:
        """Let go of factors and weights of earlier calls."""
        self._bundles.clear()

    def take(self, layer: Linear, x: Tensor) -> Tensor | None:
        """The layer's output, where a sibling has computed it ahead from this very input under the same modes."""
        visits = self._visits.get(get_ident())
        if not visits:
            return None
        visit, mine = visits[-1], self._index.get(ref(layer))
        if visit.x is not x or mine not in visit.waiting:
            return None
        # A recomputation goes the way of its forward, whose context may be closed.
        route = layer.router.route(layer.training) if in_backward() else layer.router.current()
        if visit.state != (route, seen(x)):
            return None
        if visit.number is not None:
            if visit.drawn.get(mine, 0) != visit.number:
                return None
            visit.drawn[mine] = visit.number + 1
        visit.unused[visit.trigger].discard(mine)
        out = visit.waiting.pop(mine)
        if not visit.waiting:
            visit.x = None
        return out

    def __call__(self, layer: Linear, x: Tensor, route: Route) -> Tensor:
        """The layer's output, and those of the siblings that are expected to follow computed ahead."""
        visits = self._visits.get(get_ident())
        mine = self._index.get(ref(layer))
        if not visits or mine is None or _repeated_alone(layer, visits[-1]):
            return forward_together((layer,), x, route)[0]
        visit = visits[-1]
        seed = functools.partial(visit.seed, mine)
        # Another call of a projection whose siblings still wait: theirs stay theirs.
        if visit.x is x or x.is_inference():
            return forward_together((layer,), x, route, None, seed)[0]
        return self._launch(visit, mine, layer, x, route, seed)

    def _launch(self, visit: _Visit, mine: int, layer: Linear, x: Tensor, route: Route, seed: Any) -> Tensor:
        trigger = (visit.launches, mine)
        if not self.expected:
            self._compare(visit, trigger, x, route)
        skip, drawn = self._plan.get(trigger, self._unknown), visit.drawn
        number = drawn.get(mine, 0)
        which, layers = [mine], [layer]
        for i, member in enumerate(self._members):
            if i == mine or i in skip or (other := member()) is None:
                continue
            if (not drawn or drawn.get(i, 0) == number) and _joins(other, layer, route):
                which.append(i)
                layers.append(other)
        which = tuple(which)
        bundle = self._bundles.get(which)
        if bundle is None:
            bundle = self._bundles[which] = Bundle()
        kept = bundle.kept(layers, route.names)
        if not kept.alike:
            return forward_together((layer,), x, route, None, seed)[0]
        checkpointed = visit.hooks is not None and not in_backward()
        outputs = forward_together(layers, x, route, kept, seed, self._pending if checkpointed else None)
        visit.number = number if drawn.get(mine, 0) > number else None
        visit.launches += 1
        visit.trigger, visit.state = trigger, (route, seen(x))
        visit.unused[trigger] = set(which[1:])
        visit.waiting = dict(zip(which[1:], outputs[1:], strict=True))
        visit.x = x if visit.waiting else None
        return outputs[0]

    def _compare(self, visit: _Visit, trigger: tuple[int, int], x: Tensor, route: Route) -> None:
        """Take note of a sibling that runs on the input of the launch before it."""
        state = route, seen(x)
        if visit.shared is not None and visit.shared[0] is x and visit.shared[1] == state:
            visit.wanted[visit.first].add(trigger[1])
        else:
            visit.shared, visit.first = (x, state), trigger
            visit.wanted[trigger] = set()

    def enter(self, owner: nn.Module, args: Any) -> None:
        """Forward pre-hook of the owner: open a visit, and take up what earlier passes taught."""
        if being_traced():
            return
        if self._learned and not self._pending and not in_backward():
            self._plan.update(self._learned)
            self._learned.clear()
        visits = self._visits.setdefault(get_ident(), [])
        for interrupted in visits:
            # KeyboardInterrupt passes by the exit hook.
            interrupted.x, interrupted.waiting = None, {}
        unseen = not torch.is_grad_enabled() and any([layer.training for layer in self.layers])
        visits.append(_Visit(saving_hooks(), checkpoints=unseen_checkpoints() if unseen else 0))

    def release(self, owner: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the owner: free what nobody took, and learn from a pass that went through."""
        if torch.compiler.is_compiling():
            return
        thread = get_ident()
        visits = self._visits.get(thread)
        if not visits:
            return
        visit = visits.pop()
        if not visits:
            del self._visits[thread]
        # A failed pass returns None here, and a recomputation may stop half-way: neither says what is used.
        if output is None or in_backward():
            return
        for trigger, skipped in visit.unused.items():
            if skipped:
                self._learned[trigger] = self._plan.get(trigger, self._unknown) | skipped
                self._refused.update((trigger, index) for index in skipped)
        for trigger, wanted in visit.wanted.items():
            wanted = {index for index in wanted if (trigger, index) not in self._refused}
            if wanted:
                self._learned[trigger] = self._plan.get(trigger, self._unknown) - wanted


def _joins(other: Linear, mine: Linear, route: Route) -> bool:
    """Whether a sibling may be computed with a layer, as far as that changes without its operands changing."""
    return not (
        has_hooks(other)
        or other.training is not mine.training
        or "forward" in other.__dict__
        or other.bypassed(route)
        or ((other.probes or mine.probes) and other.probes.keys() != mine.probes.keys())
    )


def _repeated_alone(layer: Linear, visit: _Visit) -> bool:
    """Whether a checkpoint inside of the owner is around the call: it is recomputed outside, without a visit."""
    return saving_hooks() != visit.hooks or (layer.training and unseen_checkpoints() != visit.checkpoints)


def group_projections(owner: nn.Module, layers: list[Linear], expected: bool = True) -> ProjectionGroup:
    """Let sibling projections of ``owner`` share one operator call wherever they share their input.

    ``expected``: whether they do is taken for granted at first, as for q, k and v, or has to be seen.
    """
    group = ProjectionGroup(layers, expected)
    owner.register_forward_pre_hook(group.enter)
    owner.register_forward_hook(group.release, always_call=True)
    return group
