"""Shapes and dtypes of what the native operators return, so that torch.compile and export can trace them."""

from __future__ import annotations

import torch


def _lora_forward(y, x, A, P, B, outputs, columns, scales, moments):
    rank = sum(b.shape[1] for b in B) + (0 if P is None else P.shape[0] if P.is_floating_point() else P.numel())
    sums = [x.new_empty((2, target.shape[1]), dtype=torch.float64) for target in y] if moments else []
    return x.new_empty((x.shape[0], rank)), sums


def _lora_backward(dx, dy, x, h, A, B, outputs, columns, scales, probes, need_dA, need_dB):
    dA = [torch.empty_like(a, memory_format=torch.contiguous_format) for a in A] if need_dA else []
    dB = [torch.empty_like(b, memory_format=torch.contiguous_format) for b in B] if need_dB else []
    Q = [x.new_empty((b.shape[0], probes), dtype=torch.float32) for b in B] if probes else []
    return dA, dB, Q


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


def _philox_signs(out, seed, step, first, tag, counts):
    return None


def _add_norms(sums, tile):
    return None


def _build_segments(ids, adapters):
    # On the CPU an order that is the rows' own is left out, which depends on the ids.
    rows = torch.library.get_ctx().new_dynamic_size(min=0) if ids.device.type == "cpu" else ids.shape[0]
    return ids.new_empty((rows,)), ids.new_empty((adapters, 2))


def _segment_tiles(ranges, rows, block):
    return ranges.new_empty(((rows + block - 1) // block + ranges.shape[0], 2))


def _penalty(A, B, scales, weights):
    return weights.new_empty((), dtype=torch.float32)


def _penalty_grad(dA, dB, A, B, scales, weights, weight):
    return None


def _squared_norms(tensors):
    device = tensors[0].device if tensors else None
    return torch.empty(len(tensors), dtype=torch.float64, device=device)


def _output_variances(moments, runs, sizes):
    device = moments[0].device if moments else None
    return torch.empty(len(sizes), dtype=torch.float64, device=device)


def _resize_ranks(to, source):
    return None


def _dropout(x, seed, projection, p):
    return x.new_empty(x.shape)


def _dropout_rows(x, keys, projection, p):
    return x.new_empty(x.shape)


SHAPES = {
    "lora_forward_": _lora_forward,
    "lora_backward_": _lora_backward,
    "lora_grouped_forward_": _lora_grouped_forward,
    "lora_grouped_backward_": _lora_grouped_backward,
    "shrink": _shrink,
    "expand_": _expand,
    "wgrad": _wgrad,
    "outer": _outer,
    "philox_signs_": _philox_signs,
    "add_norms_": _add_norms,
    "build_segments": _build_segments,
    "segment_tiles": _segment_tiles,
    "penalty": _penalty,
    "penalty_grad_": _penalty_grad,
    "squared_norms": _squared_norms,
    "output_variances": _output_variances,
    "resize_ranks_": _resize_ranks,
    "dropout": _dropout,
    "dropout_rows": _dropout_rows,
}


def register() -> None:
    """Give every operator its shapes, once the library is loaded."""
    for name, shapes in SHAPES.items():
        torch.library.register_fake(f"fastlora::{name}", shapes)
