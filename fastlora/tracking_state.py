"""A tracker's state: what it saves, and how another one goes on with the same numbers."""

from __future__ import annotations

from typing import Any

from .tracking_checks import checked_state


def saved(tracker: Any) -> dict[str, Any]:
    """Everything that ``load`` needs, in tensors and plain numbers."""
    return {
        "keys": list(tracker.keys),
        "steps": tracker.steps,
        "seed": tracker.seed,
        "probes": tracker.probes,
        "probe_kind": tracker.probe_kind,
        "columns": tracker._rows.state_dict() if tracker.probe_kind == "columns" and tracker._rows else None,
        "values": {k: v.clone() for k, v in tracker._averages.values.items()},
        "counts": {k: v.clone() for k, v in tracker._averages.counts.items()},
        "skipped": tracker._skipped.clone(),
        "covariances": tracker._covariances.state_dict(),
        "importance": None if tracker.importance is None else tracker.importance.clone(),
    }


def load(tracker: Any, state: dict[str, Any]) -> None:
    """Take up a saved state; ``ValueError`` names what differs, with the tracker unchanged."""
    checked_state(state, saved(tracker))
    for kind, value in tracker._averages.values.items():
        value.copy_(state["values"][kind])
    for kind, count in tracker._averages.counts.items():
        count.copy_(state["counts"][kind])
    tracker._skipped.copy_(state["skipped"])
    tracker._covariances.load_state_dict(state["covariances"])
    tracker.steps, tracker.seed = state["steps"], state["seed"]
    tracker._reduction.restart()
    tracker.discard()
    tracker.importance = None if state["importance"] is None else state["importance"].to(tracker.device)
    if tracker._rows is not None:
        if state["columns"] is not None:
            tracker._rows.load_state_dict(state["columns"])
        tracker._rows.restart(tracker.seed)
        tracker._rows.draw(tracker.steps)
    if tracker._compiled is not None:
        tracker._compiled.advance(tracker.steps)
    if tracker.importance is not None:
        tracker.close()
