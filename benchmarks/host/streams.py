"""torch.cuda's streams, events, graphs and memory as the null GPU has them: in order, at once, without a number."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .null_gpu import NullGpu


class Stream:
    """A stream by the number that stands for its handle; everything is over when it is asked for."""

    def __init__(self, number: int):
        self.cuda_stream = number

    def wait_stream(self, stream: Stream) -> None:
        """Nothing to wait for."""


class Event:
    """The wall clock when it was recorded."""

    def __init__(self, enable_timing: bool = False):
        self.at = 0.0

    def record(self, stream: Stream | None = None) -> None:
        """Now."""
        self.at = time.perf_counter()

    def elapsed_time(self, later: Event) -> float:
        """Milliseconds until ``later``."""
        return (later.at - self.at) * 1e3


class Graph:
    """A graph that was captured or was not; what it would repeat does nothing."""

    captured = False

    def replay(self) -> None:
        """Nothing; ``RuntimeError`` before the capture."""
        if not self.captured:
            raise RuntimeError("a graph is replayed before its capture")


def answers(gpu: NullGpu) -> dict[str, Callable[..., Any]]:
    """Functions of torch.cuda by name."""
    numbers = iter(range(1, 2**31))

    class NewStream(Stream):  # a class, as annotations of other libraries want it
        def __init__(self, *device: object, **priority: object):
            super().__init__(next(numbers))

    @contextlib.contextmanager
    def stream(given: Stream) -> Iterator[None]:
        with gpu.stream(given.cuda_stream):
            yield

    @contextlib.contextmanager
    def graph(made: Graph, stream: Stream | None = None) -> Iterator[None]:
        """What a capture forbids is refused at its end: a wait, a copy from or to the host."""
        before = gpu.counts()
        with gpu.stream((stream or NewStream()).cuda_stream), gpu.capturing():
            yield
        found = gpu.counts() - before
        if found.synchronizes or found.to_host or found.to_device:
            raise RuntimeError(f"operation not permitted when stream is capturing: {found}")
        made.captured = True

    return {
        "Stream": NewStream,
        "Event": Event,
        "CUDAGraph": Graph,
        "stream": stream,
        "graph": graph,
        "current_stream": lambda device=None: Stream(gpu.current_stream()),
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device=None: None,
        "max_memory_allocated": lambda device=None: 0,
        "get_device_name": lambda device=None: "null GPU",
    }
