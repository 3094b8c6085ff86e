"""The operator ``fastlora::lora_linear`` and its backward: one adapter, one or several projections of one input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from ._operator import DA, DB, DBIAS, DW, DX, DZ, LIBRARY, Operator
from .backends import NativeBackend, choose
from .verbs import as_rows, group_layout, picks_columns

LIBRARY.define(
    "lora_linear(Tensor x, Tensor[] W, Tensor?[] bias, Tensor[] A, Tensor[] B, Tensor[] Z, Tensor[] V, Tensor? P, "
    "Tensor? sign, Tensor? seed, float[] scale, float p, str backend, str engine) -> Tensor[]"
)
LIBRARY.define(
    "lora_linear_backward(Tensor?[] dy, Tensor x, Tensor h, Tensor[] W, Tensor[] A, Tensor[] B, Tensor? seed, "
    "float[] scale, float p, int probes, bool[] need, str backend, str engine) -> Tensor[]"
)


def _forward_kernel(x, W, bias, A, B, Z, V, P, sign, seed, scale, p, backend, engine):
    chosen, _ = choose(backend, x.device, x.dtype)
    layout = group_layout(W, B)
    if p == 0.0 and isinstance(chosen, NativeBackend):
        outputs, h, moments = chosen.forward(x, W, bias, A, P, B, layout, scale, bool(V), engine)
    else:
        h = chosen.shrink(as_rows(x), A, P, seed, p)
        outputs, moments = chosen.linear(x, W, bias, h, B, layout, scale, bool(V), engine)
    if sign is not None:
        # The probe columns of h take no part in y.
        probe = h.view(sign.shape[0], -1, h.shape[1]).narrow(2, layout.rank, h.shape[1] - layout.rank)
        probe.mul_(sign.to(h.dtype).repeat(1, probe.shape[2] // sign.shape[1]).unsqueeze(1))
    return [*outputs, h, *moments]


def _forward_fake(x, W, bias, A, B, Z, V, P, sign, seed, scale, p, backend, engine):
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    rank = sum(a.shape[0] for a in A) + (0 if P is None else P.numel() if picks_columns(P) else P.shape[0])
    outputs = [x.new_empty((*x.shape[:-1], w.shape[0])) for w in W]
    moments = [x.new_empty((2, w.shape[0]), dtype=torch.float64) for w in W] if V else []
    return [*outputs, x.new_empty((rows, rank)), *moments]


def _probes(P: Tensor | None) -> int:
    """Columns of Q: rows of P, or columns of x for each projection."""
    return 0 if P is None else P.shape[1] if picks_columns(P) else P.shape[0]


def _backward_kernel(dy, x, h, W, A, B, seed, scale, p, probes, need, backend, engine):
    chosen, _ = choose(backend, x.device, x.dtype)
    layout = group_layout(W, B)
    rows = as_rows(x)
    grads = [None if g is None else as_rows(g if g.dtype == x.dtype else g.to(x.dtype)) for g in dy]
    probes = probes if need[DZ] else 0
    out: list[Tensor] = []
    if p == 0.0 and isinstance(chosen, NativeBackend):
        dx, dA, dB, Q = chosen.backward(
            grads, rows, h, W, A, B, layout, scale, probes, need[DX], need[DA], need[DB], engine
        )
        out += [*([dx.view(x.shape)] if need[DX] else []), *dA, *dB]
        if need[DZ]:
            out += Q if probes else [rows.new_zeros((b.shape[0], 0), dtype=torch.float32) for b in B]
    else:
        out += _composed_backward(chosen, grads, rows, h, W, A, B, layout, seed, scale, p, probes, need, engine)
        if need[DX]:
            out[0] = out[0].view(x.shape)
    if need[DW]:
        out += [torch.zeros_like(w) if g is None else torch.mm(g.t(), rows) for g, w in zip(grads, W, strict=True)]
    if need[DBIAS]:
        out += [x.new_zeros(w.shape[0]) if g is None else g.sum(0) for g, w in zip(grads, W, strict=True)]
    return out


def _composed_backward(chosen, grads, rows, h, W, A, B, layout, seed, scale, p, probes, need, engine):
    """dx, then the gradients of A, B and Z that are needed, from one verb after the other."""
    if not need[DZ]:
        h = h.narrow(1, 0, layout.rank)
    dh, dA, dB, Q = chosen.wgrad(rows, grads, h, B, layout, scale, probes, need[DA], seed, p)
    out = [chosen.linear_backward(grads, W, dh, A, layout, seed, p, engine)] if need[DX] else []
    if need[DA]:
        out += map(like, dA, A)
    if need[DB]:
        out += map(like, dB, B)
    if need[DZ]:
        acc = reference.accumulate_dtype(rows.dtype)
        empty = [b.new_empty((b.shape[0], probes), dtype=acc) for b in B]
        out += map(like, Q, empty)
    return out


def like(grad: Tensor | None, target: Tensor) -> Tensor:
    """The gradient in the target's dtype, zeros where none flowed."""
    if grad is None:
        return torch.zeros_like(target, memory_format=torch.contiguous_format)
    return grad if grad.dtype == target.dtype else grad.to(target.dtype)


def _backward_fake(dy, x, h, W, A, B, seed, scale, p, probes, need, backend, engine):
    acc = reference.accumulate_dtype(x.dtype)
    out = [x.new_empty(x.shape)] if need[DX] else []
    if need[DA]:
        out += [torch.empty_like(a, memory_format=torch.contiguous_format) for a in A]
    if need[DB]:
        out += [torch.empty_like(b, memory_format=torch.contiguous_format) for b in B]
    if need[DZ]:
        out += [x.new_empty((b.shape[0], probes), dtype=acc) for b in B]
    if need[DW]:
        out += [x.new_empty(w.shape) for w in W]
    if need[DBIAS]:
        out += [x.new_empty((w.shape[0],)) for w in W]
    return out


def _counts(x: Tensor, rest: tuple, moments: int) -> list[int]:
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    return [rows] * moments


def _backward_rest(rest: tuple) -> tuple:
    P, sign, seed, scale, p, _, _ = rest
    return seed, scale, p, _probes(P)


def _formula(x, W, bias, A, B, Z, rest):
    P, sign, seed, scale, p, _, _ = rest
    return reference.lora_linear(x, W, bias, A, B, scale, Z, P, sign, seed, p)


def _probe_leaves(B: Sequence[Tensor], rest: tuple) -> list[Tensor]:
    return [b.new_zeros((b.shape[0], _probes(rest[0]))).requires_grad_() for b in B]


LORA_LINEAR = Operator(
    "lora_linear", _forward_kernel, _backward_kernel, _backward_rest, _formula, _probe_leaves, _counts
)
LORA_LINEAR.register(_forward_fake, _backward_fake)
