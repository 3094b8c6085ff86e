"""The autograd node in C++, where it was built for this torch, and what counts graphs whose backward is to come."""

from __future__ import annotations

import weakref
from typing import Any

import torch

_FEW = 256


def _load() -> tuple[Any, str | None]:
    try:
        from .. import _node
    except ImportError as error:
        return None, f"fastlora._node was not built, or for another torch ({error})"
    here = torch.__version__.partition("+")[0]
    if _node.torch_version != here:
        return None, f"fastlora._node was built for torch {_node.torch_version}, and this is {here}"
    try:
        from .. import _plan
    except ImportError:
        return _node, None
    _node.open_plans(_plan.registry())
    return _node, None


# Without it ``torch.autograd.Function`` has the same effect, and takes longer.
NODE, REASON = _load()


class Pending:
    """Graphs that are there and whose backward has not run; true where there are any."""

    def __init__(self):
        self.native = None if NODE is None else NODE.Pending()
        self._nodes: list[weakref.ref] = []
        self._most = _FEW  # nodes kept before those that are gone are sorted out

    def add(self, y: torch.Tensor) -> None:
        """Count a graph whose node is Python's, by the tensor that the node gave."""
        node = y.grad_fn
        while node is not None and not type(node).__weakrefoffset__:  # one of torch's own, as of a view of a subclass
            node = node.next_functions[0][0] if node.next_functions else None
        if node is None:
            return
        self._nodes.append(weakref.ref(node))
        if len(self._nodes) > self._most:
            self._nodes = [node for node in self._nodes if _waits(node)]
            self._most = max(_FEW, 2 * len(self._nodes))

    def __bool__(self) -> bool:
        return (self.native is not None and self.native.count > 0) or any(map(_waits, self._nodes))


def _waits(kept: weakref.ref) -> bool:
    node = kept()
    return node is not None and not getattr(node, "spent", False)
