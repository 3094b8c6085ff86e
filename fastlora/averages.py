"""The averages of a tracker: one row a statistic, so that a step folds all of them in at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Step(NamedTuple):
    """One step's numbers of every kind [kinds, matrices], where there are any (None: everywhere), all finite or not."""

    value: Tensor
    there: Tensor | None
    finite: Tensor


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

    def judged(self, values: Mapping[str, Tensor], seen: Mapping[str, Tensor], finite: Tensor | None) -> Step:
        """A step's numbers where ``seen``, and whether they, and what ``finite`` stands for, are finite.

        No statistic is negative.
        """
        value, there = torch.stack([values[kind] for kind in self.kinds]), None
        if any([seen[kind] is not self._everything for kind in self.kinds]):
            there = torch.stack([seen[kind] for kind in self.kinds])
            value = torch.where(there, value, 0.0)
        own = value.amax() < math.inf
        return Step(value, there, own if finite is None else own & finite)

    def add(self, step: Step, known: Tensor | None = None) -> None:
        """Take in a step if it is finite; of the weights' statistics only those of the matrices ``known``."""
        value, there, finite = step
        keep = finite if there is None else there & finite
        if known is not None:
            rows = [self._everything if kind == "act_var" else known for kind in self.kinds]
            keep = keep & torch.stack(rows)
        self._steps += keep
        weight = 1.0 / self._steps.clamp(min=1) if self.ema is None else 1.0 - self.ema
        self._means += torch.where(keep, value, self._means).sub_(self._means).mul_(weight)

    def corrected(self, kind: str) -> Tensor:
        """The averages of a kind, the start at zero divided out."""
        value, count = self.values[kind], self.counts[kind]
        return value / (1.0 - self.ema**count).clamp(min=1e-300) if self.ema is not None else value.clone()

    def placed(self, found: Tensor | Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        """The number of every matrix, zero without one, and which have one: what ``judged`` takes of a kind."""
        device = self._means.device
        if isinstance(found, Tensor):
            return found.to(device), self._everything
        zero = torch.zeros((), dtype=torch.float64, device=device)
        values = torch.stack([zero if v is None else v.to(device, torch.float64) for v in found])
        there = [v is not None for v in found]
        return values, self._everything if all(there) else torch.tensor(there).to(device, non_blocking=True)
