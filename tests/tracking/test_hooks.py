"""The hook of a tracker on its model: what it warns of, and when it is over."""

from __future__ import annotations

import copy

import pytest
import torch
from support.tracker_help import data, loss_of, model, track

import fastlora
from fastlora.tracking.hooks import STEPS_WATCHED


def test_several_optimiser_steps_without_tracker_step_warn_once(caplog):
    m, batch = model(), data()
    optimizer = torch.optim.SGD(fastlora.param_groups(m))
    with track(m):
        for _ in range(8):
            loss_of(m, batch).backward()
            optimizer.step()
    assert [r.message for r in caplog.records if "without tracker.step()" in r.message] == [
        "track: 4 optimizer steps without tracker.step(); their statistics run together"
    ]


@pytest.mark.parametrize(
    "options, over",
    [
        (dict(statistics=("grad_sq", "act_var")), True),
        (dict(statistics=("act_var",)), True),
        (dict(statistics=("fisher",)), False),  # signs of every micro-batch
        (dict(probe_kind="columns"), False),
        (dict(estimator="exact"), False),
    ],
)
def test_a_model_has_no_hook_once_nothing_needs_to_know_of_its_forwards(options, over):
    """And the numbers are those of a tracker whose hook stays."""
    m = model()
    n = copy.deepcopy(m)
    with track(m, every=1, **options) as tracker, track(n, every=1, **options) as other:
        n._forward_pre_hooks[other._hook.id]._stays = True
        for step in range(STEPS_WATCHED + 3):
            assert (tracker._hook.id in m._forward_pre_hooks) == (not over or step <= STEPS_WATCHED)
            for own, its in ((tracker, m), (other, n)):
                for micro in range(2):
                    loss_of(its, data(seed=2 * step + micro)).backward()
                own.step()
        assert other._hook.id in n._forward_pre_hooks
        for kind in tracker.kinds:
            assert tracker.scores(kind) == other.scores(kind)
    assert tracker._hook.id not in m._forward_pre_hooks


def test_a_graph_that_runs_late_counts_in_no_later_sample():
    """It was built in a step that is sampled; its backward runs in one that is not."""
    found = []
    for late in (True, False):
        m = model()
        with track(m, every=2) as tracker:
            loss = loss_of(m, data(seed=0))
            loss_of(m, data(seed=1)).backward()
            tracker.step()
            if late:
                loss.backward()
            tracker.step()
            loss_of(m, data(seed=2)).backward()
            tracker.step()
            found.append(tracker.scores("grad_sq"))
    assert found[0] == found[1]
