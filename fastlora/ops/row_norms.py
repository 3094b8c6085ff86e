"""DoRA: rows of W + s B A that have a trained length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._utils.torch_compat import nothing_watches
from .multi_tensor import unsupported_reason
from .reference import accumulate_dtype


def row_norms(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """``‖w + s b A‖`` of each row [N], in fp32 or more: ``‖w‖² + 2 s b·(A w) + s² b (A A^T) b``, with no [N, K]."""
    if W.stride(1) == 1 and nothing_watches() and unsupported_reason("row_norms", (W, A, B)) is None:
        return torch.ops.fastlora.row_norms.default(W, A, B, scale)
    acc = accumulate_dtype(W.dtype)
    a, b = A.to(acc), B.to(acc)
    cross = torch.addmm((W @ A.t().to(W.dtype)).to(acc), b, a @ a.t(), alpha=scale / 2)
    squares = torch.linalg.vector_norm(W, dim=1, dtype=acc).square()
    return squares.add((b * cross).sum(1), alpha=2 * scale).clamp(min=0).sqrt()


class RowLengths(NamedTuple):
    """``y = m / ‖W + s B A‖ u + bias`` of ``u = x W^T + s x A^T B^T``; the norms are constants, as in PEFT.

    W [N, K], m [N]; parts: of each slice its runs of rows of W, with A [r, K], B [N_i, r] and s.
    """

    W: Tensor
    parts: Sequence[tuple[Sequence[slice], Tensor, Tensor, float]]
    magnitude: Tensor | None
    bias: Tensor | None

    @torch.no_grad()
    def norms(self) -> Tensor:
        """``‖W + s B A‖`` of each row [N]."""
        ((runs, A, B, s), *others) = self.parts
        if not others and len(runs) == 1:
            return row_norms(self.W, A, B, s)
        found = self.W.new_empty(self.W.shape[0], dtype=accumulate_dtype(self.W.dtype))
        for runs, A, B, s in self.parts:
            for rows, own in zip(runs, B.chunk(len(runs)), strict=True):
                found[rows] = row_norms(self.W[rows], A, own, s)
        return found

    def factors(self) -> Tensor:
        """``m / ‖W + s B A‖`` of each row, differentiable in m alone."""
        norms = self.norms()
        return self.magnitude / norms.clamp(min=torch.finfo(norms.dtype).tiny)  # a row of zeros stays

    def __call__(self, u: Tensor) -> Tensor:
        y = u * self.factors().to(u.dtype)
        return y if self.bias is None else y + self.bias
