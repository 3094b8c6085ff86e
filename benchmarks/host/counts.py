"""What one call makes the host do, counted exactly: Python frames, C functions, dispatcher calls, allocations.

    with null_gpu() as gpu:
        found = counts(step, gpu)

Counts do not depend on the machine; those of Python do on its version, and on nothing else that is not in the call.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NamedTuple

import torch

from . import null_gpu

# Kineto, which torch's profiler is built on, tells stderr of every start and stop otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

# Frames of their own up to Python 3.11, part of the function around them from 3.12 on.
_INLINED = frozenset(("<listcomp>", "<dictcomp>", "<setcomp>"))


class HostCounts(NamedTuple):
    """Of one call. ``operators``: calls that reached the dispatcher, by name; ``gpu``: events of the null GPU.

    ``frames``: Python functions entered, a generator at each resumption, comprehensions not; ``c_functions``: functions
    of C called from Python; ``allocations``: of memory on the CPU.
    """

    frames: int
    c_functions: int
    operators: Counter[str]
    allocations: int
    gpu: null_gpu.Counts | None

    @property
    def dispatcher(self) -> int:
        return self.operators.total()


def _nothing() -> None:
    pass


def counts(
    call: Callable[[], object], gpu: null_gpu.NullGpu | None = None, before: Callable[[], object] = _nothing
) -> HostCounts:
    """Counts of one call, which runs five times: twice unobserved, then for Python, for torch and for the null GPU.

    ``before`` runs ahead of each of them and is not counted.
    """
    for _ in range(2):
        before()
        call()
    with _no_collections():
        before()
        frames, functions = _python(call, gpu)
        before()
        operators, allocations = _torch(call)
        before()
        events = None if gpu is None else gpu.count(call)
    return HostCounts(sum(frames.values()), sum(functions.values()), operators, allocations, events)


def frames(
    call: Callable[[], object], gpu: null_gpu.NullGpu | None = None, before: Callable[[], object] = _nothing
) -> Counter[str]:
    """The Python functions that one call enters, by file and name: where a difference of two counts comes from."""
    before()
    call()
    with _no_collections():
        before()
        return _python(call, gpu)[0]


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """No collection of garbage, whose callbacks and finalizers are functions as well."""
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _python(call: Callable[[], object], gpu: null_gpu.NullGpu | None) -> tuple[Counter[str], Counter[str]]:
    """Functions of Python entered and of C called, in this thread and in the one where a GPU's backward runs."""
    entered: Counter[str] = Counter()
    called: Counter[str] = Counter()

    def watch(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_name not in _INLINED:
            code = frame.f_code
            # Python 3.10 knows a function's bare name alone.
            entered[f"{code.co_filename}:{getattr(code, 'co_qualname', code.co_name)}"] += 1
        elif event == "c_call":
            called[getattr(argument, "__qualname__", repr(argument))] += 1

    with contextlib.ExitStack() as stack:
        if gpu is not None:
            _in_backward_thread(gpu, lambda: sys.setprofile(watch))
            stack.callback(_in_backward_thread, gpu, lambda: sys.setprofile(None))
        before = sys.getprofile()
        entered.clear(), called.clear()
        try:
            sys.setprofile(watch)
            call()
        finally:
            sys.setprofile(before)
        found = Counter(entered), Counter(called)
    # The last call of C from here is setprofile itself.
    found[1]["setprofile"] -= 1
    return +found[0], +found[1]


def _in_backward_thread(gpu: null_gpu.NullGpu, act: Callable[[], None]) -> None:
    """Runs ``act`` in the thread in which autograd runs the backward of the null GPU's tensors."""
    here = threading.get_ident()

    class Hook(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: torch.Tensor) -> torch.Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx, dy: torch.Tensor) -> torch.Tensor:
            if threading.get_ident() == here:
                raise RuntimeError("a backward on the null GPU ran in the caller's thread")
            act()
            return dy

    x = torch.zeros(1, device=gpu.device, requires_grad=True)
    Hook.apply(x).backward(torch.ones(1, device=gpu.device))


def _torch(call: Callable[[], object]) -> tuple[Counter[str], int]:
    """Calls that the dispatcher saw, nested ones included, and allocations on the CPU, in all threads."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    # Nodes of autograd have names like torch::autograd::AccumulateGrad or autograd::engine::...
    operators = Counter(e.name() for e in events if e.name().count("::") == 1)
    allocations = [e for e in events if e.name() == "[memory]" and e.nbytes() > 0]
    on_cpu = [e for e in allocations if e.device_type() == torch._C._autograd.DeviceType.CPU]
    return operators, len(on_cpu)
