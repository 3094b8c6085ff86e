"""Columns of x as probes: without bias, what they count, and what they keep."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from tracker_help import (
    Attention,
    Twice,
    accumulated,
    assert_scores,
    data,
    loss_of,
    model,
    per_sample_gradients,
    track,
    weight_gradients,
)

import fastlora
from fastlora import reference
from fastlora.column_rows import LOOK_EVERY, LOOK_FIRST, ColumnRows, looks

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
    rows, widths = tracker._rows, {layer.in_features for layer in tracker.layers.values()}
    (width,) = widths
    expected = {kind: torch.zeros(len(tracker.keys), dtype=torch.float64) for kind in kinds}
    shares = rows._shares[0][0]
    p = shares.double() / shares.sum(1, keepdim=True)
    before = tracker.state_dict()
    for j in range(width):
        rows.index.fill_(j)
        rows.weight.copy_(1 / p[:, j : j + 1])
        run()
        grads = [tracker._probe(tracker.layers[path]).Z[name].grad for path, name in tracker.matrices]
        factor = tracker.sample_factor(tracker._sample_count()) if tracker.per_sample else 1.0
        for kind, values in rows.values(grads, kinds, factor).items():
            expected[kind] += p[:, j] * torch.stack(values).double()
        tracker.discard()
    tracker.load_state_dict(before)
    return {kind: dict(zip(tracker.keys, value.tolist(), strict=True)) for kind, value in expected.items()}


@pytest.mark.parametrize("backend", ["reference", "python", "native"])
@pytest.mark.parametrize("layer,targets", [(Attention, ("query", "key", "value")), (Twice, ("fc1",))])
def test_the_expectation_over_all_draws_is_the_exact_value(layer, targets, backend):
    dtype = torch.float64 if backend == "reference" else torch.float32
    m, batches = model(dtype, layer, targets=targets, dropout=0.5), [data(dtype, seed=s) for s in (1, 2)]
    for adapted in fastlora.nn.linear.adapted_layers(m).values():
        adapted.backend = backend

    def run():
        torch.manual_seed(3)  # dropout: the probes see x without it
        for batch in batches:
            (loss_of(m, batch) / 2).backward()

    with columns(m, probes=1) as tracker:
        run()
        tracker.step()
        found = every_draw(tracker, run)
    with track(m, "exact", ema=None, statistics=("grad_sq", "grad_abs")) as exact:
        run()
        exact.step()
    sizes = [exact.layers[path].slices[n] * exact.layers[path].in_features for path, n in exact.matrices]
    assert_scores(found["grad_sq"], dict(exact.scores("grad_sq")), rtol=1e-9 if dtype == torch.float64 else 1e-5)
    mean = {key: value / size for (key, value), size in zip(found["grad_abs"].items(), sizes, strict=True)}
    assert_scores(mean, dict(exact.scores("grad_abs")), rtol=1e-9 if dtype == torch.float64 else 1e-5)


def test_shares_are_those_of_the_norms_with_a_tenth_of_uniform():
    norms = torch.tensor([[4.0, 1.0, 0.0, 0.0], [0.0] * 4], dtype=torch.float64)
    squares = reference.column_shares(norms, True, False)
    assert squares[0].tolist() == pytest.approx([0.9 * 0.8 + 0.025, 0.9 * 0.2 + 0.025, 0.025, 0.025])
    assert reference.column_shares(norms, False, True)[0, 0].item() == pytest.approx(0.9 * 2 / 3 + 0.025)
    assert reference.column_shares(norms, True, True)[0, 0].item() == pytest.approx(0.9 * (0.4 + 1 / 3) + 0.025)
    assert squares[1].tolist() == [0.25] * 4
