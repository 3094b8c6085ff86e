"""A default device (``torch.set_default_device``) is for tensors that the user makes, and changes nothing here."""

from __future__ import annotations

import contextlib

import pytest
import torch
from support.adapters_help import IDS, batch, gradients, model

import fastlora
from fastlora.nn.experts import Segments
from fastlora.nn.routing import Route

STATISTICS = {
    "none": None,
    "probes": {"statistics": ("grad_sq", "act_var")},
    "columns": {"statistics": ("grad_sq", "grad_abs"), "probe_kind": "columns"},
    "exact": {"statistics": ("grad_sq", "grad_abs", "act_cov"), "estimator": "exact"},
}


def trained(ids, options, elsewhere):
    m, x, scores = model(torch.float32), batch(torch.float32), {}
    with contextlib.ExitStack() as stack:
        tracker = options and stack.enter_context(fastlora.track(m, every=1, **options))
        if elsewhere:
            stack.enter_context(torch.device("meta"))
        for _ in range(2):
            with contextlib.nullcontext() if ids is None else fastlora.use_adapters(m, ids):
                m(x).square().sum().backward()
            if tracker:
                tracker.step()
        if tracker:
            scores = dict(tracker.scores("grad_sq"))
    return gradients(m), scores


BATCHES = {
    "one adapter": None,
    "ids": IDS,
    "names": ["b", None, "default", "c", "b", "b"],
    "ranges": {"default": (0, 2), "b": (2, 6)},
}


@pytest.mark.parametrize("kind", STATISTICS)
@pytest.mark.parametrize("rows", BATCHES)
def test_training(rows, kind):
    expected, found = [trained(BATCHES[rows], STATISTICS[kind], elsewhere) for elsewhere in (False, True)]
    assert found[0].keys() == expected[0].keys() and found[1] == expected[1]
    assert all(torch.equal(found[0][name], expected[0][name]) for name in expected[0])


def test_rows_of_experts():
    segments = Segments(torch.tensor([2, 0, 2, 1]), torch.arange(4), 4, 3, Route(True, "default"))
    with torch.device("meta"):
        rows = segments.select([0, 2]).rows(torch.zeros(4, 2))
    assert rows.ids.tolist() == [0, -1, 1, 1] and rows.ranges.tolist() == [[0, 1], [2, 4]]
