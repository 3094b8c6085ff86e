"""The Triton backend on tensors of the meta device, which have no values: launches are recorded instead of made."""

from __future__ import annotations

import contextlib
import dataclasses

import torch
import torch._dynamo  # keeps torch's functions as they are when it is imported: before they are replaced
from torch.utils._pytree import tree_leaves

from fastlora.ops import autograd, backends
from fastlora.ops.backends import triton as triton_backend

META = torch.device("meta")


def record_launches(monkeypatch) -> list[str]:
    """Names of the kernels that would have been started, on a device that the backend takes for its own."""
    from fastlora.kernels import primitives

    names = []

    def record(kernel, grid, *arguments, **options):
        assert all(isinstance(size, int) and size > 0 for size in grid)
        found = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
        assert all(t.device == META for t in found), "a kernel is given a tensor of the host"
        names.append(kernel.fn.__name__)

    triton = dataclasses.replace(backends.BACKENDS["triton"], unsupported_reason=lambda device, dtype: None)
    monkeypatch.setattr(triton_backend, "unsupported_reason", triton.unsupported_reason)
    monkeypatch.setitem(backends.BACKENDS, "triton", triton)
    monkeypatch.setattr(primitives, "launcher", record)
    # The operator's own shape function would stand in for its kernels on this device, and autocast does not know it.
    monkeypatch.setattr(autograd, "can_skip_dispatcher", lambda tensors: True)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device=None: False)
    monkeypatch.setattr(torch, "autocast", lambda *given, **options: contextlib.nullcontext())
    # On this device the operator that gives no view gives one.
    monkeypatch.setattr(triton_backend, "_reshaped", lambda y, shape: y.new_empty(shape))
    return names
