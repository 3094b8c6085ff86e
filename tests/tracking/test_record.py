"""What trackers say of themselves: which steps they sample, and what of them never acted."""

from __future__ import annotations

import copy

import pytest
import torch
from support.tracker_help import data, loss_of, model, track
from torch import nn

import fastlora
from fastlora.integrations.session import Session

NEVER = "importance is not frozen after 3 of warmup=5 steps, and the penalty was 0 each time (3 calls)"


def trained(m, tracker, steps=3, penalty=True):
    for step in range(steps):
        loss = loss_of(m, data(seed=step, samples=2, tokens=2))
        (loss + tracker.penalty(0.1) if penalty else loss).backward()
        tracker.step()
        m.zero_grad()


def warnings_of(caplog):
    found = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    caplog.clear()
    return found


@pytest.mark.parametrize("how", ["close", "with", "twice"])
def test_a_warmup_that_is_not_reached_is_said_once(how, caplog):
    m = model()
    if how == "with":
        with track(m, warmup=5) as tracker:
            trained(m, tracker)
            assert NEVER in str(fastlora.explain(m))
    else:
        tracker = track(m, warmup=5)
        trained(m, tracker)
        assert NEVER in str(fastlora.explain(m)) and warnings_of(caplog) == []
        for _ in range(2 if how == "twice" else 1):
            tracker.close()
    assert warnings_of(caplog) == [f"track: closed, and {NEVER}"]
    assert f"closed after 3 steps; {NEVER}" in str(fastlora.explain(m))


def test_without_a_penalty_the_importance_alone_is_missed(caplog):
    m = model()
    with track(m, warmup=5) as tracker:
        trained(m, tracker, penalty=False)
    assert warnings_of(caplog) == ["track: closed, and importance is not frozen after 3 of warmup=5 steps"]


def test_an_error_is_not_commented(caplog):
    m = model()
    with pytest.raises(ZeroDivisionError), track(m, warmup=5) as tracker:
        trained(m, tracker)
        raise ZeroDivisionError
    assert warnings_of(caplog) == []
    assert NEVER in str(fastlora.explain(m))


@pytest.mark.parametrize("apply", [False, True])
def test_what_acts_is_not_warned_of(apply, caplog):
    m = model()
    with track(m, warmup=2) as tracker:
        trained(m, tracker)
        if apply:
            tracker.apply_penalty(0.1)
        assert "importance frozen after 2 steps" in str(fastlora.explain(m))
    with track(m) as tracker:
        trained(m, tracker)
    assert warnings_of(caplog) == []
    assert "penalty was 0" not in str(fastlora.explain(m)) and "warmup" not in str(fastlora.explain(m))


def test_a_penalty_that_was_asked_for_before_every_step_only_is_said(caplog):
    m = model()
    with track(m, warmup=3) as tracker:
        trained(m, tracker)
    assert warnings_of(caplog) == [
        "track: closed, and the penalty was 0 each time (3 calls): importance was frozen after the last one"
    ]
    with track(m) as tracker:
        tracker.apply_penalty()
    assert warnings_of(caplog) == [
        "track: closed, and the penalty was 0 each time (1 call): tracker.step() was not called before one"
    ]


def test_a_tracker_that_takes_up_a_frozen_state_has_nothing_to_miss(caplog):
    m = model()
    with track(m, warmup=2) as tracker:
        trained(m, tracker, penalty=False)
        state = copy.deepcopy(tracker.state_dict())
    with track(m, warmup=2) as again:
        again.load_state_dict(state)
        assert again.penalty(0.1).item() > 0
    assert warnings_of(caplog) == []


def test_each_adapter_has_its_own_line_and_a_copy_has_none():
    m = model()
    fastlora.add_adapter(m, "b", fastlora.LoraConfig(r=1, target_modules=["query"]))
    with track(m, every=2), track(m, every=3, adapter="b"):
        said = fastlora.explain(m).statistics
        assert said == (
            "statistics of 'default': every 2 steps, as asked for",
            "statistics of 'b': every 3 steps, as asked for",
        )
        assert fastlora.explain(copy.deepcopy(m)).statistics == ()


def session_of(m, steps, total=None, **options):
    session = Session(options.pop("track", True), options.pop("penalty", None), options.pop("freeze", 0), "default")
    session.begin(m, None, total)
    for step in range(steps):
        session.hold(step)
        session.add_penalty()
        loss_of(m, data(seed=step, samples=2, tokens=2)).backward()
        session.step()
        m.zero_grad()
    session.close()


