"""Tensors on a device that are made of the host's numbers alone, kept between calls."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable

import torch
from torch import Tensor

CAPTURED = ("cuda",)  # kinds of devices whose work a graph can capture
_MARK = "_made_of_host_numbers"
_thread = threading.local()


def device_constant(maxsize: int) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Decorator of a function of hashable arguments, the device last: its results are kept, ``maxsize`` of them.

    A result holds nothing but what the arguments say, so that whoever repeats a call with equal arguments may keep it.
    Nothing is made in the capture of a CUDA graph (``RuntimeError``): a replay may write over it.
    """

    def decorate(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.lru_cache(maxsize)
        @functools.wraps(make)
        def made(*arguments) -> Tensor:
            if arguments[-1].type in CAPTURED and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "adapters: expected ranks whose tables are on the device, got new ones in the capture of a CUDA "
                    "graph; run a step with them before the capture"
                )
            before, _thread.making = making(), True
            try:
                tensor = make(*arguments)
            finally:
                _thread.making = before
            setattr(tensor, _MARK, True)
            return tensor

        return made

    return decorate


def making() -> bool:
    """Whether this thread is inside a function of ``device_constant``."""
    return getattr(_thread, "making", False)


def is_constant(tensor: Tensor) -> bool:
    """Whether a tensor came out of a function of ``device_constant``."""
    return getattr(tensor, _MARK, False)
