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

__all__ = ["LIBRARY", "RankLayout", "available", "gradstat", "has_kernel", "isa", "reason"]

logger = logging.getLogger(__name__)

# Another build of the library, such as an instrumented one, is loaded by naming it.
LIBRARY = Path(os.environ.get("FASTLORA_LIBRARY") or Path(__file__).with_name("_C.so"))

try:
    from ._layout import RankLayout
except ImportError:
    RankLayout = None


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


def _register_fakes() -> None:
    """Shapes and dtypes of the results, so that torch.compile and export can trace the operators."""

    @torch.library.register_fake("fastlora::lora_forward_")
    def _(y, x, A, P, B, outputs, columns, scales, moments):
        rank = sum(b.shape[1] for b in B) + (0 if P is None else P.shape[0])
        sums = [x.new_empty((2, target.shape[1]), dtype=torch.float64) for target in y] if moments else []
        return x.new_empty((x.shape[0], rank)), sums

    @torch.library.register_fake("fastlora::lora_backward_")
    def _(dx, dy, x, h, A, B, outputs, columns, scales, probes, need_dA, need_dB):
        dA = [torch.empty_like(a, memory_format=torch.contiguous_format) for a in A] if need_dA else []
        dB = [torch.empty_like(b, memory_format=torch.contiguous_format) for b in B] if need_dB else []
        Q = [x.new_empty((b.shape[0], probes), dtype=torch.float32) for b in B] if probes else []
        return dA, dB, Q

    @torch.library.register_fake("fastlora::lora_grouped_forward_")
    def _(y, x, A, P, B, order, ranges, outputs, columns, scales, starts, moments):
        adapters = ranges.shape[0] if moments else 0
        projections = len(outputs)
        totals = [starts[g * (projections + 1) + projections] for g in range(ranges.shape[0])]
        width = max((rank + (P[g].shape[0] if P else 0) for g, rank in enumerate(totals)), default=0)
        sums = [x.new_empty((2, target.shape[1]), dtype=torch.float64) for _ in range(adapters) for target in y]
        return x.new_empty((x.shape[0], width)), sums

    @torch.library.register_fake("fastlora::lora_grouped_backward_")
    def _(dx, dy, x, h, A, B, order, ranges, outputs, columns, scales, starts, probes, need_dA, need_dB):
        dA = [torch.empty_like(a, memory_format=torch.contiguous_format) for a in A] if need_dA else []
        dB = [torch.empty_like(b, memory_format=torch.contiguous_format) for b in B] if need_dB else []
        widths = [probes[i // len(outputs)] for i in range(len(B))] if any(probes) else []
        Q = [x.new_empty((b.shape[0], k), dtype=torch.float32) for b, k in zip(B, widths, strict=False)]
        return dA, dB, Q

    @torch.library.register_fake("fastlora::shrink")
    def _(x, A):
        return x.new_empty((x.shape[0], A.shape[0]))

    @torch.library.register_fake("fastlora::expand_")
    def _(y, h, factors, offsets, columns, scales, moments):
        return y.new_empty((2, y.shape[1]) if moments else (0,), dtype=torch.float64)

    @torch.library.register_fake("fastlora::wgrad")
    def _(x, dy, h, B, offsets, scales, rank, probes, need_dA):
        def single(*shape):
            return x.new_empty(shape, dtype=torch.float32)

        dB = [single(factor.shape[0], factor.shape[1]) for factor in B]
        Q = [single(factor.shape[0], probes) for factor in B]
        return single(x.shape[0], rank), single(rank if need_dA else 0, x.shape[1]), dB, Q

    @torch.library.register_fake("fastlora::outer")
    def _(d, x):
        return x.new_empty((d.shape[1], x.shape[1]), dtype=torch.float32)

    @torch.library.register_fake("fastlora::philox_signs_")
    def _(out, seed, step, first, tag, counts):
        return None

    @torch.library.register_fake("fastlora::add_norms_")
    def _(sums, tile):
        return None

    @torch.library.register_fake("fastlora::build_segments")
    def _(ids, adapters):
        # On the CPU an order that is the rows' own is left out, which depends on the ids.
        rows = torch.library.get_ctx().new_dynamic_size(min=0) if ids.device.type == "cpu" else ids.shape[0]
        return ids.new_empty((rows,)), ids.new_empty((adapters, 2))

    @torch.library.register_fake("fastlora::segment_tiles")
    def _(ranges, rows, block):
        return ranges.new_empty(((rows + block - 1) // block + ranges.shape[0], 2))

    @torch.library.register_fake("fastlora::penalty")
    def _(A, B, scales, weights):
        return weights.new_empty((), dtype=torch.float32)

    @torch.library.register_fake("fastlora::penalty_grad_")
    def _(dA, dB, A, B, scales, weights, lmbda):
        return None

    @torch.library.register_fake("fastlora::squared_norms")
    def _(tensors):
        device = tensors[0].device if tensors else None
        return torch.empty(len(tensors), dtype=torch.float64, device=device)

    @torch.library.register_fake("fastlora::resize_ranks_")
    def _(to, source):
        return None

    @torch.library.register_fake("fastlora::dropout")
    def _(x, seed, projection, p):
        return x.new_empty(x.shape)


_REASON = _load()
if _REASON is None:
    _register_fakes()
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
