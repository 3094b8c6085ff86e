"""Timing on a GPU by events and graph replays; on a CPU, for a dry run, by the wall clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from fastlora._utils import torch_compat

from .cases import Variant

# Inputs are rotated until they exceed this, several times the L2, so that no step finds its input in the cache.
CACHE_BYTES = 200 * 2**20
DRY_RUN = "tiny shapes on the CPU, or on the null GPU, where launches are real and kernels do nothing"


@contextmanager
def device_of(dry_run: str | None) -> Iterator[str]:
    """The device to measure on: "cuda", or for a dry run "cpu", or "null": real launches of kernels that do nothing."""
    if dry_run != "null":
        yield dry_run or "cuda"
        return
    from host.null_gpu import null_gpu

    with null_gpu() as gpu:
        yield gpu.device.type


class Step:
    """The passes of a variant over rotating inputs."""

    def __init__(self, variant: Variant, device: str, dtype: torch.dtype):
        self.variant, case = variant, variant.case
        bytes_each = 2 * case.rows * (case.width + case.total)
        sets = 1 if device == "cpu" else min(8, 1 + CACHE_BYTES // bytes_each)
        self.x = [
            torch.randn(case.rows, case.width, device=device, dtype=dtype, requires_grad=True) for _ in range(sets)
        ]
        with torch.no_grad():
            shapes = [y.shape for y in variant.call(self.x[0])]
        self.dy = [[torch.randn(s, device=device, dtype=torch.float32).to(dtype) for s in shapes] for _ in range(sets)]
        self.sets = sets
        self.graph: list[list[Tensor]] = []

    def forward(self) -> None:
        for x in self.x:
            self.variant.call(x)

    def prepare_backward(self) -> None:
        self.graph = [self.variant.call(x) for x in self.x]

    def backward(self) -> None:
        for x, y, dy in zip(self.x, self.graph, self.dy, strict=True):
            x.grad = None
            self.variant.forget()
            torch.autograd.backward(y, dy, retain_graph=True)

    def both(self) -> None:
        for x, dy in zip(self.x, self.dy, strict=True):
            x.grad = None
            self.variant.forget()
            torch.autograd.backward(self.variant.call(x), dy)
            x.grad = None

    def spare_bytes(self) -> int:
        """What the inputs beyond the first set take."""
        each = [t.numel() * t.element_size() for t in (self.x[0], *self.dy[0])]
        return (self.sets - 1) * sum(each)

    def fifty(self) -> None:
        """Fifty steps of "both", the last with the exact statistic."""
        for i in range(50):
            x, dy = self.x[i % self.sets], self.dy[i % self.sets]
            x.grad = None
            self.variant.forget()
            torch.autograd.backward(self.variant.call(x), dy)
        self.variant.every50(x.detach(), dy)


def summarise(samples: list[float]) -> dict[str, float]:
    """Median and tenths of milliseconds."""
    ordered = sorted(samples)
    at = [ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.5, 0.1, 0.9)]
    return dict(zip(("median_ms", "p10_ms", "p90_ms"), at, strict=True))


def time_calls(call: Callable[[], None], per_call: int, device: str, repeats: int) -> dict[str, float]:
    """Milliseconds of one of the ``per_call`` steps that a call makes, and microseconds of the host's part of it."""
    for _ in range(1 if device == "cpu" else 3):
        call()
    samples = []
    if device == "cpu":
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            samples.append((time.perf_counter() - start) * 1e3 / per_call)
        return summarise(samples) | {"host_us": 1e3 * summarise(samples)["median_ms"]}
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    hosts = []
    torch.cuda.synchronize()
    for start, stop in events:
        start.record()
        before = time.perf_counter()
        call()
        hosts.append((time.perf_counter() - before) * 1e3 / per_call)
        stop.record()
    torch.cuda.synchronize()
    # The least, since a full queue makes the host wait for the device.
    times = summarise([start.elapsed_time(stop) / per_call for start, stop in events])
    return times | {"host_us": 1e3 * min(hosts)}


def captured(call: Callable[[], None]) -> Callable[[], None]:
    """The call as a replay of a CUDA graph; warm-up and capture share a side stream, as autograd wants."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # What a tracker refuses to capture may be timed: nobody reads the statistics of these replays.
    with mock.patch.object(torch_compat, "CAPTURED", ()), torch.cuda.graph(graph, stream=side):
        call()
    return graph.replay


def ceilings(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Measured (bytes a second of a copy, operations a second of a large matmul)."""
    size = 8192 if device != "cpu" else 64
    source = torch.randn(size, size * 8, device=device)
    target = torch.empty_like(source)
    copy = time_calls(lambda: target.copy_(source), 1, device, 20)["median_ms"] * 1e-3
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    multiply = time_calls(lambda: torch.mm(a, b), 1, device, 20)["median_ms"] * 1e-3
    return 2 * source.numel() * 4 / copy, 2.0 * size**3 / multiply
