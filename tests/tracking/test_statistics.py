"""Statistics over steps: averages, covariances, and steps that are left out."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from support.tracker_help import (
    assert_scores,
    data,
    first_only,
    loss_of,
    model,
    running_average,
    track,
    weight_gradients,
)

import fastlora
from fastlora.ops.node import NODE, REASON
from fastlora.tracking import sampling
from fastlora.tracking.sample import Sample
from fastlora.tracking.statistics import Averages


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("estimator", ["probe", "exact"])
def test_a_step_that_is_not_finite_is_left_out_and_counted(bad, estimator):
    m, batch = model(), data()
    plain = track(m, estimator=estimator)
    loss_of(m, batch).backward()
    plain.step()
    plain.close()
    tracker = track(m, estimator=estimator)
    loss_of(m, batch).backward()
    tracker.step()
    (loss_of(m, batch) * bad).backward()
    tracker.step()
    assert tracker.skipped == 1
    assert_scores(tracker.scores("grad_sq"), dict(plain.scores("grad_sq")))
    loss_of(m, batch).backward()
    tracker.step()
    assert tracker.skipped == 1 and tracker._averages.counts["grad_sq"].unique().tolist() == [2.0]


def test_ema_is_bias_corrected_per_matrix():
    m = model()
    used, values = [0, 1, 0, 1, 1], []
    with track(m, estimator="exact", ema=0.9) as tracker:
        for i, both in enumerate(used):
            x, y = data(seed=i)
            G = weight_gradients(m, [(x, y)], (lambda m, b: loss_of(m, b)) if both else first_only)
            (loss_of(m, (x, y)) if both else first_only(m, (x, y))).backward()
            tracker.step()
            values.append({k: None if g is None else float(g.square().sum()) for k, g in G.items()})
    expected = {}
    for key in tracker.keys:
        f = [v[key] for v in values if v[key] is not None]
        weights = [0.1 * 0.9 ** (len(f) - 1 - i) for i in range(len(f))]
        expected[key] = sum(w * v for w, v in zip(weights, f, strict=True)) / sum(weights)
    assert_scores(tracker.scores("grad_sq"), expected)


@pytest.mark.parametrize("beta", [0.9, 0.0, None])
def test_averages_decay_by_optimizer_steps_whatever_a_sample_stands_for(beta):
    """Matrices and statistics that are sampled differently, left out, and taken up by another object half way."""
    kinds, matrices, generator = ("grad_sq", "act_var"), 3, torch.Generator().manual_seed(0)
    cpu = torch.device("cpu")
    averages, samples = Averages(kinds, matrices, beta, cpu), {kind: [[], [], []] for kind in kinds}
    for turn in range(40):
        if turn == 20:
            before, averages = averages, Averages(kinds, matrices, beta, cpu)
            for kind in kinds:
                averages.values[kind].copy_(before.values[kind])
                averages.counts[kind].copy_(before.counts[kind])
        values = {kind: torch.rand(matrices, generator=generator, dtype=torch.float64) for kind in kinds}
        seen = {kind: torch.rand(matrices, generator=generator) < 0.7 for kind in kinds}
        drawn = torch.rand(matrices, generator=generator) < 0.7
        steps, bad = (1, 2, 5, 4)[turn % 4], turn % 7 == 3
        if bad:
            values["grad_sq"][0] = torch.inf
            seen["grad_sq"][0] = True
        finite = torch.tensor(turn % 11 != 5)
        folded, skipped = not bad and bool(finite), int(averages.skipped)
        assert bool(averages.add({k: (values[k], seen[k]) for k in kinds}, finite, drawn, steps)) == folded
        assert int(averages.skipped) == skipped + (not folded)
        for kind in kinds if folded else ():
            for i in range(matrices):
                if seen[kind][i] and (kind == "act_var" or drawn[i]):
                    samples[kind][i].append((values[kind][i], steps))
    for kind in kinds:
        expected = [running_average(mine, beta) for mine in samples[kind]]
        torch.testing.assert_close(averages.corrected(kind).tolist(), expected, rtol=1e-12, atol=0)
        assert averages.counts[kind].tolist() == [sum(n for _, n in mine) for mine in samples[kind]]


@pytest.mark.skipif(NODE is None, reason=REASON or "")
@pytest.mark.parametrize("ema", [0.9, None])
@pytest.mark.parametrize("kinds", [("grad_sq",), ("act_var", "grad_sq"), ("fisher", "act_var"), ("act_var",)], ids=str)
def test_one_native_call_folds_a_sample_in_as_the_formula_does(kinds, ema, monkeypatch):
    """With a step that is not finite, and one without a layer; torch rounds once where it multiplies and adds."""
    m, states, calls = model(), [], []
    for by_node in (True, False):
        with track(m, ema=ema, statistics=kinds, every=1) as tracker:
            fold, add = tracker._native.fold, tracker._averages.add
            counted = SimpleNamespace(fold=lambda *given, f=fold: calls.append(f(*given)) or calls[-1])
            monkeypatch.setattr(tracker, "_native", counted if by_node else None)
            monkeypatch.setattr(tracker._averages, "add", lambda *given, f=add: calls.append("add") or f(*given))
            for step in range(40):
                loss = (first_only if step == 30 else loss_of)(m, data(seed=step, samples=3, tokens=2))
                (loss * (math.nan if step % 9 == 4 else 1.0)).backward()
                tracker.step()
                m.zero_grad()
        states.append(tracker.state_dict())
    assert calls == [*[True] * 30, False, "add", *[True] * 9, *["add"] * 40]
    one, other = states
    assert one["skipped"] == other["skipped"] == (0 if kinds == ("act_var",) else 4)
    for name in ("values", "counts"):
        for kind in kinds:
            torch.testing.assert_close(one[name][kind], other[name][kind], rtol=40 * 2.0**-53, atol=0)


FOLLOWED = {
    "rademacher": dict(estimator="probe", statistics=("grad_sq", "act_var")),
    "fisher": dict(estimator="probe", statistics=("fisher",)),
    "columns": dict(estimator="probe", statistics=("grad_sq", "grad_abs", "act_var"), probe_kind="columns"),
    "fisher by columns": dict(estimator="probe", statistics=("fisher",), probe_kind="columns"),
    "exact": dict(estimator="exact", statistics=("grad_sq", "fisher", "grad_abs", "act_var")),
}
MEASURED = 4  # what "auto" chooses by the costs that the test's clock shows


def sample_of(every, step):
    """Optimizer steps that the sample of a step stands for, 0 where none is taken."""
    if every != "auto":
        return every * (step % every == 0)
    if step < sampling.FIRST:
        return 1
    if step < sampling.LAST:
        return 2 * ((step - sampling.FIRST) % 4 in (0, 3))
    return MEASURED * (step % MEASURED == 0)


class Samples:
    """What a tracker's averages were given, step by step, and what each sample stands for by the rule above."""

    def __init__(self, options, monkeypatch):
        self.kinds, self.by_columns, self.monkeypatch = options["statistics"], "probe_kind" in options, monkeypatch
        self.mine, self.known, self.given = {kind: {} for kind in self.kinds}, set(), {}

    def watch(self, tracker):
        add, native, tracked, signs = tracker._averages.add, tracker._native, tracker._tracked, tracker._step.signs

        def added(found, *rest):
            self.given.update(found)
            return add(found, *rest)

        def folded(*given):
            Q, V = ([leaf.grad for leaf in leaves] for leaves in (tracked.Z, tracked.V))
            found = Sample(tracked, tracker._sampler, Q, V, signs and signs.count(), None, None).read()
            done = native.fold(*given)
            if done:
                self.given.update(found)
            return done

        self.monkeypatch.setattr(tracker._averages, "add", added)
        if native is not None:
            self.monkeypatch.setattr(tracker, "_native", SimpleNamespace(fold=folded))

    def take(self, tracker, n, ran):
        """The step's values of the matrices whose layer ``ran``, each standing for n steps."""
        assert bool(self.given) == (n > 0)
        matrices = [(p, k) for (p, _), k in zip(tracker.matrices, tracker.keys, strict=True)]
        for kind in self.kinds if n else ():
            numbers, there = self.given[kind]
            numbers = iter(() if numbers is None else numbers.tolist())
            for (path, key), present in zip(matrices, there, strict=True):
                value = next(numbers) if present else None
                if ran(path) and (kind == "act_var" or not self.by_columns or key in self.known):
                    self.mine[kind].setdefault(key, []).append((value, n))
        self.known |= {key for path, key in matrices if n and ran(path)}  # a first sample shows the columns' norms
        self.given.clear()

    def expected(self, tracker, kind, beta):
        sizes = [tracker.layers[p].slices[n] * tracker.layers[p].in_features for p, n in tracker.matrices]
        per = sizes if kind == "grad_abs" else [1] * len(sizes)
        return {k: running_average(self.mine[kind][k], beta) / n for k, n in zip(tracker.keys, per, strict=True)}


