"""Which optimizer steps are sampled: each n-th, n given or chosen by what statistics are measured to cost."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

# The first steps are not typical (what is measured or compiled once); then pairs of steps are compared, one of each
# with statistics and one without, in the order on, off, off, on.
FIRST, PAIRS = 8, 12
LAST = FIRST + 2 * PAIRS
SHARE = 0.01  # of a step that statistics may cost before they are sampled
INTERVALS = (1, 2, 4, 8, 16)


class Cost(NamedTuple):
    """What statistics add to a training step, as a share of it: median over pairs of steps, with a 95 % interval."""

    median: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        interval = f"95 % interval {self.low:+.1%} to {self.high:+.1%}, {self.pairs} pairs of steps"
        return f"{self.median:+.1%} of a step's CPU time ({interval})"


class Sampling:
    """The steps that a tracker samples, and how many steps a sample stands for.

    ``every``: n, or ``"auto"``: every step, unless statistics are measured to cost more than 1 % of a training step,
    that is, the whole interval of the measured cost lies above. ``fixed``: why there is nothing to measure, "" where
    there is.
    """

    def __init__(self, every: int | str, fixed: str = ""):
        self.auto = every == "auto"
        self.every: int | None = None if self.auto else every  # None: not chosen yet
        self.reason, self.cost = "" if self.auto else "as asked for", None
        self._begun: float | None = None
        self._seconds: dict[int, float] = {}
        if fixed:
            self.fix(fixed)

    def fix(self, reason: str) -> None:
        """Sample every step from now on, if the choice is open or was made here."""
        if self.auto:
            self.every, self.reason = 1, reason

    def take_up(self, every: int | None, fixed: bool) -> None:
        """Go on with the choice of a tracker whose state is loaded, unless this one's is given or ``fixed``."""
        self._begun, self._seconds = None, {}
        if self.auto and not fixed:
            self.every, self.reason = every, "" if every is None else "as chosen before"

    def sampled(self, step: int) -> bool:
        if self.every is not None:
            return step % self.every == 0
        return not FIRST <= step < LAST or (step - FIRST) % 4 in (0, 3)

    def stands_for(self, step: int) -> int:
        """Optimizer steps that the sample of ``step`` stands for."""
        if self.every is not None:
            return self.every
        return 2 if FIRST <= step < LAST else 1

    def number(self, step: int) -> int:
        """Samples before ``step``, in a run with this choice from the beginning."""
        if self.every is not None:
            return step // self.every
        if not FIRST <= step < LAST:
            return step
        whole, rest = divmod(step - FIRST, 4)
        return FIRST + 2 * whole + min(rest, 1)

    def ended(self, step: int) -> None:
        """Optimizer step ``step`` is over: take its time, and choose n after the last that is measured."""
        if self.every is not None:
            return
        # The thread's own time: other processes do not count.
        begun, self._begun = self._begun, time.thread_time()
        if begun is not None and step >= FIRST:
            self._seconds[step] = self._begun - begun
        if step >= LAST - 1:
            self._choose()

    def _choose(self) -> None:
        shares = []
        for first in range(FIRST, LAST, 2):
            times = [self._seconds.get(step, 0.0) for step in (first, first + 1)]
            on, off = times if self.sampled(first) else times[::-1]
            if on > 0 and off > 0:
                shares.append(on / off - 1)
        self.cost, self._seconds = median_cost(shares), {}
        self.every = chosen_interval(self.cost)
        self.reason = f"with only {len(shares)} pairs of steps to measure their cost by"

    def __str__(self) -> str:
        every = "every step" if self.every in (None, 1) else f"every {self.every} steps"
        if self.every is None:
            return f"{every} so far; their cost is measured by step {LAST}"
        if self.cost is not None:
            return f"{every}; one sample costs {self.cost}"
        return f"{every}, {self.reason}"


def median_cost(shares: Sequence[float]) -> Cost | None:
    """Median with the 95 % interval between two order statistics; None for too few values to have one."""
    ordered, n = sorted(shares), len(shares)
    # Fewer than k of n lie below the median with probability P(Binomial(n, 1/2) < k).
    outside = [k for k in range(1, n // 2 + 1) if sum(math.comb(n, i) for i in range(k)) <= 0.025 * 2**n]
    if not outside:
        return None
    k = outside[-1]
    return Cost((ordered[(n - 1) // 2] + ordered[n // 2]) / 2, ordered[k - 1], ordered[n - k], n)


def chosen_interval(cost: Cost | None) -> int:
    """1 unless the cost is resolved and above 1 %; then the shortest interval that brings it there, at most 16."""
    if cost is None or cost.low <= SHARE:
        return 1
    return next((n for n in INTERVALS if cost.median <= SHARE * n), INTERVALS[-1])


def nothing_to_measure(estimator: str, device: torch.device) -> str:
    """Why a tracker samples every step without measuring anything, or ""."""
    if estimator == "exact":
        return "the exact estimator is for few steps"
    if device.type != "cpu":
        return f"a step on {device.type} does not wait for its statistics"
    if torch.are_deterministic_algorithms_enabled():
        return "deterministic algorithms were asked for"
    return ""
