"""lora_linear and lora_grouped: the functions, their schemas, kernels, shapes and differentiable formula."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._utils.torch_compat import autocasting
from . import reference
from .autograd import DA, DB, DBIAS, DW, DX, DZ, LIBRARY, Operator, like
from .backends import choose
from .backends.native import NativeBackend
from .layout import AdapterBatch, as_rows, column_starts, group_layout, picks_columns
from .lora_grouped import LORA_GROUPED
from .reference import projections_of

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


def lora_linear(
    x: Tensor,
    W: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scale: Sequence[float],
    *,
    p: float = 0.0,
    Z: Sequence[Tensor] = (),
    V: Sequence[Tensor] = (),
    P: Tensor | None = None,
    sign: Tensor | None = None,
    backend: str = "auto",
    engine: str = "auto",
) -> list[Tensor]:
    r"""Linears that share ``x``, each with its low-rank update, in one call.

    .. math:: y_i = x W_i^\top + b_i + s_i\, \mathrm{dropout}(x)\, A_i^\top B_i^\top

    =========  ==============  ==========================================================
    x          [*, K]          one floating dtype with W and bias
    W, bias    [N_j, K] [N_j]  one entry a weight; bias entries may be None
    A, B       [r_i,K] [N_i,r] one entry a projection; projections tile the weights' rows
    scale                      one float a projection
    Z          [N_i, k]        zero leaves; their gradient is ``Q_i = G_{W_i} P^T``
    V          [2, N_j + 1]    zero float64 leaves; their gradient is the column sums of y
                               and y^2, with the number of rows in the last column
    P          [k, K]          probe rows (needed with Z); or int64 [projections, k], columns of
                               x instead of ``x P^T``, each projection's own
    sign       [S, k]          one sign per (sample of dimension 0, probe)
    =========  ==============  ==========================================================

    ``backend`` is one of ``fastlora.backends.BACKENDS``; ``engine`` names who multiplies by W on a CPU
    (``fastlora.engines``). Returns one output [*, N_j] a weight. Dropout masks depend on a seed drawn from torch's
    generator, the projection, the row and the column. Raises ``ValueError`` naming the argument, ``RuntimeError`` for a
    backend that cannot run.
    """
    check_input(x, W[0])
    scale = [float(s) for s in scale]
    return checked_linear(x, W, bias, A, B, scale, float(p), Z, V, P, sign, backend, engine)


def checked_linear(
    x, W, bias, A, B, scale, p, Z=(), V=(), P=None, sign=None, backend="auto", engine="auto"
) -> list[Tensor]:
    """``lora_linear`` of an input that was checked; scales and p are floats."""
    seed = None
    if p > 0.0:
        seed = torch.randint(2**62, (), dtype=torch.int64, device=x.device)
    out = LORA_LINEAR.apply(x, W, bias, A, B, Z, V, P, sign, seed, scale, p, backend, engine)
    return out[: len(W)]


def lora_grouped(
    x: Tensor,
    W: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scale: Sequence[float],
    batch: AdapterBatch,
    *,
    p: Sequence[float] = (),
    dropout_salt: int = 0,
    starts: Sequence[int] | None = None,
    Z: Sequence[Tensor] = (),
    V: Sequence[Tensor] = (),
    P: Sequence[Tensor] = (),
    sign: Sequence[Tensor] = (),
    backend: str = "auto",
    engine: str = "auto",
) -> list[Tensor]:
    r"""``lora_linear`` with an adapter for each row, ``batch`` saying which.

    .. math:: y_{im} = x_m W_i^\top + b_i + s_{gi}\, \mathrm{dropout}_g(x_m)\, A_{gi}^\top B_{gi}^\top,\qquad g = g(m)

    A, B, scale and Z run over the batch's adapters, then projections, V over adapters, then weights; P, sign and p
    over adapters, with [0, K] and [0, 0] where an adapter is not measured. ``dropout_salt`` tells the layers of one
    ``row_seeds`` apart; ``starts`` are ``RankLayout.column_starts`` of the batch's adapters, worked out here without.
    Gradients of an adapter come from its own rows. Raises as ``lora_linear`` does, and for ids
    that do not fit x.
    """
    check_input(x, W[0])
    rows, keys = batch.rows(x), None
    if starts is None:
        starts = column_starts([b.shape[1] for b in B], projections_of(W, B))
    if any(p):
        seed = torch.randint(2**62, (), dtype=torch.int64, device=x.device)
        keys = batch.keys(x, seed, dropout_salt)
    out = LORA_GROUPED.apply(
        x, W, bias, A, B, Z, V, P, sign, keys, rows.ids, rows.order, rows.ranges, starts, [float(s) for s in scale],
        [float(q) for q in p] or [0.0] * len(batch.names), backend, engine,
    )  # fmt: skip
    return out[: len(W)]


def check_input(x: Tensor, W: Tensor) -> None:
    """Refuse an input that the frozen weight cannot take, by name."""
    if x.dim() == 0 or x.shape[-1] != W.shape[1]:
        raise ValueError(f"x: expected last dimension {W.shape[1]} (in_features), got shape {tuple(x.shape)}")
    if x.device != W.device:
        raise ValueError(f"x: is on {x.device}, the weight on {W.device}; move one of them")
    if x.dtype != W.dtype and not autocasting(x):
        raise ValueError(f"x: has dtype {x.dtype}, the weight {W.dtype}; cast one of them or use torch.autocast")
