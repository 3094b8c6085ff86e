"""Factors that start from the frozen weight, and what starts beside them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .adapter import AdapterSpec
from .linear import Adapted


@torch.no_grad()
def start_from_weight(layer: Adapted, adapter: str) -> None:
    r"""Give A and B the leading part of W by slice, and take it out of W: :math:`W \leftarrow W - s B A`.

    ``"pissa"``: :math:`B A = U_r S_r V_r^\top / s`, its root on either side; ``"olora"``: :math:`Q_r R_r`, of W = Q R.
    """
    weight, spec = layer.weight.detach().clone(), layer.adapter_specs[adapter]
    acc = torch.promote_types(weight.dtype, torch.float32)
    W, A, B = layer.as_matrix(weight), layer.lora_A[adapter].tensors(), layer.lora_B[adapter].tensors()
    for name, rank in layer.ranks(adapter).items():
        if rank == 0:
            continue
        rows, s = layer.slices.rows(name), spec.scale[name]
        w = W[rows].to(acc)
        left, right = _pissa(w, rank, s) if spec.init == "pissa" else _olora(w, rank)
        A[name].copy_(right)
        B[name].copy_(left)
        W[rows] = (w - s * (left @ right)).to(W.dtype)
    layer.weight.copy_(weight)


def _pissa(w: Tensor, rank: int, s: float) -> tuple[Tensor, Tensor]:
    U, S, V = torch.linalg.svd(w, full_matrices=False)
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
