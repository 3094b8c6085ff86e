"""The operator ``fastlora::lora_grouped`` and its backward: a row's adapter is the one that its id names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .autograd import DA, DB, DBIAS, DW, DX, DZ, LIBRARY, Operator, like
from .backends import choose
from .layout import Layouts, Rows, as_rows
from .reference import projections_of

LIBRARY.define(
    "lora_grouped(Tensor x, Tensor[] W, Tensor?[] bias, Tensor[] A, Tensor[] B, Tensor[] Z, Tensor[] V, Tensor[] P, "
    "Tensor[] sign, Tensor? keys, Tensor ids, Tensor order, Tensor ranges, int[] starts, float[] scale, float[] p, "
    "str backend, str engine) -> Tensor[]"
)
LIBRARY.define(
    "lora_grouped_backward(Tensor?[] dy, Tensor x, Tensor h, Tensor[] W, Tensor[] A, Tensor[] B, Tensor? keys, "
    "Tensor ids, Tensor order, Tensor ranges, int[] starts, float[] scale, float[] p, int[] probes, bool[] need, "
    "str backend, str engine) -> Tensor[]"
)


def _forward(x, W, bias, A, B, Z, V, P, sign, keys, ids, order, ranges, starts, scale, p, backend, engine):
    chosen, _ = choose(backend, x.device, x.dtype)
    layouts, rows = Layouts(W, B, starts), Rows(ids, order, ranges, keys, p)
    outputs, h, moments = chosen.grouped_forward(x, W, bias, A, P, B, rows, layouts, scale, bool(V), engine)
    for g, signs in enumerate(sign):
        if signs.numel():
            # The probe columns of h take no part in y.
            columns = h.narrow(1, layouts(g).rank, signs.shape[1])
            each = signs.to(h.dtype).repeat_interleave(h.shape[0] // signs.shape[0], 0)
            columns.mul_(torch.where((ids == g).unsqueeze(1), each, 1.0))
    return [*outputs, h, *moments]


def _forward_fake(x, W, bias, A, B, Z, V, P, sign, keys, ids, order, ranges, starts, scale, p, backend, engine):
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    projections = projections_of(W, B)
    outputs = [x.new_empty((*x.shape[:-1], w.shape[0])) for w in W]
    moments = [x.new_empty((2, w.shape[0]), dtype=torch.float64) for _ in range(len(A) // projections) for w in W]
    width = Layouts(W, B, starts).width([m.shape[0] for m in P])
    return [*outputs, x.new_empty((rows, width)), *(moments if V else [])]


def _backward(dy, x, h, W, A, B, keys, ids, order, ranges, starts, scale, p, probes, need, backend, engine):
    chosen, _ = choose(backend, x.device, x.dtype)
    seen = as_rows(x)
    grads = [None if g is None else as_rows(g if g.dtype == x.dtype else g.to(x.dtype)) for g in dy]
    rows, columns = Rows(ids, order, ranges, keys, p), _columns(probes, len(A))
    dx, dA, dB, Q = chosen.grouped_backward(
        grads, seen, h, W, A, B, rows, Layouts(W, B, starts), scale, probes, need[DX], need[DA], need[DB], engine
    )
    out = [dx.view(x.shape)] if need[DX] else []
    out += map(like, dA, A) if need[DA] else []
    out += map(like, dB, B) if need[DB] else []
    if need[DZ]:
        acc = reference.accumulate_dtype(x.dtype)
        found = Q or [None] * len(B)
        out += [
            seen.new_zeros((b.shape[0], k), dtype=acc) if q is None else q
            for q, b, k in zip(found, B, columns, strict=True)
        ]
    if need[DW]:
        out += [torch.zeros_like(w) if g is None else torch.mm(g.t(), seen) for g, w in zip(grads, W, strict=True)]
    if need[DBIAS]:
        out += [x.new_zeros(w.shape[0]) if g is None else g.sum(0) for g, w in zip(grads, W, strict=True)]
    return out


def _columns(probes: Sequence[int], factors: int) -> list[int]:
    """Probe columns of every factor, from those of every adapter."""
    each = factors // len(probes) if probes else 0
    return [k for k in probes for _ in range(each)]


def _backward_fake(dy, x, h, W, A, B, keys, ids, order, ranges, starts, scale, p, probes, need, backend, engine):
    acc = reference.accumulate_dtype(x.dtype)
    out = [x.new_empty(x.shape)] if need[DX] else []
    if need[DA]:
        out += [torch.empty_like(a, memory_format=torch.contiguous_format) for a in A]
    if need[DB]:
        out += [torch.empty_like(b, memory_format=torch.contiguous_format) for b in B]
    if need[DZ]:
        out += [x.new_empty((b.shape[0], k), dtype=acc) for b, k in zip(B, _columns(probes, len(B)), strict=True)]
    if need[DW]:
        out += [x.new_empty(w.shape) for w in W]
    if need[DBIAS]:
        out += [x.new_empty((w.shape[0],)) for w in W]
    return out


def _backward_rest(rest: tuple) -> tuple:
    P, _, keys, ids, order, ranges, starts, scale, p, _, _ = rest
    return keys, ids, order, ranges, starts, scale, p, [m.shape[0] for m in P] if P else [0] * ranges.shape[0]


def _formula(x, W, bias, A, B, Z, rest):
    P, sign, keys, ids, _, _, _, scale, p, _, _ = rest
    return reference.lora_grouped(x, W, bias, A, B, scale, ids, Z, P, sign, keys, p)


def _probe_leaves(B: Sequence[Tensor], rest: tuple) -> list[Tensor]:
    widths = _columns([m.shape[0] for m in rest[0]], len(B))
    return [b.new_zeros((b.shape[0], k)).requires_grad_() for b, k in zip(B, widths, strict=True)]


def _counts(x: Tensor, rest: tuple, moments: int) -> list[Tensor]:
    ranges = rest[5]
    each = moments // max(ranges.shape[0], 1)
    return [count for count in (ranges[:, 1] - ranges[:, 0]).unbind() for _ in range(each)]


LORA_GROUPED = Operator("lora_grouped", _forward, _backward, _backward_rest, _formula, _probe_leaves, _counts)
LORA_GROUPED.register(_forward_fake, _backward_fake)
