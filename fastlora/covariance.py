"""Uncentred covariances of a layer's inputs and output gradients, streamed over steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .backends import choose
from .probes import Contribution
from .reference import accumulate_dtype

COVARIANCES = ("act_cov", "grad_cov")
_BLOCK = 256


def add_gram_(total: Tensor, rows: Tensor, weight: Tensor) -> None:
    """``total += weight · rows^T rows`` on and above the diagonal, block by block: half of the full product.

    total [D, D], rows [M, D], weight a scalar tensor; a weight of 0 adds nothing, whatever the rows hold.
    """
    rows = rows.to(total.dtype)
    for start in range(0, rows.shape[1], _BLOCK):
        stop = min(start + _BLOCK, rows.shape[1])
        block = rows[:, start:stop].T @ rows[:, start:]
        total[start:stop, start:] += torch.where(weight == 0, 0.0, weight * block)


class Covariances:
    """``act_cov = x^T x / M`` [K, K] and ``grad_cov = dy^T dy / M`` [N, N] by layer, M counted over all steps.

    Source: Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature" (ICML 2015).
    """

    def __init__(self, kinds: Sequence[str]):
        self.kinds = tuple(kinds)
        self._sums: dict[str, dict[str, Tensor]] = {kind: {} for kind in self.kinds}
        self._rows: dict[str, Tensor] = {}

    def finite(self, taken: Mapping[str, Sequence[Contribution]], device: torch.device) -> Tensor:
        """Whether everything that was taken is finite: a boolean tensor, true when nothing was."""
        found = torch.ones((), dtype=torch.bool, device=device)
        for calls in taken.values():
            for call in calls:
                found &= (call.x.isfinite().all() & call.dy.isfinite().all()).to(device)
        return found

    def add(
        self,
        taken: Mapping[str, Sequence[Contribution]],
        keep: Tensor,
        inverse_scale: Tensor,
        backends: Mapping[str, str] | None = None,
    ) -> None:
        """Take in one step's calls by layer; ``keep`` is a boolean tensor that leaves the step out when false.

        ``backends``: name of each layer's backend, whose own symmetric product is used where it has one ("auto"
        without). Sums are allocated before any is changed.
        """
        for path, calls in taken.items():
            for call in calls[:1]:
                self._allocate(path, call)
        for path, calls in taken.items():
            for call in calls:
                x, dy = call.x.reshape(-1, call.x.shape[-1]), call.dy.reshape(-1, call.dy.shape[-1])
                backend, _ = choose((backends or {}).get(path, "auto"), x.device, x.dtype)
                acc, update = accumulate_dtype(x.dtype), getattr(backend, "add_gram_", add_gram_)
                for kind, rows, weight in (("act_cov", x, keep), ("grad_cov", dy, keep * inverse_scale.square())):
                    if kind in self._sums:
                        update(self._sums[kind][path], rows, weight.to(x.device, acc))
                self._rows[path] += keep.to(x.device, torch.float64) * x.shape[0]

    def _allocate(self, path: str, call: Contribution) -> None:
        x = call.x
        self.reserve(path, x.shape[-1], call.dy.shape[-1], accumulate_dtype(x.dtype), x.device)

    def reserve(self, path: str, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device) -> None:
        """Zeros where a layer has no sums yet."""
        for kind, width in (("act_cov", in_features), ("grad_cov", out_features)):
            if kind in self._sums and path not in self._sums[kind]:
                self._sums[kind][path] = torch.zeros(width, width, dtype=dtype, device=device)
        if path not in self._rows:
            self._rows[path] = torch.zeros((), dtype=torch.float64, device=device)

    def tensors(self) -> list[Tensor]:
        """The sums and the numbers of rows themselves."""
        return [*[total for sums in self._sums.values() for total in sums.values()], *self._rows.values()]

    def absorb(self, other: Covariances) -> None:
        """Take over the sums of another, of the same kinds."""
        for mine, theirs in (*((self._sums[k], other._sums[k]) for k in self.kinds), (self._rows, other._rows)):
            for path, total in theirs.items():
                mine[path] = mine[path] + total if path in mine else total

    def read(self, kind: str) -> dict[str, Tensor]:
        """Module path -> symmetric matrix."""
        return {
            path: (total.triu() + total.triu(1).T) / self._rows[path].to(total.dtype)
            for path, total in self._sums[kind].items()
        }

    def state_dict(self) -> dict[str, object]:
        return {
            "sums": {kind: {path: s.clone() for path, s in sums.items()} for kind, sums in self._sums.items()},
            "rows": {path: rows.clone() for path, rows in self._rows.items()},
        }

    def load_state_dict(self, state: Mapping) -> None:
        self._sums = {kind: {path: s.clone() for path, s in state["sums"][kind].items()} for kind in self.kinds}
        self._rows = {path: rows.clone() for path, rows in state["rows"].items()}
