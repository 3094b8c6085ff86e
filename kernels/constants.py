"""Tensors on a device that are made of the host's numbers alone, kept between calls."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable

import torch
from torch import Tensor

CAPTURED = ("cuda",)  # kinds of devices whose work a graph can capture
# Of each function, results that stay, of less than a KiB: those of a model's layers, whose ranks may all differ, and of
# the batches' sets of adapters, of which there may be more than memory for them. Of the rest the last are kept.
KEPT, RECENT = 1 << 14, 256
_MARK = "_made_of_host_numbers"
_thread = threading.local()


def device_constant(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorator of a function of hashable arguments, the device last: its results are kept.

    A result holds nothing but what the arguments say, so that whoever repeats a call with equal arguments may keep it.
    Nothing is made in the capture of a CUDA graph (``RuntimeError``): a replay may write over it.
    """
    # For good, since a graph reads them at every replay and says so to nobody.
    kept: dict[tuple, Tensor] = {}

    @functools.lru_cache(RECENT)
    def made(*arguments) -> Tensor:
        before, _thread.making = making(), True
        try:
            tensor = make(*arguments)
        finally:
            _thread.making = before
        if len(kept) >= KEPT:
            return tensor
        setattr(tensor, _MARK, True)
        return kept.setdefault(arguments, tensor)

    @functools.wraps(make)
    def found(*arguments) -> Tensor:
        tensor = kept.get(arguments)
        if tensor is not None:
            return tensor
        if arguments[-1].type in CAPTURED and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "adapters: expected ranks whose tables are on the device, got new ones in the capture of a CUDA "
                "graph; run a step with them before the capture"
            )
        return made(*arguments)

    return found


def making() -> bool:
    """Whether this thread is inside a function of ``device_constant``."""
    return getattr(_thread, "making", False)


def is_constant(tensor: Tensor) -> bool:
    """Whether a tensor came out of a function of ``device_constant``, which keeps it for good."""
    return getattr(tensor, _MARK, False)
