"""What trackers leave behind for people: how often they sample, and what of them never acted."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable

from ..nn.linear import Linear
from ..nn.probe import TrackedStep
from .sampling import Sampling

logger = logging.getLogger(__name__)


class TrackingRecord:
    """One tracker in words; it outlives the tracker, and holds no layer."""

    def __init__(self, adapter: str, warmup: int | None, sampling: Sampling, step: TrackedStep):
        self.adapter, self.warmup, self.sampling, self._step = adapter, warmup, sampling, step
        self.weighed, self.unweighed = 0, 0  # penalties that were asked for with an importance, and without
        self.frozen, self.closed, self._warned = False, False, False
        self.over = False  # closed by its user

    def idle(self) -> str:
        """What has not acted so far, or ""."""
        all_calls = f"each time ({self.unweighed} call{'s' * (self.unweighed != 1)})"
        if self.warmup is not None and not self.frozen:
            text = f"importance is not frozen after {self._step.index} of warmup={self.warmup} steps"
            return f"{text}, and the penalty was 0 {all_calls}" if self.unweighed else text
        if not self.unweighed or self.weighed:
            return ""
        why = "importance was frozen after the last one" if self.frozen else "tracker.step() was not called before one"
        return f"the penalty was 0 {all_calls}: {why}"

    def warn(self) -> None:
        """Say once, when tracking is over, what never acted."""
        idle = self.idle()
        if idle and not self._warned:
            self._warned = True
            logger.warning("track: closed, and %s", idle)

    def __str__(self) -> str:
        parts = [f"statistics of {self.adapter!r}: {self.sampling}"]
        if self.frozen:
            parts.append(f"importance frozen after {self._step.index} steps")
        elif self.closed:
            parts.append(f"closed after {self._step.index} steps")
        return "; ".join(filter(None, [*parts, self.idle()]))


_RECORDS: weakref.WeakKeyDictionary[Linear, dict[str, TrackingRecord]] = weakref.WeakKeyDictionary()


def keep_record(record: TrackingRecord, layers: Iterable[Linear]) -> None:
    """Remember a tracker for its layers, in place of an earlier one of the same adapter."""
    for layer in layers:
        _RECORDS.setdefault(layer, {})[record.adapter] = record


def records(layers: Iterable[Linear]) -> list[TrackingRecord]:
    """The last tracker of each adapter of the layers, those that are closed among them."""
    found = [record for layer in layers for record in _RECORDS.get(layer, {}).values()]
    return list({id(record): record for record in found}.values())
