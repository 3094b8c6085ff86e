"""A tracker over steps: averages, what is left out, sampling, state, warm-up, covariances, bad input."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from tracker_help import (
    assert_estimates,
    assert_scores,
    data,
    loss_of,
    model,
    track,
    tracked_in_parts,
    weight_gradients,
)

import fastlora


def test_statistics_do_not_change_training():
    batch = data(dtype=torch.float32)
    states = []
    for tracked in (False, True):
        m = model(dtype=torch.float32, dropout=0.2)
        optimizer = torch.optim.AdamW(fastlora.param_groups(m))
        torch.manual_seed(3)
        tracker = track(m, statistics=("grad_sq", "act_var")) if tracked else None
        for _ in range(3):
            loss_of(m, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            if tracker:
                tracker.step()
        states.append({k: v.clone() for k, v in m.state_dict().items()})
        if tracker:
            assert not any("probe" in n for n, _ in m.named_parameters())
            tracker.close()
            assert m(batch[0]).shape == (6, 5, 3)
    assert states[0].keys() == states[1].keys()
    for key in states[0]:
        torch.testing.assert_close(states[0][key], states[1][key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("estimator", ["probe", "exact"])
def test_a_step_that_is_not_finite_is_left_out_and_counted(bad, estimator):
    m, batch = model(), data()
    plain = track(m, estimator)
    loss_of(m, batch).backward()
    plain.step()
    plain.close()
    tracker = track(m, estimator)
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
    with track(m, "exact", ema=0.9) as tracker:
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


def first_only(m, batch):
    """A loss that skips the second block, as a dropped layer does."""
    x, y = batch
    return nn.functional.cross_entropy(m[2](m[0](x)).mean(1), y)


@pytest.mark.parametrize("estimator", ["probe", "exact"])
def test_state_dict_resumes_to_the_same_numbers(estimator):
    def train(tracker, m, steps):
        for i in steps:
            loss_of(m, data(seed=i)).backward()
            tracker.step()

    m = model()
    whole = track(m, estimator, statistics=("grad_sq", "act_var"), seed=3)
    train(whole, m, range(6))
    whole.close()
    first = track(m, estimator, statistics=("grad_sq", "act_var"), seed=3)
    train(first, m, range(3))
    state = copy.deepcopy(first.state_dict())
    first.close()
    second = track(m, estimator, statistics=("grad_sq", "act_var"), seed=99)
    second.load_state_dict(state)
    train(second, m, range(3, 6))
    for kind in ("grad_sq", "act_var"):
        assert dict(second.scores(kind)) == dict(whole.scores(kind))
    assert second.steps == 6
    second.close()


def test_state_of_another_model_is_refused_whole():
    a, b = model(), model(depth=1)
    with track(a) as first, track(b) as second:
        loss_of(b, data()).backward()
        second.step()
        before = dict(second.scores("grad_sq"))
        with pytest.raises(ValueError, match="state: keys differ"):
            second.load_state_dict(first.state_dict())
        assert dict(second.scores("grad_sq")) == before


def test_warmup_freezes_importance_and_stops_tracking():
    m, batch = model(dtype=torch.float32), data(dtype=torch.float32)
    tracker = track(m, warmup=2)
    for step in range(4):
        loss = loss_of(m, batch) + tracker.penalty(0.1)
        assert (tracker.penalty(0.1).item() > 0.0) == (step >= 2)
        loss.backward()
        tracker.step()
    assert tracker.steps == 2 and all(not layer.probes for layer in tracker.layers.values())
    importance = tracker.importance / tracker.importance.sum()
    expected = 0.0
    for weight, (path, name) in zip(importance, tracker.matrices, strict=True):
        layer = tracker.layers[path]
        expected += 0.1 * (1 - float(weight)) * float(layer.delta()[layer.slice_rows(name)].square().sum())
    assert tracker.penalty(0.1).item() == pytest.approx(expected, rel=1e-5)


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


def test_covariances_stream_over_steps_and_leave_out_what_is_not_finite():
    m, batches = model(), [data(seed=s, samples=n) for s, n in ((1, 4), (2, 6))]
    seen = {}

    def keep(path):
        def hook(module, args, out):
            x, dys = args[0].detach().flatten(0, 1), seen.setdefault(path, [])
            out.register_hook(lambda g: dys.append((x, g.detach().flatten(0, 1))) or None)

        return hook

    handles = [layer.register_forward_hook(keep(p)) for p, layer in fastlora.nn.linear.adapted_layers(m).items()]
    with track(m, "exact", statistics=("act_cov", "grad_cov", "grad_sq"), ema=None) as tracker:
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
    with track(m, "exact", statistics=("act_cov", "grad_cov", "grad_sq"), ema=None) as again:
        again.load_state_dict(state)
    assert all(torch.equal(a, again.covariances("act_cov")[p]) for p, a in tracker.covariances("act_cov").items())
    with pytest.raises(ValueError, match="kind: 'act_cov' is not tracked, only none; name it in statistics"):
        with track(m) as plain:
            plain.covariances("act_cov")


@pytest.mark.parametrize("estimator, compiled", [("probe", False), ("probe", True), ("exact", False)])
def test_sampled_steps_are_the_average_and_are_explained(estimator, compiled):
    m, batches = model(), [data(seed=s) for s in range(7)]
    own = [weight_gradients(m, [b]) for b in batches]
    run = torch.compile(m, backend="aot_eager", fullgraph=True) if compiled else m
    with track(m, estimator, probes=512, ema=None, every=3) as tracker:
        for batch in batches:
            loss_of(run, batch).backward()
            tracker.step()
        assert "statistics of 'default': every 3 steps, as asked for" in str(fastlora.explain(m))
    # Three samples, each of which stands for three steps.
    assert tracker._averages.counts["grad_sq"].unique().tolist() == [9.0]
    expected = {k: sum(own[i][k].square().sum() for i in (0, 3, 6)) / 3 for k in own[0]}
    assert_estimates(tracker.scores("grad_sq"), expected, probes=512)


@pytest.mark.parametrize("every", [3, "auto"])
@pytest.mark.parametrize("estimator", ["probe", "exact"])
def test_a_resumed_tracker_samples_the_same_steps(estimator, every):
    every = 3 if estimator == "exact" else every
    m = model()
    # In one go, and saved in the middle of an interval.
    trackers = [tracked_in_parts(m, stops, lambda: track(m, estimator, every=every))[0] for stops in ((20,), (4, 20))]
    whole, resumed = trackers
    assert torch.equal(whole._averages.counts["grad_sq"], resumed._averages.counts["grad_sq"])
    assert dict(whole.scores("grad_sq")) == dict(resumed.scores("grad_sq"))


def test_a_step_that_is_not_sampled_keeps_no_tensors():
    m = model()
    with track(m, "exact", every=2) as tracker:
        for kept in (True, False):
            loss_of(m, data()).backward()
            assert all(bool(layer.probes["default"].taken) == kept for layer in tracker.layers.values())
            tracker.step()


def test_a_step_that_no_layer_samples_reads_nothing_and_draws_nothing(monkeypatch):
    m, batch, read, drawn = model(), data(), [], []
    with track(m, every=3) as tracker:
        gather, draw = tracker._gather, tracker._sampler.draw
        monkeypatch.setattr(tracker, "_gather", lambda shared: read.append(tracker.steps) or gather(shared))
        monkeypatch.setattr(tracker._sampler, "draw", lambda step: drawn.append(step) or draw(step))
        for _ in range(7):
            loss_of(m, batch).backward()
            tracker.step()
        assert tracker.steps == 7
    assert read == [0, 3, 6] and drawn == [3, 6]


BAD = {
    "estimator": ({"estimator": "guess"}, "estimator: expected one of"),
    "probes": ({"probes": 0}, "probes: expected 'auto' or a positive integer, got 0"),
    "probes type": ({"probes": 2.5}, "probes: expected 'auto' or a positive integer, got 2.5"),
    "ema": ({"ema": 1.0}, "ema: expected a number in"),
    "warmup": ({"warmup": 0}, "warmup: expected a positive number"),
    "statistics": ({"statistics": ("grad",)}, "statistics: expected one of"),
    "nothing": ({"statistics": ()}, "statistics: expected at least one"),
    "grad_abs": ({"statistics": ("grad_abs",)}, "'grad_abs' cannot be estimated from ±1 probes; it needs"),
    "probe_kind": ({"probe_kind": "rows"}, "probe_kind: expected one of"),
    "probe_kind of exact": ({"probe_kind": "columns", "estimator": "exact"}, "probe_kind: 'columns' is for"),
    "signs": ({"probe_kind": "columns", "statistics": ("fisher", "grad_abs")}, "'fisher' has signs that 'grad_abs'"),
    "both": ({"statistics": ("grad_sq", "fisher")}, "one set of probes gives 'grad_sq' or 'fisher'"),
    "reduction": ({"loss_reduction": "max"}, "loss_reduction: expected one of"),
    "every": ({"every": 0}, "every: expected 'auto' or a positive number of steps, got 0"),
    "covariance": ({"statistics": ("act_cov",)}, "statistics: 'act_cov' is not estimated from probes; use"),
    "seed": ({"seed": "x"}, "seed: expected an integer"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named_and_nothing_is_attached(name):
    m = model()
    hooks = list(m._forward_pre_hooks)
    kwargs, message = BAD[name]
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        track(m, **kwargs)
    assert all(not layer.probes for layer in fastlora.nn.linear.adapted_layers(m).values())
    assert list(m._forward_pre_hooks) == hooks


def test_reading_what_is_not_there_is_an_error():
    m = model()
    with pytest.raises(ValueError, match="model: has no adapters"):
        track(nn.Linear(2, 2))
    with track(m) as tracker:
        with pytest.raises(ValueError, match="is tracked already"):
            track(m)
        with pytest.raises(RuntimeError, match="no grad_sq yet for 0.query"):
            tracker.scores("grad_sq")
        with pytest.raises(ValueError, match="not tracked, only grad_sq; it needs probe_kind='columns' or estimator="):
            tracker.scores("grad_abs")


def test_loss_scale_is_divided_out_of_grad_cov():
    m, batch = model(dtype=torch.float32), data(dtype=torch.float32)
    scaler, found = torch.amp.GradScaler("cpu", init_scale=1024.0), []
    for use in (False, True):
        with track(m, "exact", statistics=("grad_cov",)) as tracker:
            loss = loss_of(m, batch)
            (scaler.scale(loss) if use else loss).backward()
            tracker.step(scaler=scaler if use else None)
        found.append(tracker.covariances("grad_cov"))
    for path, plain in found[0].items():
        torch.testing.assert_close(found[1][path], plain, rtol=1e-4, atol=1e-9)
