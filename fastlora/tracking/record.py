"""What trackers leave behind for people: how often they sample, and what of them never acted."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from ..nn.linear import Linear
from ..nn.probe import TrackedStep
from .sampling import Sampling


class TrackingRecord:
    """One tracker in words; it outlives the tracker, and holds no layer."""

    def __init__(self, adapter: str, warmup: int | None, sampling: Sampling, step: TrackedStep):
        self.adapter, self.warmup, self.sampling, self._step = adapter, warmup, sampling, step
        self.weighed, self.unweighed = 0, 0  # penalties that were asked for with an importance, and without
        self.frozen, self.closed = False, False

    def idle(self) -> str:
        """What has not acted so far, or ""."""
        steps = self._step.index
        if self.warmup is not None and not self.frozen:
            text = f"importance is not frozen after {steps} of warmup={self.warmup} steps"
            return f"{text}, so that the penalty is 0" + (f" in all {self.unweighed} calls" if self.unweighed else "")
        if self.unweighed and not self.weighed:
            return f"the penalty was 0 in all {self.unweighed} calls: tracker.step() was never called before one"
        return ""

    def __str__(self) -> str:
        parts = [f"statistics of {self.adapter!r}: {self.sampling}", self.idle()]
        if self.closed:
            parts.insert(1, f"closed after {self._step.index} steps")
        return "; ".join(filter(None, parts))


_RECORDS: weakref.WeakKeyDictionary[Linear, dict[str, TrackingRecord]] = weakref.WeakKeyDictionary()


def keep_record(record: TrackingRecord, layers: Iterable[Linear]) -> None:
    """Remember a tracker for its layers, in place of an earlier one of the same adapter."""
    for layer in layers:
        _RECORDS.setdefault(layer, {})[record.adapter] = record


def records(layers: Iterable[Linear]) -> list[TrackingRecord]:
    """The last tracker of each adapter of the layers, those that are closed among them."""
    found = [record for layer in layers for record in _RECORDS.get(layer, {}).values()]
    return list({id(record): record for record in found}.values())
