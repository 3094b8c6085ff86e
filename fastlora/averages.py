"""The averages of a tracker: one row a statistic, so that a step folds all of them in at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Averages:
    """``F ← β F + (1 - β) f`` of every statistic and matrix, or their plain mean (``ema=None``), with the steps behind.

    ``values`` and ``counts`` are the rows by kind, [matrices] in float64.
    """

    def __init__(self, kinds: Sequence[str], matrices: int, ema: float | None, device: torch.device):
        self.kinds, self.ema = tuple(kinds), ema
        self._means = torch.zeros(len(self.kinds), matrices, dtype=torch.float64, device=device)
        self._steps = torch.zeros_like(self._means)
        self._everything = torch.ones(matrices, dtype=torch.bool, device=device)

    @property
    def values(self) -> dict[str, Tensor]:
        return dict(zip(self.kinds, self._means, strict=True))

    @property
    def counts(self) -> dict[str, Tensor]:
        return dict(zip(self.kinds, self._steps, strict=True))

    def add(
        self,
        values: Mapping[str, Tensor],
        seen: Mapping[str, Tensor],
        finite: Tensor | None,
        drawn: Tensor | None = None,
    ) -> Tensor:
        """Take in a step where ``seen``, all or none: whether its numbers, and what ``finite`` stands for, are finite.

        No statistic is negative. Of the matrices' own, all but ``act_var``, only those that are ``drawn`` count.
        """
        value, there = torch.stack([values[kind] for kind in self.kinds]), None
        if any([seen[kind] is not self._everything for kind in self.kinds]):
            there = torch.stack([seen[kind] for kind in self.kinds])
            value = torch.where(there, value, 0.0)
        own = value.amax() < math.inf
        finite = own if finite is None else own & finite
        keep = finite if there is None else there & finite
        if drawn is not None:
            keep = keep & torch.stack([drawn | (kind == "act_var") for kind in self.kinds])
        self._steps += keep
        weight = 1.0 / self._steps.clamp(min=1) if self.ema is None else 1.0 - self.ema
        self._means += torch.where(keep, value, self._means).sub_(self._means).mul_(weight)
        return finite

    def corrected(self, kind: str) -> Tensor:
        """The averages of a kind, the start at zero divided out."""
        value, count = self.values[kind], self.counts[kind]
        return value / (1.0 - self.ema**count).clamp(min=1e-300) if self.ema is not None else value.clone()

    def placed(self, found: Tensor | None, there: Sequence[bool]) -> tuple[Tensor, Tensor]:
        """Numbers of the matrices that have one, zeros for the others, and which have: what ``add`` takes of a kind."""
        if all(there):
            return found, self._everything
        seen = torch.tensor(there).to(self._means.device, non_blocking=True)
        values = torch.zeros_like(self._means[0])
        return (values if found is None else values.masked_scatter_(seen, found)), seen