@pytest.mark.parametrize("beta", [0.9, None])
@pytest.mark.parametrize("every", [1, 2, 5, "auto"])
@pytest.mark.parametrize("name", FOLLOWED)
def test_every_statistic_is_an_average_over_optimizer_steps(name, every, beta, monkeypatch):
    """With steps that are not finite, layers that do not run, and resumes, one of them under another ``every``."""
    options, m, seconds, state, begin = FOLLOWED[name], model(), [0.0], None, 0
    every = 1 if every == "auto" and options["estimator"] == "exact" else every
    samples = Samples(options, monkeypatch)

    def clock():
        seconds[0] += 1.0 + 0.035 * tracker._step.sampled
        return seconds[0]

    monkeypatch.setattr(sampling.time, "thread_time", clock)
    for stop, interval in ((7, every), (40, every if every == "auto" else 3), (46, every), (60, every)):
        with track(m, ema=beta, every=interval, **options) as tracker:
            if state is not None:
                tracker.load_state_dict(state)
            samples.watch(tracker)
            for step in range(begin, stop):
                bad, second = step % 9 == 4, step % 4 != 1
                loss = (loss_of if second else first_only)(m, data(seed=step, samples=3, tokens=2))
                (loss * (math.nan if bad else 1.0)).backward()
                tracker.step()
                m.zero_grad()
                ran = [path for path in tracker.layers if not bad and (second or path.startswith("0."))]
                samples.take(tracker, sample_of(interval, step), ran.__contains__)
        begin, state = stop, copy.deepcopy(tracker.state_dict())
    for kind in tracker.kinds:
        assert_scores(tracker.scores(kind), samples.expected(tracker, kind, beta), rtol=1e-12)


