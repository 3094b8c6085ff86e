"""Trackers that measure columns of x, and their expectation over all draws."""

from __future__ import annotations

import torch

from fastlora.tracking.statistics import fisher_factor
from support.tracker_help import data, loss_of, track

KINDS = ("grad_sq", "grad_abs", "act_var")


def columns(m, statistics=KINDS, **kwargs):
    return track(m, statistics=statistics, probe_kind="columns", **{"ema": None, **kwargs})


def shown(m, tracker, batch=None):
    """One step, after which every matrix's norms are known."""
    loss_of(m, batch or data()).backward()
    tracker.step()
    m.zero_grad()


def every_draw(tracker, run, kinds=("grad_sq", "grad_abs")):
    """Expectations over all columns at k = 1, by putting each in turn in the place of the draw: no chance is left."""
    rows, widths = tracker._sampler, {layer.in_features for layer in tracker.layers.values()}
    (width,) = widths
    expected = {kind: torch.zeros(len(tracker.keys), dtype=torch.float64) for kind in kinds}
    shares = rows._shares[0][0]
    p = shares.double() / shares.sum(1, keepdim=True)
    before = tracker.state_dict()
    for j in range(width):
        rows.index.fill_(j)
        rows.weight.copy_(1 / p[:, j : j + 1])
        run()
        grads = [tracker.layers[path].probes[tracker.adapter].Z[name].grad for path, name in tracker.matrices]
        factor = fisher_factor(tracker.loss_reduction, tracker._step.signs.count()) if tracker.per_sample else 1.0
        for kind, values in rows.values(grads, kinds, factor).items():
            expected[kind] += p[:, j] * values.to(p.dtype)
        tracker.discard()
    tracker.load_state_dict(before)
    return {kind: dict(zip(tracker.keys, value.tolist(), strict=True)) for kind, value in expected.items()}
