"""PEFT's layout of the factors of experts that are one parameter: A [E r, K], B [N, r E] with one r for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._utils.distributed import whole
from ..nn.adapter import Slices
from .folder import Slice


def experts_stacked(
    pairs: Mapping[str, tuple[Tensor, Tensor, float]], s: float, rank: int, fold: bool
) -> tuple[Tensor, Tensor, tuple[Slice, ...]]:
    """A, expert by expert, B, whose columns run over experts first, and each expert's part, if they are not alike.

    Zeros fill ranks below ``rank``; scales other than ``s``, with ``fold`` other than 1, go into B.
    """
    As, Bs, slices = [], [], []
    for name, (a, b, scale) in pairs.items():
        a, b, own = whole(a.detach()), whole(b.detach()), a.shape[0]
        ratio = scale / s if s and own and not fold else 1.0
        factor = scale if fold else ratio
        # Products of low-precision factors are rounded once.
        Bs.append(F.pad(b if factor == 1 else (b.double() * factor).to(b.dtype), (0, rank - own)))
        As.append(F.pad(a, (0, 0, 0, rank - own)))
        slices.append(Slice(name, b.shape[0], own, ratio))
    alike = all(x.rank == rank and x.scale_ratio == 1.0 for x in slices)
    return torch.cat(As), torch.stack(Bs, dim=2).flatten(1), () if alike else tuple(slices)


def experts_unstacked(
    A: Tensor, B: Tensor, rows: Slices, slices: Sequence[Slice], where: str
) -> tuple[dict[str, tuple[Tensor, Tensor] | None], dict[str, float]]:
    """(A, B) of each expert, cut to its rank, None for 0, and what its scale is of the file's.

    ``ValueError`` that names ``where`` if ``slices`` are not of these experts, or leave something out.
    """
    A, B = A.unflatten(0, (len(rows), -1)), B.unflatten(1, (-1, len(rows))).permute(2, 0, 1)
    rank = A.shape[1]
    slices = slices or [Slice(name, N, rank, 1.0) for name, N in rows.items()]
    if {x.name: x.rows for x in slices} != rows or any(x.rank > rank for x in slices):
        raise ValueError(f"{where}: expected parts {rows} of rank {rank} at most, got {len(slices)} others")
    factors: dict[str, tuple[Tensor, Tensor] | None] = {}
    for x, a, b in zip(slices, A, B, strict=True):
        if bool(b[:, x.rank :].any()):
            raise ValueError(f"{where}: lora_B of expert {x.name} is not zero beyond its rank {x.rank}")
        a, b = a[: x.rank].contiguous(), b[:, : x.rank].contiguous()
        if x.scale_ratio not in (0.0, 1.0):
            b = (b.double() / x.scale_ratio).to(b.dtype)
        factors[x.name] = (a, b) if x.rank else None
    return factors, {x.name: x.scale_ratio for x in slices}
