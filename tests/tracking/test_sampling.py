"""Which steps are sampled: as asked, or by what statistics are measured to cost. No test reads a real clock."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support.tracker_help import data, loss_of, model

import fastlora
from fastlora.tracking import sampling
from fastlora.tracking.sampling import FIRST, LAST, PAIRS, Cost, Sampling, chosen_interval, median_cost


class Clock:
    """``time.thread_time`` of a run whose steps take a second, and a share more where they are sampled."""

    def __init__(self, share, noise=0.0):
        self.seconds, self.share, self.noise = 0.0, share, noise
        self.generator, self.sampled = torch.Generator().manual_seed(0), lambda: True

    def thread_time(self):
        jitter = self.noise * float(torch.randn((), generator=self.generator))
        self.seconds += (1.0 + self.share * self.sampled()) * (1.0 + jitter)
        return self.seconds


def run(chosen, clock, steps, begin=0):
    """The steps that are sampled, and what each sample stands for."""
    found = {}
    for step in range(begin, begin + steps):
        clock.sampled = lambda step=step: chosen.sampled(step)
        if chosen.sampled(step):
            found[step] = chosen.stands_for(step)
        chosen.ended(step)
    return found


@pytest.fixture
def clock(monkeypatch):
    def make(*args):
        made = Clock(*args)
        monkeypatch.setattr(sampling.time, "thread_time", made.thread_time)
        return made

    return make


@pytest.mark.parametrize("every", [1, 2, 5])
def test_each_nth_step_as_asked_for(every, clock):
    found = run(Sampling(every), clock(0.5), 20)
    assert found == {step: every for step in range(0, 20, every)}


@pytest.mark.parametrize(
    "share, every", [(0.0, 1), (0.009, 1), (0.013, 2), (0.035, 4), (0.079, 8), (0.081, 16), (0.5, 16)]
)
def test_auto_samples_as_often_as_one_percent_allows(share, every, clock):
    chosen = Sampling("auto")
    found = run(chosen, clock(share), LAST + 32)
    first = dict.fromkeys(range(FIRST), 1)
    compared = {step: 2 for step in range(FIRST, LAST) if (step - FIRST) % 4 in (0, 3)}
    later = {step: every for step in range(LAST, LAST + 32, every)}
    assert found == first | compared | later
    assert chosen.every == every and chosen.cost.pairs == PAIRS
    assert chosen.cost[:3] == pytest.approx((share,) * 3, abs=1e-9)


def test_a_cost_that_is_not_resolved_does_not_thin_out_the_samples(clock):
    chosen = Sampling("auto")
    run(chosen, clock(0.06, 0.05), LAST)
    assert chosen.cost.low < 0.01 < chosen.cost.median and chosen.every == 1
    assert "every step; one sample costs" in str(chosen) and "95 % interval" in str(chosen)


def test_samples_stand_for_all_steps_and_are_numbered_through(clock):
    for chosen in (Sampling(3), Sampling("auto")):
        steps = range(LAST) if chosen.auto else range(30)
        assert sum(chosen.stands_for(step) for step in steps if chosen.sampled(step)) == len(steps)
        for step in steps:
            if chosen.sampled(step):
                assert chosen.number(step) == sum(chosen.sampled(before) for before in range(step))


def test_the_interval_of_the_median_covers_it_in_95_of_100():
    draws = torch.randn(4000, PAIRS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inside = sum(cost.low <= 0 <= cost.high for cost in map(median_cost, draws.tolist())) / 4000
    # 1 - 2 P(Binomial(12, 1/2) < 3) is .9614; five deviations of 4000 draws.
    assert abs(inside - 0.9614) < 5 * math.sqrt(0.9614 * 0.0386 / 4000)
    assert median_cost([3.0, 1.0, 2.0, 6.0, 5.0, 4.0]) == Cost(3.5, 1.0, 6.0, 6)
    assert median_cost([1.0] * 5) is None and median_cost([]) is None
    assert chosen_interval(None) == 1


def test_a_clock_that_stands_still_chooses_nothing(monkeypatch):
    monkeypatch.setattr(sampling.time, "thread_time", lambda: 0.0)
    chosen = Sampling("auto")
    for step in range(LAST):
        chosen.ended(step)
    assert chosen.every == 1 and chosen.cost is None and "only 0 pairs of steps" in str(chosen)


def test_pauses_between_steps_are_not_a_cost(clock):
    paused, chosen = clock(0.0), Sampling("auto")
    for step in range(LAST):
        paused.seconds += 100.0 * (step in (FIRST, FIRST + 11))  # an evaluation, in a sampled step and in another
        chosen.ended(step)
    assert chosen.every == 1 and chosen.cost.median == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("cost, every", [(0.0, 1), (0.1, 16)])
def test_a_tracker_chooses_says_so_and_keeps_it_in_its_state(cost, every, clock):
    m, made = model(), clock(cost)
    with fastlora.track(m) as tracker:
        made.sampled = lambda: tracker._step.sampled
        assert f"statistics of 'default': every step so far; their cost is measured by step {LAST}" in str(
            fastlora.explain(m)
        )
        for step in range(LAST + 1):
            assert tracker.every is None or step >= LAST
            loss_of(m, data(samples=2, tokens=2, seed=step)).backward()
            tracker.step()
        said = f"{'every step' if every == 1 else f'every {every} steps'}; one sample costs {cost:+.1%} of a step's CPU"
        assert said in str(fastlora.explain(m)) and tracker.every == every
        state = copy.deepcopy(tracker.state_dict())
    for given, expected in (("auto", every), (3, 3)):
        with fastlora.track(m, every=given) as again:
            again.load_state_dict(state)
            assert again.every == expected and again.steps == LAST + 1
    del state["every"]  # as states were saved once
    with fastlora.track(m) as again:
        again.load_state_dict(state)
        assert again.every is None


def test_where_there_is_nothing_to_measure_every_step_is_sampled():
    m = model()
    with fastlora.track(m, estimator="exact") as tracker:
        assert tracker.every == 1 and "every step, the exact estimator is for few steps" in str(fastlora.explain(m))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with fastlora.track(m) as tracker:
            assert tracker.every == 1 and "deterministic algorithms" in str(fastlora.explain(m))
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("part", [False, True])
def test_compiled_code_is_of_one_kind(part):
    torch._dynamo.reset()
    m = model(torch.float32)
    if part:
        m[0] = torch.compile(m[0], backend="aot_eager")
        run = m
    else:
        run = torch.compile(m, backend="aot_eager", fullgraph=True)
    with fastlora.track(m) as tracker:
        for seed in range(2):
            loss_of(run, data(torch.float32, seed=seed)).backward()
            tracker.step()
        assert tracker.every == 1 and "compiled code is the same" in str(fastlora.explain(m))
