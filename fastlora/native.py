"""The compiled library: loads ``fastlora/_C.so`` if it was built and registers shapes for tracing.

The operators are ``torch.ops.fastlora``'s; their schemas are in ``csrc/library.cpp``. Nothing here raises on import: a
missing or unusable library is what :func:`reason` tells.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import native_shapes

__all__ = ["LIBRARY", "available", "gradstat", "has_kernel", "isa", "reason"]

logger = logging.getLogger(__name__)

# Another build of the library, such as an instrumented one, is loaded by naming it.
LIBRARY = Path(os.environ.get("FASTLORA_LIBRARY") or Path(__file__).with_name("_C.so"))


def _load() -> str | None:
    """Loads the library once; returns why it could not be."""
    if not LIBRARY.is_file():
        return f"the native library was not built: no {LIBRARY.name} (reinstall with FASTLORA_BUILD=1 to see why)"
    try:
        torch.ops.load_library(str(LIBRARY))
    except (OSError, RuntimeError) as error:
        logger.warning("the native library failed to load: %s", error)
        return f"the native library failed to load: {error}"
    return None


_REASON = _load()
if _REASON is None:
    native_shapes.register()
# Looked up once: torch.compile cannot trace the dispatcher's tables.
_KERNELS = frozenset(
    (name.removeprefix("fastlora::"), device)
    for device in ("cpu", "cuda")
    for name in torch._C._dispatch_get_registrations_for_dispatch_key(device.upper())
    if name.startswith("fastlora::")
)


def available() -> bool:
    """Whether the native operators can be called."""
    return _REASON is None


def reason() -> str | None:
    """Why the native operators are not available, or None if they are."""
    return _REASON


def has_kernel(operator: str, device: torch.device) -> bool:
    """Whether a native operator has a kernel for a kind of device."""
    return (operator, device.type) in _KERNELS


def isa() -> str:
    """Instruction set that the CPU kernels use in this process: one of ``FASTLORA_CPU_ISA``'s.

    Raises:
        RuntimeError: the native library is not available.
    """
    if _REASON is not None:
        raise RuntimeError(f"isa() needs the native library, but {_REASON}")
    return torch.ops.fastlora.cpu_isa()


# Rows of a tile of the gradient: it stays in cache between the product and its reduction, while the library's matmul,
# which packs x again for every tile, still runs at full speed (32 rows: a third of it).
_TILE_ROWS = 256


def gradstat(x: Tensor, dy: Tensor, offsets: Sequence[int], absolute: bool = True) -> Tensor:
    """``sum G^2`` and ``sum |G|`` of ``G = dy^T x`` for each run of rows ``offsets[i]:offsets[i + 1]``.

    x [M, K], dy [M, N] -> fp32 [len(offsets) - 1, 2]. Without ``absolute`` the second column is zero, and short runs
    go by ``||G||^2 = <x x^T, dy dy^T>``. G is reduced tile by tile: no [N, K] buffer.
    """
    sums = torch.zeros(len(offsets) - 1, 2, dtype=torch.float64)
    depth, width = x.shape[1], dy.shape[1]
    buffer = torch.empty(min(_TILE_ROWS, width), depth)
    for i, (start, stop) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        count, rows = stop - start, x[start:stop].float()
        if not absolute and count * (depth + width) < depth * width:
            sums[i, 0] = _gram_norm(rows, dy[start:stop].float())
            continue
        for n in range(0, width, _TILE_ROWS):
            tile = buffer[: min(_TILE_ROWS, width - n)]
            torch.mm(dy[start:stop, n : n + _TILE_ROWS].float().t(), rows, out=tile)
            torch.ops.fastlora.add_norms_.default(sums[i], tile)
    if not absolute:
        sums[:, 1] = 0.0
    return sums.float()


def _gram_norm(x: Tensor, dy: Tensor) -> Tensor:
    """``<x x^T, dy dy^T>``, the squared norm of ``dy^T x``."""
    return torch.dot((x @ x.t()).view(-1), (dy @ dy.t()).view(-1)).clamp_(min=0)
