"""The compiled library: loads it or says why not; shapes of its operators for tracing."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

from .._utils.installed import DISTRIBUTION
from .._utils.torch_compat import kernels_of

logger = logging.getLogger(__name__)

# Another build of the library, such as an instrumented one, is loaded by naming it.
LIBRARY = Path(os.environ.get("FASTLORA_LIBRARY") or Path(__file__).parent.with_name("_C.so"))


def _load() -> str | None:
    """Loads the library once; returns why it could not be."""
    if not LIBRARY.is_file():
        why = (
            f"the native library was not built: no {LIBRARY.name}; reinstall with a C++ compiler and torch in place by "
            f"FASTLORA_BUILD=1 pip install --no-build-isolation --force-reinstall --no-deps {DISTRIBUTION}"
        )
        logger.warning("slow: CPU layers run in plain torch, because %s", why)
        return why
    try:
        torch.ops.load_library(str(LIBRARY))
    except (OSError, RuntimeError) as error:
        logger.warning("the native library failed to load: %s", error)
        return f"the native library failed to load: {error}"
    return None


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


def _lora_forward(y, x, A, P, B, outputs, columns, scales, moments, *drop):
    rank = sum(b.shape[1] for b in B) + (0 if P is None else P.shape[0] if P.is_floating_point() else P.numel())
    sums = [x.new_empty((2, target.shape[1]), dtype=torch.float64) for target in y] if moments else []
    return x.new_empty((x.shape[0], rank)), sums


def _lora_backward(dx, dy, x, h, A, B, outputs, columns, scales, probes, need_dA, need_dB, *drop):
    dA = [torch.empty_like(a, memory_format=torch.contiguous_format) for a in A] if need_dA else []
    dB = [torch.empty_like(b, memory_format=torch.contiguous_format) for b in B] if need_dB else []
    Q = [x.new_empty((b.shape[0], probes), dtype=torch.float32) for b in B] if probes else []
    return dA, dB, Q


def _linear_lora_forward(x, W, bias, A, P, B, outputs, columns, scales, moments, *drop):
    y = [x.new_empty((*x.shape[:-1], w.shape[0])) for w in W]
    rows = [t.view(-1, t.shape[-1]) for t in (x, *y)]
    h, sums = _lora_forward(rows[1:], rows[0], A, P, B, outputs, columns, scales, moments)
    return [*y, h, *[s.new_empty((2, s.shape[1] + 1)) for s in sums]]


def _linear_lora_backward(dy, x, h, W, A, B, outputs, columns, scales, probes, need_dx, need_dA, need_dB, *drop):
    found = _lora_backward(None, dy, x, h, A, B, outputs, columns, scales, probes, need_dA, need_dB)
    return [*([x.new_empty(x.shape)] if need_dx else []), *[g for part in found for g in part]]


def _lora_grouped_forward(y, x, A, P, B, order, ranges, outputs, columns, scales, starts, moments):
    adapters = ranges.shape[0] if moments else 0
    projections = len(outputs)
    totals = [starts[g * (projections + 1) + projections] for g in range(ranges.shape[0])]
    width = max((rank + (P[g].shape[0] if P else 0) for g, rank in enumerate(totals)), default=0)
    sums = [x.new_empty((2, target.shape[1]), dtype=torch.float64) for _ in range(adapters) for target in y]
    return x.new_empty((x.shape[0], width)), sums


def _lora_grouped_backward(
    dx, dy, x, h, A, B, order, ranges, outputs, columns, scales, starts, probes, need_dA, need_dB
):
    dA = [torch.empty_like(a, memory_format=torch.contiguous_format) for a in A] if need_dA else []
    dB = [torch.empty_like(b, memory_format=torch.contiguous_format) for b in B] if need_dB else []
    widths = [probes[i // len(outputs)] for i in range(len(B))] if any(probes) else []
    Q = [x.new_empty((b.shape[0], k), dtype=torch.float32) for b, k in zip(B, widths, strict=False)]
    return dA, dB, Q


def _shrink(x, A):
    return x.new_empty((x.shape[0], A.shape[0]))


def _expand(y, h, factors, offsets, columns, scales, moments):
    return y.new_empty((2, y.shape[1]) if moments else (0,), dtype=torch.float64)


def _wgrad(x, dy, h, B, offsets, scales, rank, probes, need_dA):
    def single(*shape):
        return x.new_empty(shape, dtype=torch.float32)

    dB = [single(factor.shape[0], factor.shape[1]) for factor in B]
    Q = [single(factor.shape[0], probes) for factor in B]
    return single(x.shape[0], rank), single(rank if need_dA else 0, x.shape[1]), dB, Q


def _outer(d, x):
    return x.new_empty((d.shape[1], x.shape[1]), dtype=torch.float32)


def _build_segments(ids, adapters):
    # On the CPU an order that is the rows' own is left out, which depends on the ids.
    rows = torch.library.get_ctx().new_dynamic_size(min=0) if ids.device.type == "cpu" else ids.shape[0]
    return ids.new_empty((rows,)), ids.new_empty((adapters, 2))


def _segment_tiles(ranges, rows, block):
    return ranges.new_empty(((rows + block - 1) // block + ranges.shape[0], 2))


def _penalty(A, B, scales, weights):
    return weights.new_empty((), dtype=torch.float32)


def _squared_norms(tensors):
    device = tensors[0].device if tensors else None
    return torch.empty(len(tensors), dtype=torch.float64, device=device)


def _row_norms(W, A, B, scale):
    return W.new_empty(W.shape[0], dtype=torch.float32)


def _output_variances(moments, runs, sizes):
    device = moments[0].device if moments else None
    return torch.empty(len(sizes), dtype=torch.float64, device=device)


def _dropout(x, keys, projection, p):
    return x.new_empty(x.shape)


def _nothing(*operands):
    """Of an operator that writes into its operands alone."""


SHAPES = {
    "lora_forward_": _lora_forward,
    "lora_backward_": _lora_backward,
    "linear_lora_forward": _linear_lora_forward,
    "linear_lora_backward": _linear_lora_backward,
    "lora_grouped_forward_": _lora_grouped_forward,
    "lora_grouped_backward_": _lora_grouped_backward,
    "shrink": _shrink,
    "expand_": _expand,
    "wgrad": _wgrad,
    "outer": _outer,
    "philox_signs_": _nothing,
    "add_norms_": _nothing,
    "build_segments": _build_segments,
    "segment_tiles": _segment_tiles,
    "penalty": _penalty,
    "penalty_grad_": _nothing,
    "squared_norms": _squared_norms,
    "row_norms": _row_norms,
    "output_variances": _output_variances,
    "resize_ranks_": _nothing,
    "dropout": _dropout,
    "dropout_rows": _dropout,
}


def register() -> None:
    """Give every operator its shapes, once the library is loaded."""
    for name, shapes in SHAPES.items():
        torch.library.register_fake(f"fastlora::{name}", shapes)


_REASON = _load()
if _REASON is None:
    register()
# Looked up once: torch.compile cannot trace the dispatcher's tables.
_KERNELS = frozenset(
    (name, device)
    for device in ("cpu", "cuda")
    for name in kernels_of("fastlora", device, SHAPES if _REASON is None else ())
)