def with_head():
    m = model()
    m[2] = nn.Linear(8, 3, dtype=torch.float64)  # trainable, as a head is
    return m


@pytest.mark.parametrize(
    "warmup, penalty, says",
    [
        (4, 0.1, "track: warmup=4 is too long for 3 steps of training: the penalty is 0 to the end"),
        (3, 0.1, "track: warmup=3 is too long for 3 steps of training: the penalty is 0 to the end"),
        (4, None, "track: warmup=4 is too long for 3 steps of training: importance is never frozen"),
        (3, None, None),
        (2, 0.1, None),
        (None, 0.1, None),
    ],
)
def test_a_trainers_run_is_told_before_it_begins_and_at_its_end(warmup, penalty, says, caplog):
    session_of(model(), 3, 3, track={"every": 1, "warmup": warmup}, penalty=penalty)
    found = warnings_of(caplog)
    assert found[:1] == ([] if says is None else [says])
    assert [text.startswith("track: closed, and") for text in found[1:]] == ([] if says is None else [True])
    session_of(model(), 3, None, track={"every": 1, "warmup": warmup}, penalty=penalty)
    assert len(warnings_of(caplog)) == (says is not None)


def test_adapters_that_stand_still_to_the_end_are_said(caplog):
    session_of(with_head(), 3, 3, track=False, freeze=3)
    assert warnings_of(caplog) == [
        "freeze=3: the adapters stand still in all 3 steps of training",
        "freeze=3: training is over, and the adapters stood still to the end",
    ]
    session_of(with_head(), 3, 3, track=False, freeze=2)
    session = Session(False, None, 2, "default")
    session.begin(with_head(), None, 3)
    session.close()
    assert warnings_of(caplog) == []


@pytest.mark.parametrize(
    "options",
    [{}, {"statistics": ("fisher", "act_var")}, {"probe_kind": "columns"}, {"estimator": "exact"}, {"every": "auto"}],
)
def test_a_state_from_before_the_freeze_is_taken_up_by_a_tracker_that_froze(options):
    """As if it had stopped there: it tracks again, and freezes what a tracker freezes that never went on."""
    m = model()
    with track(m, warmup=4, **options) as whole:
        trained(m, whole, 5)
    tracker = track(m, warmup=4, **options)
    trained(m, tracker, 2)
    state = copy.deepcopy(tracker.state_dict())
    trained(m, tracker, 6)
    assert tracker.steps == 4 and tracker.importance is not None
    tracker.load_state_dict(state)
    assert tracker.steps == 2 and tracker.importance is None
    assert "importance is not frozen after 2 of warmup=4 steps" in str(fastlora.explain(m))
    for step in (2, 3):
        assert tracker.penalty(0.1) == 0
        loss_of(m, data(seed=step, samples=2, tokens=2)).backward()
        tracker.step()
    assert tracker.steps == 4 and torch.equal(tracker.importance, whole.importance) and tracker.penalty(0.1) > 0
    assert all(not layer.probes for layer in tracker.layers.values())
    assert "importance frozen after 4 steps" in str(fastlora.explain(m))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_closed_tracker_refuses_a_state_that_it_would_have_to_go_on_from(frozen):
    m = model()
    tracker = track(m, warmup=2)
    trained(m, tracker, 1)
    before = copy.deepcopy(tracker.state_dict())
    trained(m, tracker, 3 if frozen else 0)
    tracker.close()
    steps = tracker.steps
    with pytest.raises(ValueError, match="state: expected frozen importance in a tracker that is closed; track the"):
        tracker.load_state_dict(before)
    assert tracker.steps == steps and (tracker.importance is not None) == frozen


def test_a_tracker_that_froze_does_not_push_another_aside():
    m = model()
    tracker = track(m, warmup=2)
    state = copy.deepcopy(tracker.state_dict())
    trained(m, tracker, 2)
    with track(m) as other, pytest.raises(ValueError, match="model: is tracked already; close the other tracker"):
        tracker.load_state_dict(state)
    assert tracker.importance is not None and other.steps == 0
    tracker.load_state_dict(state)
    trained(m, tracker, 2)
    assert tracker.importance is not None


def test_a_shorter_warmup_than_a_state_has_behind_it_freezes_at_the_next_step():
    m = model()
    with track(m, warmup=9) as first:
        trained(m, first, 4)
        state = copy.deepcopy(first.state_dict())
    with track(m, warmup=2) as second:
        second.load_state_dict(state)
        trained(m, second, 1)
    assert second.steps == 5 and second.importance is not None
