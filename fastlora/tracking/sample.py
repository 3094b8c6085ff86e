"""One step's sample: what left the backward, and the numbers it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..nn.probe_rows import ColumnSampler, RademacherProbes
from .all_reduce import Shared
from .statistics import Found, Tracked, fisher_factor, output_variances_of


class Sample(NamedTuple):
    """What left the backward of one step under a tracker; it knows no tracker."""

    tracked: Tracked
    sampler: RademacherProbes | ColumnSampler | None
    Q: Sequence[Tensor | None]  # of each matrix, with probes
    V: Sequence[Tensor | None]  # of each layer, with ``act_var``
    samples: int | Tensor  # in this step, under ``fisher`` with probes
    shared: Shared | None  # with data-parallel ranks
    inverse: Tensor | None  # of a loss scale

    def read(self) -> Found:
        """The numbers of every statistic, and which matrices have one.

        Under the exact estimator while the layers still hold what backward left.
        """
        tracked, found = self.tracked, {}
        if "act_var" in tracked.kinds:
            found["act_var"] = output_variances_of(
                tracked.layers.values(), self.V, tracked.device, self.shared is not None
            )
        if tracked.weight_kinds:
            found |= self._of_probes() if tracked.estimator == "probe" else self._exact()
        if self.shared is not None:
            numbers = self.shared.finish({kind: number for kind, (number, _) in found.items()}, tracked.loss_reduction)
            found = {kind: (number, self.shared.present[kind]) for kind, number in numbers.items()}
        for kind in tracked.weight_kinds if self.inverse is not None else ():
            numbers, there = found[kind]
            if numbers is not None:
                numbers = numbers * (self.inverse if kind == "grad_abs" else self.inverse.square())
            found[kind] = numbers, there
        return found

    def _factor(self) -> float | Tensor:
        if "fisher" in self.tracked.kinds and self.shared is None:
            return fisher_factor(self.tracked.loss_reduction, self.samples)
        return 1.0

    def _of_probes(self) -> Found:
        kinds, there = self.tracked.weight_kinds, [Q is not None for Q in self.Q]
        numbers = self.sampler.values(self.Q, kinds, self._factor()) if any(there) else {}
        return {kind: (numbers.get(kind), there) for kind in kinds}

    def _exact(self) -> Found:
        tracked = self.tracked
        exact = tracked.exact_values() if self.shared is None else self.shared.exact
        found = {}
        for kind in tracked.weight_kinds:
            numbers = [values.get(kind) for values in exact]
            live = [n.to(tracked.device, torch.float64) for n in numbers if n is not None]
            found[kind] = torch.stack(live) if live else None, [n is not None for n in numbers]
        return found
