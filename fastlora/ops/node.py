"""The autograd node in C++, where it was built for this torch, and what tells whether a backward is still to come."""

from __future__ import annotations

import weakref
from typing import Any

import torch


def _load() -> tuple[Any, str | None]:
    try:
        from .. import _node
    except ImportError as error:
        return None, f"fastlora._node was not built, or for another torch ({error})"
    here = torch.__version__.partition("+")[0]
    if _node.torch_version != here:
        return None, f"fastlora._node was built for torch {_node.torch_version}, and this is {here}"
    return _node, None


# Without it ``torch.autograd.Function`` has the same effect, and takes longer.
NODE, REASON = _load()


class Watch:
    """Whether the graph of a call is there and its backward has not run, by a node of Python's."""

    def __init__(self, node: Any):
        self.node = weakref.ref(node)

    @property
    def pending(self) -> bool:
        node = self.node()
        return node is not None and not getattr(node, "spent", False)


def watch(y: torch.Tensor) -> Watch | None:
    """The watch of a tensor's graph, None without one."""
    return None if y.grad_fn is None else Watch(y.grad_fn)
