"""Factors that start from the frozen weight, and what starts beside them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..config import power_iterations, takes_weight
from ..ops.reference import accumulate_dtype
from ..ops.row_norms import RowLengths
from .adapter import AdapterSpec, Factors, Slices


@torch.no_grad()
def start_from_weight(W: Tensor, slices: Slices, spec: AdapterSpec, A: Factors, B: Factors) -> None:
    r"""Give A and B the leading part of W [N, K] by slice, which :func:`take_out` takes out of W.

    ``"pissa"``: :math:`B A = U_r S_r V_r^\top / s`, its root on either side, ``"pissa_niter_n"`` an estimate of it;
    ``"olora"``: :math:`Q_r R_r`, of W = Q R.
    """
    niter = power_iterations(spec.init)
    for name, right in A.tensors().items():
        if right is None:
            continue
        w = W[slices.rows(name)].to(accumulate_dtype(W.dtype))
        b, a = _olora(w, len(right)) if spec.init == "olora" else _pissa(w, len(right), spec.scale[name], niter)
        for factors, value in ((A, a), (B, b)):
            if niter is None:
                getattr(factors, name).copy_(value)
            else:
                factors.start(name, value.to(spec.dtype).contiguous())


@torch.no_grad()
def take_out(W: Tensor, slices: Slices, spec: AdapterSpec, A: Factors, B: Factors) -> None:
    """``W <- W - s B A`` in place."""
    acc = accumulate_dtype(W.dtype)
    for name, a in A.tensors().items():
        if a is not None:
            rows, b = slices.rows(name), B.tensors()[name]
            W[rows] = torch.addmm(W[rows].to(acc), b.to(acc), a.to(acc), alpha=-spec.scale[name]).to(W.dtype)


def _pissa(w: Tensor, rank: int, s: float, niter: int | None) -> tuple[Tensor, Tensor]:
    if niter is None:
        U, S, V = torch.linalg.svd(w, full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(w, rank, niter=niter)
        V = V.t()
    root = (S[:rank] / s).sqrt()
    return U[:, :rank] * root, root[:, None] * V[:rank]


def _olora(w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    Q, R = torch.linalg.qr(w)
    return Q[:, :rank], R[:rank]


def new_bias(out_features: int, spec: AdapterSpec, A: Factors, device: torch.device) -> Tensor:
    """The bias beside B [N]: zero, or as that of an ``nn.Linear`` of r inputs with ``init=False``."""
    bias = torch.zeros(out_features, device=device, dtype=spec.dtype)
    if spec.init is False:
        bound = 1 / math.sqrt(max((len(a) for a in A.tensors().values() if a is not None), default=1))
        bias.uniform_(-bound, bound)
    return bias


@torch.no_grad()
def new_magnitude(W: Tensor, slices: Slices, spec: AdapterSpec, A: Factors, B: Factors) -> Tensor:
    """``‖W + s B A‖`` of each row [N]; ‖W‖ where B A is to be taken out of W."""
    factors, parts = (A.tensors(), B.tensors()), []
    for name, rows in slices.items():
        a, b = (side[name] for side in factors)
        if a is None:
            a, b = W.new_empty(0, W.shape[1]), W.new_empty(rows, 0)
        parts.append((slices.runs(name), a, b, 0.0 if takes_weight(spec.init) else spec.scale[name]))
    return RowLengths(W, parts, None, None).norms().to(spec.dtype)
