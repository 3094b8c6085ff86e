"""The adapted linear as a function: one weight, or the q/k/v group that shares an input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._grouped_ops import LORA_GROUPED
from ._operator import autocasting
from ._ops import LORA_LINEAR
from .grouped import column_starts
from .reference import projections_of
from .segments import Batch


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
    batch: Batch,
    *,
    p: Sequence[float] = (),
    stream: int = 0,
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
    over adapters, with [0, K] and [0, 0] where an adapter is not measured. ``stream`` tells the layers of one
    ``row_seeds`` apart; ``starts`` are the ``column_starts`` of the batch's adapters, worked out here without.
    Gradients of an adapter come from its own rows. Raises as ``lora_linear`` does, and for ids
    that do not fit x.
    """
    check_input(x, W[0])
    rows, keys = batch.rows(x), None
    if starts is None:
        starts = column_starts([b.shape[1] for b in B], projections_of(W, B))
    if any(p):
        seed = torch.randint(2**62, (), dtype=torch.int64, device=x.device)
        keys = batch.keys(x, seed, stream)
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
