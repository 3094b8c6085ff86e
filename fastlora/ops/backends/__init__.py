"""One table of backends. A backend turns a call of adapted linears into calls of its kernels.

A backend asked for by name is used or raises with the reason; ``"auto"`` takes the first of the table that supports the
tensor, and ``choose`` says why the earlier ones did not.
"""

from __future__ import annotations

import torch

from ..._utils.errors import unknown_choice
from .. import reference
from . import eager, native
from .base import Backend, ComposedBackend
from .triton import TritonBackend

BACKENDS: dict[str, Backend] = {
    "triton": TritonBackend(),
    "native": native.NativeBackend("native", native.native_kernels(), native.unsupported_reason),
    "eager": ComposedBackend("eager", eager, eager.unsupported_reason),
    "reference": ComposedBackend("reference", reference, lambda device, dtype: None),
}


def choose(name: str, device: torch.device, dtype: torch.dtype) -> tuple[Backend, dict[str, str]]:
    """The backend for a tensor and, by name, why each faster one was passed over.

    Raises ``ValueError`` for an unknown name and ``RuntimeError`` when the one asked for cannot run.
    """
    if name != "auto":
        if name not in BACKENDS:
            raise unknown_choice("backend", name, ("auto", *BACKENDS))
        reason = BACKENDS[name].unsupported_reason(device, dtype)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} was asked for and cannot run: {reason}")
        return BACKENDS[name], {}
    passed: dict[str, str] = {}
    for backend in BACKENDS.values():
        reason = backend.unsupported_reason(device, dtype)
        if reason is None:
            return backend, passed
        passed[backend.name] = reason
    raise RuntimeError(f"no backend supports {dtype} on {device}: {passed}")
