"""Every place where torch, Triton and fastlora ask about a GPU, answered by the null GPU and put back at exit.

The modules of fastlora that take part are found in one place, ``_parts``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import importlib
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple
from unittest import mock

import torch

from . import limits, streams

if TYPE_CHECKING:
    from .null_gpu import NullGpu


class _Parts(NamedTuple):
    backends: ModuleType  # BACKENDS
    triton: ModuleType  # unsupported_reason(device, dtype)
    native: ModuleType  # _KERNELS, pairs (operator, kind of device)
    operator: ModuleType  # LIBRARY, _autocast(name, kind of device)
    primitives: ModuleType  # _workspace(size, alignment, stream), nullcontext
    constants: ModuleType  # CAPTURED
    compat: ModuleType  # CAPTURED


def _parts() -> _Parts:
    of_ops = ("ops.backends", "ops.backends.triton", "ops.native", "ops.autograd")
    names = (*of_ops, "kernels.primitives", "kernels.constants", "_utils.torch_compat")
    return _Parts(*[importlib.import_module(f"fastlora.{name}") for name in names])


@contextlib.contextmanager
def activated(gpu: NullGpu) -> Iterator[None]:
    """Inside, the null GPU is the CUDA device of torch.cuda's queries, of Triton and of fastlora."""
    with contextlib.ExitStack() as stack:
        _torch_cuda(gpu, stack)
        _triton(gpu, stack)
        _fastlora(gpu, stack)
        yield


def _torch_cuda(gpu: NullGpu, stack: contextlib.ExitStack) -> None:
    def answer(name: str, value: Callable) -> None:
        stack.enter_context(mock.patch.object(torch.cuda, name, value))

    major, minor = gpu.capability
    properties = SimpleNamespace(
        name="null GPU", major=major, minor=minor,
        multi_processor_count=gpu.attribute(limits.MULTIPROCESSORS),
        shared_memory_per_block_optin=gpu.attribute(limits.SHARED_OPTIN),
    )  # fmt: skip
    answer("_lazy_init", lambda: None)
    answer("device_count", gpu.device_count)
    answer("current_device", gpu.current_device)
    answer("get_device_properties", lambda device=None: properties)
    answer("get_device_capability", lambda device=None: (major, minor))
    answer("is_current_stream_capturing", gpu.is_capturing)
    answer("_exchange_device", gpu.exchange_device)
    answer("_maybe_exchange_device", gpu.exchange_device)
    for name, value in streams.answers(gpu).items():
        answer(name, value)
    stack.enter_context(mock.patch.object(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, create=True))


def _triton(gpu: NullGpu, stack: contextlib.ExitStack) -> None:
    from triton.backends.nvidia.driver import CudaDriver
    from triton.compiler import compiler
    from triton.runtime import driver

    class NullDriver(CudaDriver):
        def __init__(self) -> None:
            super().__init__()
            self.get_device_capability = lambda device=None: gpu.capability
            self.get_current_device = gpu.current_device
            self.set_current_device = gpu.set_current_device
            self.get_current_stream = gpu.current_stream

        def get_active_torch_device(self) -> torch.device:
            return torch.device(gpu.device.type, gpu.current_device())

    before = driver._active
    driver.set_active(NullDriver())
    stack.callback(setattr, driver, "_active", before)
    for forget in (_forget_compiled, compiler.max_shared_mem.cache_clear):
        forget()
        stack.callback(forget)


def _forget_compiled() -> None:
    """What kernels and the choice of tiles keep of a device by its number: another one may stand behind it now."""
    from fastlora.kernels import tiling
    from triton.runtime.jit import JITFunction

    for found in gc.get_objects():
        if type(found) is JITFunction:
            found.device_caches.clear()
    tiling.limits.cache_clear()


def _fastlora(gpu: NullGpu, stack: contextlib.ExitStack) -> None:
    parts, cuda = _parts(), torch.device("cuda", 0)
    supported = parts.triton.unsupported_reason

    def reason(device: torch.device, dtype: torch.dtype) -> str | None:
        return supported(cuda if device.type == gpu.device.type else device, dtype)

    def workspace(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int8, device=gpu.device)

    there = dataclasses.replace(parts.backends.BACKENDS["triton"], unsupported_reason=reason)
    kernels = parts.native._KERNELS | {
        (name, gpu.device.type) for name, kind in parts.native._KERNELS if kind == "cuda"
    }
    for patch in (
        mock.patch.object(parts.triton, "unsupported_reason", reason),
        mock.patch.dict(parts.backends.BACKENDS, triton=there),
        mock.patch.object(parts.native, "_KERNELS", kernels),
        mock.patch.object(parts.primitives, "_workspace", workspace),
        *[mock.patch.object(part, "CAPTURED", (gpu.device.type,)) for part in (parts.constants, parts.compat)],
        # As costly as what a launch on a GPU does to make its device the current one; here the caller has done so.
        mock.patch.object(parts.primitives, "nullcontext", lambda: torch.cuda.device(gpu.current_device())),
    ):
        stack.enter_context(patch)
    _autocast(gpu.device.type)


@functools.cache
def _autocast(kind: str) -> torch.library.Library:
    """Operators with a kernel for autocast on a GPU have one for the null GPU; it stays, as the device does."""
    library, operator = torch.library.Library("fastlora", "FRAGMENT"), _parts().operator
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("AutocastCUDA"):
        if name.startswith("fastlora::"):
            short = name.removeprefix("fastlora::")
            library.impl(short, operator._autocast(short, kind), "AutocastPrivateUse1")
    return library
