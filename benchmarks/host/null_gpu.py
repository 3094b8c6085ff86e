"""The null GPU: a CUDA driver and a torch device whose kernels do nothing, under torch's, Triton's and fastlora's code.

    with null_gpu(capability=(9, 0)) as gpu:
        layer = fastlora.nn.Linear(..., device=gpu.device)
        launches = gpu.record(lambda: layer(x))

What runs is real: operators, autograd, autocast, Triton's binder and its launcher; what a GPU would do is not. Tensors
have no data. The first activation, before any backward, loads a ``libcuda.so.1`` and names torch's private device
``null`` for the rest of the process, so it belongs in a process of its own; everything else is put back at exit.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from . import activate, limits
from .build import Built, build
from .records import Launch, Record, launches, parse

NAME = "null"
DRIVER_VERSION = 13000


class Counts(NamedTuple):
    """Events of the null GPU, and the bytes that were allocated."""

    launches: int
    tensor_maps: int
    driver_copies: int
    attributes: int
    synchronizes: int
    allocations: int
    frees: int
    kernels: int
    gemms: int
    to_device: int
    to_host: int
    fallbacks: int
    allocated_bytes: int

    def __sub__(self, before: Counts) -> Counts:
        return Counts(*(a - b for a, b in zip(self, before, strict=True)))


class NullGpu:
    """A loaded null GPU."""

    def __init__(self, driver: ctypes.CDLL, torch_device: ctypes.CDLL):
        self._driver, self._torch_device = driver, torch_device
        driver.null_gpu_log.restype = ctypes.POINTER(ctypes.c_uint8)
        driver.null_gpu_log.argtypes = [ctypes.POINTER(ctypes.c_uint64)]
        driver.null_gpu_count.restype = ctypes.c_int64
        driver.null_gpu_fail.argtypes = [ctypes.c_char_p, ctypes.c_int]
        torch_device.null_gpu_current_stream.restype = ctypes.c_int64
        torch_device.null_gpu_set_stream.argtypes = [ctypes.c_int, ctypes.c_int64]
        self._capturing = False
        self.set_limits((9, 0))
        self.set_system(1, DRIVER_VERSION)

    @property
    def device(self) -> torch.device:
        return torch.device(NAME, 0)

    def counts(self) -> Counts:
        """Everything since the process began."""
        return Counts(*(self._driver.null_gpu_count(kind) for kind in range(len(Counts._fields))))

    def count(self, call: Callable[[], object]) -> Counts:
        """What one call makes happen."""
        before = self.counts()
        call()
        return self.counts() - before

    def trace(self, call: Callable[[], object]) -> list[Record]:
        """Everything that one call makes happen, in order."""
        if self._driver.null_gpu_recording():
            raise RuntimeError("call: expected to be recorded alone, got one inside another record")
        self._driver.null_gpu_record(1)
        try:
            call()
        finally:
            self._driver.null_gpu_record(0)
        size = ctypes.c_uint64()
        log = self._driver.null_gpu_log(ctypes.byref(size))
        return parse(ctypes.string_at(log, size.value))

    def record(self, call: Callable[[], object]) -> list[Launch]:
        """The launches of one call, in order."""
        return launches(self.trace(call))

    def set_limits(
        self, capability: tuple[int, int], shared_bytes: int | None = None, multiprocessors: int | None = None
    ) -> None:
        """What the driver says of the device; what is None is as on a card of this capability."""
        self._attributes = limits.attributes(capability, limits.gpu(capability, shared_bytes, multiprocessors))
        for which, value in self._attributes.items():
            self._driver.null_gpu_set_attribute(which, value)
        self.capability = capability

    def attribute(self, which: int) -> int:
        """A CUdevice_attribute as the driver tells it."""
        return self._attributes[which]

    def device_count(self) -> int:
        return self._devices

    def set_system(self, devices: int, driver_version: int) -> None:
        self._devices = devices
        self._driver.null_gpu_set_system(devices, driver_version)
        self._torch_device.null_gpu_set_device_count(devices)

    @contextlib.contextmanager
    def failing(self, function: str, result: int) -> Iterator[None]:
        """Inside, ``function`` of the driver (as ``cuModuleLoadData``) returns the CUresult and does nothing.

        With 500, CUDA_ERROR_NOT_FOUND, ``cuGetProcAddress`` does not find it either.
        """
        self._driver.null_gpu_fail(function.encode(), result)
        try:
            yield
        finally:
            self._driver.null_gpu_fail(function.encode(), 0)

    def current_device(self) -> int:
        return self._torch_device.null_gpu_current_device()

    def set_current_device(self, index: int) -> None:
        self._torch_device.null_gpu_set_current_device(index)

    def exchange_device(self, index: int) -> int:
        """Makes a device the current one, unless the index is negative, and returns the one before."""
        return self._torch_device.null_gpu_exchange_device(index)

    def current_stream(self, index: int | None = None) -> int:
        """The number that stands for the handle of this thread's current stream; 0: the default one."""
        return self._torch_device.null_gpu_current_stream(self.current_device() if index is None else index)

    def is_capturing(self) -> bool:
        return self._capturing

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """Inside, torch says that a CUDA graph is captured; what runs is the same."""
        before, self._capturing = self._capturing, True
        try:
            yield
        finally:
            self._capturing = before

    @contextlib.contextmanager
    def stream(self, number: int) -> Iterator[None]:
        """Inside, this thread's current stream of the current device is ``number``."""
        index, before = self.current_device(), self.current_stream()
        self._torch_device.null_gpu_set_stream(index, number)
        try:
            yield
        finally:
            self._torch_device.null_gpu_set_stream(index, before)


