"""Which adapters a forward runs with, for each thread; a recomputation in backward repeats what its forward had."""

from __future__ import annotations

import logging
import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from .._utils.torch_compat import checkpoint_frame, in_backward, in_reentrant_checkpoint, saving_hooks
from ..ops.layout import AdapterBatch

logger = logging.getLogger(__name__)

_FEW_GRAPHS = 256
_EXPLAINED = 8  # sets of adapters; torch gives up compiling at about as many


class Route:
    """One way through a model: base only, one adapter for every row, or a batch with an adapter for each.

    ``mask``: which tokens count in statistics of the output, None for all.
    """

    __slots__ = ("__weakref__", "adapter", "batch", "enabled", "mask")

    def __init__(self, enabled: bool, adapter: str, batch: AdapterBatch | None = None, mask: Tensor | None = None):
        self.enabled, self.adapter, self.batch, self.mask = enabled, adapter, batch, mask

    @property
    def names(self) -> tuple[str, ...]:
        return (self.adapter,) if self.batch is None else self.batch.names

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
        self._clear()

    def _clear(self) -> None:
        self._open = threading.local()
        # Forwards that a checkpoint may repeat: by the checkpoint's own frame, or only as ways that were taken.
        self._framed: weakref.WeakKeyDictionary[Any, Route] = weakref.WeakKeyDictionary()
        self._taken: list[tuple[Route, int]] = []  # with the number of changes to adapters by then
        self._repeated = False
        self._changes = 0
        self._changed: dict[str, int] = {}  # number of the last change to the ranks of an adapter
        self._graphs: list[tuple[weakref.ref, tuple[str, ...]]] = []
        self._most = _FEW_GRAPHS  # graphs kept before those that are gone are sorted out
        self.compiled, self._compiled_for = False, []
        self.used: list[AdapterBatch | str] | None = (
            None  # what contexts asked for since the last step, if somebody wants it
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"slots": list(self.slots), "adapter": self.default.adapter}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.slots, self.default = state["slots"], Route(True, state["adapter"])
        self._clear()

    @property
    def names(self) -> list[str]:
        return [name for name in self.slots if name is not None]

    def add(self, name: str) -> None:
        if name not in self.slots:
            self.slots.append(name)

    def current(self) -> Route:
        """The way of the innermost open context of this thread, or the default."""
        return getattr(self._open, "route", self.default)

    def changed(self, name: str) -> None:
        """Take note that an adapter has other factors."""
        self._changes += 1
        self._changed[name] = self._changes

    def remove(self, name: str) -> None:
        self.slots[self.slots.index(name)] = None

    def open(self, route: Route | None, reopened: bool = False) -> Route | None:
        """Make ``route`` this thread's way (None: the default again); returns what it replaces."""
        wanted = self.used is not None and route is not None and route.enabled and not reopened
        if wanted and torch.is_grad_enabled():
            self.used.append(route.batch or route.adapter)
        before = getattr(self._open, "route", None)
        if route is not None and route.mask is None and not reopened and before is not None:
            route.mask = before.mask
        if route is None:
            self._open.__dict__.pop("route", None)
        else:
            self._open.route = route
        return before

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

    def built(self, node: Any, route: Route) -> None:
        """Remember a node of a graph that runs through the adapters of ``route``."""
        self._graphs.append((weakref.ref(node), route.names))
        if len(self._graphs) > self._most:
            self._graphs = [kept for kept in self._graphs if kept[0]() is not None]
            self._most = max(_FEW_GRAPHS, 2 * len(self._graphs))

    def awaits_backward(self, name: str) -> bool:
        """Whether a graph through the adapter is alive whose backward has not run."""
        for kept, names in self._graphs:
            node = kept()
            if node is not None and name in names and not getattr(node, "spent", False):
                return True
        return False

    def traced(self) -> Route:
        """As ``route``, for a compiler."""
        self.compiled = True
        return self.current()

    def route(self, training: bool) -> Route:
        """The way of the forward that is running.

        Raises ``RuntimeError`` in a recomputation whose forward cannot be told from others that went other ways.
        """
        if in_backward():
            return self._repeat()
        route = getattr(self._open, "route", self.default)
        if self._repeated:
            self._taken, self._repeated = [], False
        if not torch.is_grad_enabled() or saving_hooks() is not None:
            self._remember(route, training)
        return route

    def enter(self, module: Any, args: Any) -> None:
        """Forward pre-hook of the model: whether its forward builds a graph, now or when a checkpoint repeats it."""
        if not torch.compiler.is_compiling() and not in_backward():
            self._open.grad = torch.is_grad_enabled() or in_reentrant_checkpoint()

    def _remember(self, route: Route, training: bool) -> None:
        if torch.is_grad_enabled():
            hooks = saving_hooks()
            if hooks is None:
                return
            frame = checkpoint_frame(hooks)
            if frame is not None:
                self._framed[frame] = route
                return
        elif not training or not getattr(self._open, "grad", True):
            return  # no graph is being built, so nothing will be repeated
        self._taken = [taken for taken in self._taken if not taken[0].same(route)] + [(route, self._changes)]

    def _repeat(self) -> Route:
        hooks = saving_hooks()
        frame = None if hooks is None else checkpoint_frame(hooks)
        if frame is not None and frame in self._framed:
            return self._framed[frame]
        self._repeated = True
        if len(self._taken) > 1:
            raise RuntimeError(
                "activation checkpointing repeats a forward that cannot be told from others with other adapters or "
                "masks: run backward before the next forward with other ones, or checkpoint with use_reentrant=False"
            )
        if not self._taken:
            return self.current()
        route, changes = self._taken[0]
        for name in route.names:
            if self._changed.get(name, 0) > changes:
                raise RuntimeError(
                    f"adapter {name!r} was given other factors after the forward that activation checkpointing "
                    "repeats; change ranks and adapters between backward and the next forward"
                )
        return route


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "none"