@pytest.mark.parametrize("beta", [0.9, None])
@pytest.mark.parametrize("every", [2, 5])
def test_matrices_that_are_sampled_differently_average_over_the_same_stretch(every, beta):
    """Gradients that shrink by steps of ten: however often they are sampled, the average is the same."""
    m, scores = model(), []
    for interval in (1, every):
        with track(
            m, estimator="exact", ema=beta, every=interval, statistics=("grad_sq", "fisher", "act_var")
        ) as tracker:
            for step in range(40):
                (loss_of(m, data(seed=step // 10)) * 0.5 ** (step // 10)).backward()
                tracker.step()
                m.zero_grad()
        scores.append({kind: dict(tracker.scores(kind)) for kind in tracker.kinds})
    for kind, expected in scores[0].items():
        assert_scores(scores[1][kind], expected)


def test_covariances_stream_over_steps_and_leave_out_what_is_not_finite():
    m, batches = model(), [data(seed=s, samples=n) for s, n in ((1, 4), (2, 6))]
    seen = {}

    def keep(path):
        def hook(module, args, out):
            x, dys = args[0].detach().flatten(0, 1), seen.setdefault(path, [])
            out.register_hook(lambda g: dys.append((x, g.detach().flatten(0, 1))) or None)

        return hook

    handles = [layer.register_forward_hook(keep(p)) for p, layer in fastlora.nn.linear.adapted_layers(m).items()]
    with track(m, estimator="exact", statistics=("act_cov", "grad_cov", "grad_sq"), ema=None) as tracker:
        for batch in batches:
            loss_of(m, batch).backward()
            tracker.step()
        for handle in handles:
            handle.remove()
        (loss_of(m, batches[0]) * math.nan).backward()
        tracker.step()
        assert tracker.skipped == 1
        state = copy.deepcopy(tracker.state_dict())
    for kind, index in (("act_cov", 0), ("grad_cov", 1)):
        found = tracker.covariances(kind)
        assert list(found) == list(seen)
        for path, pairs in seen.items():
            rows = torch.cat([pair[index] for pair in pairs])
            torch.testing.assert_close(found[path], rows.T @ rows / len(rows), rtol=1e-10, atol=1e-14)
    with track(m, estimator="exact", statistics=("act_cov", "grad_cov", "grad_sq"), ema=None) as again:
        again.load_state_dict(state)
    assert all(torch.equal(a, again.covariances("act_cov")[p]) for p, a in tracker.covariances("act_cov").items())
    with pytest.raises(ValueError, match="kind: expected what is tracked, .*, got 'act_cov'; name it in statistics"):
        with track(m) as plain:
            plain.covariances("act_cov")


def test_loss_scale_is_divided_out_of_grad_cov():
    m, batch = model(dtype=torch.float32), data(dtype=torch.float32)
    scaler, found = torch.amp.GradScaler("cpu", init_scale=1024.0), []
    for use in (False, True):
        with track(m, estimator="exact", statistics=("grad_cov",)) as tracker:
            loss = loss_of(m, batch)
            (scaler.scale(loss) if use else loss).backward()
            tracker.step(scaler=scaler if use else None)
        found.append(tracker.covariances("grad_cov"))
    for path, plain in found[0].items():
        torch.testing.assert_close(found[1][path], plain, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("estimator", ["probe", "exact"])
def test_frozen_factors_are_measured(estimator):
    """A combination of adapters is frozen, and its scores say which of its matrices matter."""
    m, batch = model().requires_grad_(False), data()
    with track(m, estimator=estimator) as tracker:
        loss_of(m, batch).backward()
        tracker.step()
        found = tracker.scores("grad_sq")
    expected = {key: float(G.square().sum()) for key, G in weight_gradients(m, [batch]).items()}
    assert found.keys() == expected.keys() and not any(p.requires_grad for p in m.parameters())
    if estimator == "exact":
        assert_scores(found, expected)
