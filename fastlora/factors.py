"""The low-rank factors of one adapter on one layer: parameters by slice, their initialisation and resizing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

WHOLE = "weight"  # name of the one slice of a matrix that is not split


class Factors(nn.Module):
    """A or B of one adapter: one parameter a slice, ``None`` where the rank is 0."""

    def __init__(self, tensors: Mapping[str, Tensor | None]):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor))

    def extra_repr(self) -> str:
        return ", ".join(f"{n}: {'rank 0' if p is None else tuple(p.shape)}" for n, p in self._parameters.items())


@dataclass(frozen=True)
class AdapterSpec:
    """What a layer knows of an adapter besides its tensors: scaling by slice, dropout, initialisation."""

    scale: Mapping[str, float]
    dropout: float
    init: bool | str
    dtype: torch.dtype

    def with_scale(self, scale: Mapping[str, float]) -> AdapterSpec:
        return replace(self, scale=dict(scale))


def new_factors(
    slices: Mapping[str, int], ranks: Mapping[str, int], in_features: int, spec: AdapterSpec, device: torch.device
) -> tuple[Factors, Factors]:
    """Fresh (A, B): A Kaiming uniform (``"gaussian"``: normal / r), B zero; ``init=False`` draws B like A.

    slices: name -> N; ranks: name -> r; A [r, K], B [N, r].
    """
    A: dict[str, Tensor | None] = {}
    B: dict[str, Tensor | None] = {}
    for name, out_features in slices.items():
        rank = ranks[name]
        if rank == 0:
            A[name] = B[name] = None
            continue
        a = torch.empty(rank, in_features, device=device, dtype=spec.dtype)
        b = torch.zeros(out_features, rank, device=device, dtype=spec.dtype)
        if spec.init == "gaussian":
            nn.init.normal_(a, std=1 / rank)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        if spec.init is False:
            nn.init.kaiming_uniform_(b, a=math.sqrt(5))
        A[name], B[name] = a, b
    return Factors(A), Factors(B)
