"""Which adapters a forward runs with, for each thread and task; a recomputation in backward repeats its forward's."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import weakref
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from .._utils.distributed import shards
from .._utils.torch_compat import checkpoint_frame, in_backward, in_reentrant_checkpoint, saving_hooks
from ..ops.layout import AdapterBatch
from ..ops.node import Pending

logger = logging.getLogger(__name__)

# The innermost open context of each router, by its number: contexts keep variables alive, so that there is but one.
_ways: ContextVar[dict[int, Route] | None] = ContextVar("fastlora_routes", default=None)
_numbers = itertools.count()
_MANY = 256  # sets of adapters whose graphs are counted before those without any are forgotten
_EXPLAINED = 8  # sets of adapters; torch gives up compiling at about as many


class Route:
    """One way through a model: base only, one adapter for every row, or a batch with an adapter for each.

    ``names``: the adapters that may run. ``mask``: which tokens count in statistics of the output, None for all.
    ``ran``: whether a graph was built on this way since it was last asked. The route of a context knows the one around
    it, whether it chose the way, whether it was closed, whether it was opened in a backward, and whether the context
    lasted beyond an ``await``.
    """

    __slots__ = (
        "__weakref__", "adapter", "awaited", "batch", "chosen", "closed", "enabled", "mask", "names", "outer", "ran",
        "repeated",
    )  # fmt: skip

    def __init__(self, enabled: bool, adapter: str, batch: AdapterBatch | None = None, mask: Tensor | None = None):
        self.enabled, self.adapter, self.batch, self.mask = enabled, adapter, batch, mask
        self.names = (adapter,) if batch is None else batch.names
        self.outer: Route | None = None
        self.chosen = self.closed = self.repeated = self.awaited = self.ran = False

    def same(self, other: Route) -> bool:
        mine, its = (self.enabled, self.adapter, self.batch), (other.enabled, other.adapter, other.batch)
        return self is other or (mine == its and self.mask is other.mask)

    def masked(self, mask: Tensor) -> Route:
        """The same way with other tokens that count."""
        return Route(self.enabled, self.adapter, self.batch, mask)


class Router:
    """The adapters of a model by number, the one that runs by default, and the contexts that are open.

    Every adapted layer of a model holds the same router. ``slots[id]`` is the adapter's name, None once removed.
    """

    def __init__(self, adapter: str):
        self.slots: list[str | None] = [adapter]
        self.default = Route(True, adapter)
        self.configs: dict[str, Any] = {}  # of adapters by name, as ``inject`` and its like were given them
        self.experts = False  # whether some matrices run only where rows are sent to them
        self._clear()

    def _clear(self) -> None:
        self._number = next(_numbers)
        self._contexts: weakref.WeakSet[Route] = weakref.WeakSet()
        self.holders: weakref.WeakSet[Any] = weakref.WeakSet()  # the layers and trained rows that ask for a way here
        self._open = threading.local()  # whether a graph is built, and what compiled code reads
        self._awaited = 0  # contexts that are open beyond an await
        # Forwards that a checkpoint may repeat: by the checkpoint's own frame (None: it went several ways), or only as
        # ways that were taken; with the number of changes to adapters by then.
        self._framed: weakref.WeakKeyDictionary[Any, tuple[Route, int] | None] = weakref.WeakKeyDictionary()
        self._taken: list[tuple[Route, int]] = []
        self._repeated = False
        self._changes = 0
        self._changed: dict[str | None, int] = {}  # number of the last change to an adapter; None: of a merge
        self._pending: dict[tuple[str, ...], Pending] = {}
        self.sharded = False  # of the model's last forward, asked only with ``experts``
        self.compiled, self._compiled_for = False, []
        self._watchers: list[weakref.ref[set[Route]]] = []

    def __getstate__(self) -> dict[str, Any]:
        state = {"slots": list(self.slots), "adapter": self.default.adapter, "experts": self.experts}
        return {**state, "configs": self.configs}  # the very dict that the model holds

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.slots, self.default = state["slots"], Route(True, state["adapter"])
        self.experts, self.configs = state.get("experts", False), state.get("configs", {})
        self._clear()

    @property
    def names(self) -> list[str]:
        return [name for name in self.slots if name is not None]

    @property
    def taken(self) -> list[str | None]:
        """The slots up to the last adapter that is there."""
        return self.slots[: 1 + max(i for i, name in enumerate(self.slots) if name is not None)]

    def add(self, name: str, number: int) -> None:
        """Give an adapter the id ``number``, which is none of those given before."""
        self.slots += [None] * (number - len(self.slots)) + [name]

    def current(self) -> Route:
        """The way of the innermost open context of this thread or task, or the default."""
        ways = _ways.get()
        route = None if ways is None else ways.get(self._number)
        if route is None:
            return self.default
        return self._innermost(route) or self.default if route.closed else route

    def _here(self) -> Route | None:
        """The innermost open context of this thread or task."""
        return self._innermost((_ways.get() or {}).get(self._number))

    def _go(self, route: Route | None) -> None:
        """Make ``route`` the way of this thread or task; those of other models that are closed are forgotten."""
        ways = {n: r for n, r in (_ways.get() or {}).items() if n != self._number and self._innermost(r) is not None}
        _ways.set({**ways, self._number: route} if route is not None else ways or None)

    @staticmethod
    def _innermost(route: Route | None) -> Route | None:
        while route is not None and route.closed:
            route = route.outer
        return route

    def changed(self, name: str | None) -> None:
        """Take note that an adapter has other factors, or (None) that the base has: something was merged."""
        self._changes += 1
        self._changed[name] = self._changes

    def set_default(self, name: str) -> None:
        """Let forwards outside of every context run with an adapter from now on."""
        self._tell(self.default)
        self.default = Route(True, name)

    def watch(self) -> set[Route]:
        """A set to which ``gather`` adds the ways on which a graph was built from now on, while somebody holds it."""
        self.gather()
        ways: set[Route] = set()
        self._watchers.append(weakref.ref(ways, self._watchers.remove))
        return ways

    def gather(self) -> None:
        """Tell all that watch of the ways that are still open; those of closed contexts they know."""
        for route in (*list(self._contexts), self.default):
            self._tell(route)

    def _tell(self, route: Route) -> None:
        if route.ran:
            route.ran = False
            for watcher in list(self._watchers):
                if (ways := watcher()) is not None:
                    ways.add(route)

    def remove(self, name: str) -> None:
        self.slots[self.slots.index(name)] = None

    def open(self, route: Route, chosen: bool = True) -> Route:
        """Make ``route`` the way of this thread or task until ``close``; not ``chosen``: as it was, with a mask."""
        route.chosen = chosen
        self._contexts.add(route)
        outer = route.outer = self._here()
        if outer is not None and route.mask is None:
            route.mask = outer.mask
        route.repeated = in_backward()
        self._go(route)
        self._open.route = route
        with suppress(RuntimeError):  # where no loop runs
            asyncio.get_running_loop().call_soon(self._awaits, route)
        return route

    def close(self, route: Route) -> None:
        """End a context, in whichever order and task."""
        route.closed = True
        self._tell(route)
        if route.awaited:
            self._awaited -= 1
        way = self._here()
        self._go(way)
        if way is None:
            self._open.__dict__.pop("route", None)
        else:
            self._open.route = way

    def _awaits(self, route: Route) -> None:
        """Take note of a context that is open while other tasks run: compiled code cannot tell tasks apart."""
        if not route.closed:
            route.awaited = True
            self._awaited += 1

    def open_contexts(self) -> list[Route]:
        """The ways that open contexts of all threads and tasks chose."""
        return [route for route in list(self._contexts) if route.chosen and not route.closed]

    def explain_recompilation(self, route: Route) -> None:
        """Say why a compiled model is compiled again: which adapters run is part of its code; their ids are not."""
        kind = (route.batch is None, (route.adapter,) if route.batch is None else route.batch.names)
        if not self.compiled:
            self._compiled_for = [kind]
        elif kind not in self._compiled_for and len(self._compiled_for) < _EXPLAINED:
            logger.warning(
                "the compiled model is compiled again for the adapters of this batch, %s: which ones run is part of "
                "the code, and so far these did: %s. A tensor of ids may change as long as the same adapters occur",
                _listed(kind[1]),
                "; ".join(_listed(names) for _, names in self._compiled_for),
            )
            self._compiled_for.append(kind)

    def pending(self, route: Route) -> Pending:
        """What counts the graphs through the adapters of a way."""
        found = self._pending.get(route.names)
        if found is None:
            if len(self._pending) >= _MANY:
                self._pending = {names: kept for names, kept in list(self._pending.items()) if kept}
            found = self._pending[route.names] = Pending()
        return found

    def awaits_backward(self, name: str) -> bool:
        """Whether a graph through the adapter is alive whose backward has not run."""
        return any([name in names and bool(found) for names, found in list(self._pending.items())])

    def traced(self) -> Route:
        """As ``route``, for a compiler, which knows threads but no tasks."""
        self.compiled = True
        if self._awaited:
            raise RuntimeError(
                "a context of use_adapters or disable_adapters is open beyond an await, and compiled code cannot tell "
                "tasks apart; run the compiled model in a context without awaits, or the model as it is"
            )
        route = getattr(self._open, "route", self.default)
        if torch.is_grad_enabled():
            route.ran = True
        return route

    def route(self, training: bool) -> Route:
        """The way of the forward that is running.

        Raises ``RuntimeError`` in a recomputation whose forward cannot be told from others that went other ways.
        """
        if in_backward():
            route = self._repeat()
            if self._watchers and torch.is_grad_enabled():
                route.ran = True
                self._tell(route)  # its context may be closed
            return route
        route, builds = self.current(), torch.is_grad_enabled()
        if builds:
            route.ran = True
        if self._repeated:
            self._taken, self._repeated = [], False
        if not builds or saving_hooks() is not None:
            self._remember(route, training)
        return route

    def enter(self, module: Any, args: Any) -> None:
        """Forward pre-hook of the model: whether its forward builds a graph, now or when a checkpoint repeats it."""
        if not torch.compiler.is_compiling() and not in_backward():
            self._open.grad = torch.is_grad_enabled() or in_reentrant_checkpoint()
            if self.experts:
                self.sharded = bool(shards(module))

    def leave(self, module: Any, args: Any, output: Any) -> None:
        """Forward hook of the model: outside of it, nothing is known of a forward."""
        if not torch.compiler.is_compiling() and not in_backward():
            self._open.grad = True

    def _remember(self, route: Route, training: bool) -> None:
        if torch.is_grad_enabled():
            hooks = saving_hooks()
            if hooks is None:
                return
            frame = checkpoint_frame(hooks)
            if frame is not None:
                known = self._framed.setdefault(frame, (route, self._changes))
                if known is not None and known[0] is not route and not known[0].same(route):
                    self._framed[frame] = None
                return
        elif not getattr(self._open, "grad", True) or not (training or in_reentrant_checkpoint()):
            return  # no graph is being built, so nothing will be repeated
        others = [taken for taken in self._taken if not taken[0].same(route)]
        self._taken = [*others[-1:], (route, self._changes)]  # two that differ are refused, as more would be

    def _repeat(self) -> Route:
        current = self.current()
        if current.repeated:
            return current  # what is repeated opened the context itself
        hooks = saving_hooks()
        frame = None if hooks is None else checkpoint_frame(hooks)
        if frame is not None and frame in self._framed:
            found = [self._framed[frame]]
        else:
            self._repeated = True
            # A checkpoint inside a repeated one is new: it goes the way of the others, where there is only one.
            found = self._taken or ([] if frame is None else _different(list(self._framed.values())))
        if len(found) > 1 or None in found:
            raise RuntimeError(
                "activation checkpointing repeats a forward that cannot be told from others with other adapters or "
                "masks: run backward before the next forward with other ones, or checkpoint with use_reentrant=False "
                "what runs with one way"
            )
        if not found:
            return current
        route, changes = found[0]
        for name in (*route.names, None):
            if self._changed.get(name, 0) > changes:
                what = (
                    "the weights were merged or unmerged"
                    if name is None
                    else f"adapter {name!r} was given other factors"
                )
                raise RuntimeError(
                    f"{what} after the forward that activation checkpointing repeats; change ranks, adapters and "
                    "weights between backward and the next forward"
                )
        return route


class Routed(nn.Module):
    """A module that asks a router for its way: among the router's ``holders``, as are copies among their own's."""

    router: Router

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.router.holders.add(self)


def _different(found: list[tuple[Route, int] | None]) -> list[tuple[Route, int] | None]:
    """The first and, where there is one, the first that goes another way."""
    first = found[:1]
    if not first or first[0] is None:
        return first
    return first + [other for other in found if other is None or not other[0].same(first[0][0])][:1]


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "none"
