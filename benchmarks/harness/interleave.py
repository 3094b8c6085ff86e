"""Timing of variants that take turns, and what is said of paired times."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fastlora.tracking.hooks import STEPS_WATCHED

from .peers import Variant


def settle(variant: Variant) -> None:
    """What a tracker does in its first steps alone is done: it looks for ranks, and watches the training loop."""
    for _ in range(0 if variant.tracker is None else STEPS_WATCHED + 1):
        variant.call()
        variant.tracker.step()


class Interleaved:
    """Runs every variant once a round, in alternating order (A B C D, then D C B A), timing each call.

    ``before``, ``run`` and ``after`` are the three parts of a round: the variants ahead of the target, the target, and
    those behind it. A tracked variant yields a second row that includes ``tracker.step()``.
    """

    def __init__(
        self, variants: Sequence[Variant], target: str, calls: int, clock: Callable[[], float] = time.thread_time
    ):
        self.variants, self.calls, self.clock, self.round = list(variants), calls, clock, 0
        self.target = next(v for v in self.variants if v.name == target)
        self.times: dict[str, dict[int, float]] = {}  # by variant and round
        for variant in self.variants:
            settle(variant)

    def _order(self) -> list[Variant]:
        due = [v for v in self.variants if self.round % v.every == 0]
        return due[:: -1 if self.round % 2 else 1]

    def _place(self, order: list[Variant]) -> int:
        return next(i for i, variant in enumerate(order) if variant is self.target)

    def before(self) -> None:
        gc.collect()
        order = self._order()
        for variant in order[: self._place(order)]:
            self._measure(variant)

    def run(self) -> None:
        self._measure(self.target)

    def after(self) -> None:
        order = self._order()
        for variant in order[self._place(order) + 1 :]:
            self._measure(variant)
        self.round += 1

    def _measure(self, variant: Variant) -> None:
        total = 0.0
        for _ in range(self.calls):
            variant.forget()
            start = self.clock()
            variant.call()
            total += self.clock() - start
        self.times.setdefault(variant.name, {})[self.round] = total / self.calls
        if variant.tracker is not None:
            start = self.clock()
            variant.tracker.step()
            step = self.clock() - start
            self.times.setdefault(variant.name + "_step", {})[self.round] = total / self.calls + step


def quantile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between order statistics."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def median_interval(values: Sequence[float], draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the median: the same in every run on the same values."""
    sample, n = torch.tensor(values, dtype=torch.float64), len(values)
    chosen = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(seed))
    ordered = sample[chosen].sort(dim=1).values
    medians = (ordered[:, (n - 1) // 2] + ordered[:, n // 2]) / 2
    return tuple(medians.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist())


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median with its 95 % interval, quartiles and tenths of a sample, and its size."""
    points = {"median": 0.5, "p10": 0.1, "p25": 0.25, "p75": 0.75, "p90": 0.9}
    low, high = median_interval(values)
    return {
        **{name: quantile(values, q) for name, q in points.items()},
        "median_low": low,
        "median_high": high,
        "rounds": len(values),
    }


Times = Mapping[str, Mapping[int, float]]


def paired(times: Times, base: str) -> dict[str, dict[str, float]]:
    """Spread of (variant / base) of the same round, for every variant."""
    whole = times[base]
    return {name: spread([t / whole[i] for i, t in own.items() if i in whole]) for name, own in times.items()}


def rows(times: Times) -> list[dict[str, Any]]:
    """One row a variant: milliseconds per call, and ratios to PEFT, to untracked fastlora, and to the frozen layer."""
    ratios = {f"ratio_to_{base}": paired(times, base) for base in ("peft", "fastlora", "frozen") if base in times}
    return [
        {
            "variant": name,
            "ms": spread([1e3 * t for t in own.values()]),
            **{key: found[name] for key, found in ratios.items()},
        }
        for name, own in times.items()
    ]