@functools.cache
def load() -> NullGpu:
    """The libraries in this process and the device's name in torch, once; ``RuntimeError`` where it is too late."""
    _refuse_real_driver()
    built: Built = build()
    os.environ["TRITON_LIBCUDA_PATH"] = str(built.driver.parent)
    driver = ctypes.CDLL(str(built.driver), mode=ctypes.RTLD_GLOBAL)
    torch_device = ctypes.CDLL(str(built.device))
    torch.utils.rename_privateuse1_backend(NAME)
    gpu = NullGpu(driver, torch_device)
    torch._register_device_module(NAME, _module(gpu))
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=False)
    _try_backward(gpu)
    return gpu


def _try_backward(gpu: NullGpu) -> None:
    """Autograd starts a thread for each device at the first backward of a process: one that comes later has none."""
    x = torch.empty(1, device=gpu.device, requires_grad=True)
    try:
        x.view_as(x).backward(torch.empty(1, device=gpu.device))
    except RuntimeError as error:
        raise RuntimeError("the null GPU must be loaded before the first backward of the process") from error


def _refuse_real_driver() -> None:
    if torch.cuda.is_available():
        raise RuntimeError("the null GPU stands for a CUDA driver, and torch has one; hide it (CUDA_VISIBLE_DEVICES=)")
    for line in open("/proc/self/maps"):
        if "libcuda.so" in line:
            raise RuntimeError(f"another CUDA driver is in this process: {line.split()[-1]}")


def _module(gpu: NullGpu) -> types.ModuleType:
    """torch.null: what torch asks a device's module."""
    module = types.ModuleType(f"torch.{NAME}")
    module._is_in_bad_fork = lambda: False
    module._lazy_init = lambda: None
    module.is_available = lambda: True
    module.is_initialized = lambda: True
    module.device_count = gpu.device_count
    module.current_device = gpu.current_device
    module.set_device = lambda index: gpu.set_current_device(torch.device(NAME, index).index)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    module.get_rng_state = lambda device=None: torch.empty(0, dtype=torch.uint8)
    module.set_rng_state = lambda state, device=None: None
    module.manual_seed_all = module.manual_seed = lambda seed: None
    sys.modules[module.__name__] = module
    return module


@contextlib.contextmanager
def null_gpu(
    capability: tuple[int, int] = (9, 0),
    shared_bytes: int | None = None,
    multiprocessors: int | None = None,
    devices: int = 1,
    driver_version: int = DRIVER_VERSION,
) -> Iterator[NullGpu]:
    """Inside, torch tensors can be on ``gpu.device``, and Triton and fastlora take that for a CUDA GPU.

    shared_bytes: most shared memory of a block, in bytes; multiprocessors: their number; None: as on a card of this
    capability. Raises ``ValueError`` for a capability that is not known and ``RuntimeError`` where it cannot be built.
    """
    limits.gpu(capability, shared_bytes, multiprocessors)
    gpu = load()
    gpu.set_limits(capability, shared_bytes, multiprocessors)
    gpu.set_system(devices, driver_version)
    with activate.activated(gpu):
        yield gpu
