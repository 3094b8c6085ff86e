"""Factors that start from the frozen weight, and what starts beside them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..config import power_iterations
from .adapter import AdapterSpec
from .linear import Adapted


@torch.no_grad()
def start_from_weight(layer: Adapted, adapter: str) -> None:
    r"""Give A and B the leading part of W by slice, and take it out of W: :math:`W \leftarrow W - s B A`.

    ``"pissa"``: :math:`B A = U_r S_r V_r^\top / s`, its root on either side, ``"pissa_niter_n"`` an estimate of it;
    ``"olora"``: :math:`Q_r R_r`, of W = Q R.
    """
    weight, spec = layer.weight.detach().clone(), layer.adapter_specs[adapter]
    acc = torch.promote_types(weight.dtype, torch.float32)
    W, A, B = layer.as_matrix(weight), layer.lora_A[adapter].tensors(), layer.lora_B[adapter].tensors()
    for name, rank in layer.ranks(adapter).items():
        if rank == 0:
            continue
        rows, s = layer.slices.rows(name), spec.scale[name]
        w = W[rows].to(acc)
        niter = power_iterations(spec.init)
        left, right = _olora(w, rank) if spec.init == "olora" else _pissa(w, rank, s, niter)
        A[name].copy_(right)
        B[name].copy_(left)
        if niter is not None:
            layer.lora_A[adapter].keep_start(name)
            layer.lora_B[adapter].keep_start(name)
        W[rows] = (w - s * (left @ right)).to(W.dtype)
    layer.weight.copy_(weight)


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


def new_bias(spec: AdapterSpec, layer: Adapted) -> Tensor:
    """The bias beside B [N]: zero, or as that of an ``nn.Linear`` of r inputs with ``init=False``."""
    bias = torch.zeros(layer.out_features, device=layer.weight.device, dtype=spec.dtype)
    if spec.init is False:
        rank = max(layer.ranks(next(reversed(layer.adapter_specs))).values())
        bias.uniform_(-1 / math.sqrt(max(rank, 1)), 1 / math.sqrt(max(rank, 1)))
    return bias
