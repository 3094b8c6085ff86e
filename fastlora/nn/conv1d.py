"""``Conv1D``: the adapted form of transformers' linear layer whose weight is transposed (GPT-2)."""

from __future__ import annotations

from torch import Tensor

from .linear import Linear
from .views import LayerView


class Conv1D(Linear):
    r"""transformers' ``Conv1D`` with a low-rank update; made by ``inject`` by a change of class.

    .. math:: y = x W + b + s\, x A^\top B^\top

    ``weight`` [K, N] and ``bias`` [N] stay as they are; A [r, K] and B [N, r] are those of a ``Linear``. Slices of a
    fused [q, k, v] are columns of the weight.
    """

    def forward(self, x: Tensor) -> Tensor:
        return LayerView(self, self.weight.t(), self.bias)(x)

    def delta(self, adapter: str = "default") -> Tensor:
        """``s (B A)^T`` of the whole weight [K, N]."""
        return super().delta(adapter).t()

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.t()
