"""Statistics against the gradients autograd would give; a tracker over steps: sampling, state, warm-up, bad input."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import types
import weakref

import pytest
import torch
from support.tracker_help import (
    Attention,
    Twice,
    accumulated,
    assert_estimates,
    assert_scale_divided_out,
    assert_scores,
    data,
    first_only,
    loss_of,
    model,
    per_sample_gradients,
    track,
    tracked_in_parts,
    weight_gradients,
    wide_probe,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora.tracking.hooks import ForwardHook


@pytest.mark.parametrize("layer,targets", [(Attention, ("query", "key", "value")), (Twice, ("fc1",))])
def test_exact_is_the_gradient_autograd_would_give(layer, targets):
    m, batch = model(layer=layer, targets=targets), data()
    G = weight_gradients(m, [batch])
    with track(m, estimator="exact", ema=None, statistics=("grad_sq", "grad_abs")) as tracker:
        loss_of(m, batch).backward()
        tracker.step()
    assert_scores(tracker.scores("grad_sq"), {k: g.square().sum() for k, g in G.items()})
    assert_scores(tracker.scores("grad_sq", reduce="mean"), {k: g.square().mean() for k, g in G.items()})
    assert_scores(tracker.scores("grad_abs"), {k: g.abs().mean() for k, g in G.items()})


@pytest.mark.parametrize("layer,targets", [(Attention, ("query", "key", "value")), (Twice, ("fc1",))])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_exact_fisher_is_the_mean_square_of_each_samples_own_gradient(layer, targets, reduction):
    m, batch = model(layer=layer, targets=targets), data()
    own = per_sample_gradients(m, batch)

    def loss(m, batch):
        return nn.functional.cross_entropy(m(batch[0]).mean(1), batch[1], reduction=reduction)

    with track(m, estimator="exact", ema=None, statistics=("fisher",), loss_reduction=reduction) as tracker:
        loss(m, batch).backward()
        tracker.step()
    assert_scores(tracker.scores("fisher"), {k: g.square().sum((1, 2)).mean() for k, g in own.items()})


def test_exact_accumulates_before_squaring():
    m, batches = model(), [data(seed=s) for s in (1, 2, 3)]
    G = weight_gradients(m, batches, lambda m, b: loss_of(m, b) / 3)
    with track(m, estimator="exact", ema=None, statistics=("grad_sq", "fisher")) as tracker:
        accumulated(m, batches, tracker)
    assert_scores(tracker.scores("grad_sq"), {k: g.square().sum() for k, g in G.items()})
    own = [per_sample_gradients(m, b) for b in batches]
    expected = {k: torch.cat([o[k] for o in own]).square().sum((1, 2)).mean() for k in G}
    assert_scores(tracker.scores("fisher"), expected)


@pytest.mark.parametrize("layer,targets", [(Attention, ("query", "key", "value")), (Twice, ("fc1",))])
@pytest.mark.parametrize("batches", [1, 3])
def test_probe_estimates_the_norm_of_the_accumulated_gradient(layer, targets, batches):
    m, data_ = model(layer=layer, targets=targets), [data(seed=s) for s in range(batches)]
    G = weight_gradients(m, data_, lambda m, b: loss_of(m, b) / batches)
    tracker = wide_probe(m, ("grad_sq",), lambda t: accumulated(m, data_, t))
    assert_estimates(tracker.scores("grad_sq"), {k: g.square().sum() for k, g in G.items()})


@pytest.mark.parametrize("layer,targets", [(Attention, ("query", "key", "value")), (Twice, ("fc1",))])
def test_probe_fisher_estimates_the_per_sample_mean_square(layer, targets):
    m, batches = model(layer=layer, targets=targets), [data(seed=s) for s in (1, 2)]
    own = [per_sample_gradients(m, b) for b in batches]
    expected = {k: torch.cat([o[k] for o in own]).square().sum((1, 2)).mean() for k in own[0]}
    tracker = wide_probe(m, ("fisher",), lambda t: accumulated(m, batches, t))
    assert_estimates(tracker.scores("fisher"), expected)


def test_probe_is_unbiased_over_steps():
    m, batch = model(), data()
    G = weight_gradients(m, [batch])
    steps, k = 600, 4

    def run(tracker):
        for _ in range(steps):
            loss_of(m, batch).backward()
            tracker.step()

    tracker = wide_probe(m, ("grad_sq",), run, probes=k)
    assert_estimates(tracker.scores("grad_sq"), {key: g.square().sum() for key, g in G.items()}, probes=steps * k)


def test_probe_rows_are_redrawn_each_step_and_depend_on_seed_and_layer_only():
    rows = []
    for seed in (0, 0, 7):
        m = model()
        with track(m, seed=seed) as tracker:
            first = [layer.probes["default"].P.clone() for layer in tracker.layers.values()]
            loss_of(m, data()).backward()
            tracker.step()
            rows.append((first, [layer.probes["default"].P.clone() for layer in tracker.layers.values()]))
    assert all(torch.equal(a, b) for a, b in zip(rows[0][0], rows[1][0], strict=True))
    assert not torch.equal(rows[0][0][0], rows[2][0][0])
    assert not torch.equal(rows[0][0][0], rows[0][1][0])
    first = rows[0][0]
    assert torch.equal(first[0], first[1])  # q and k of one group share x P^T
    assert not torch.equal(first[0], first[3])
    assert set(first[0].unique().tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("estimator", ["probe", "exact"])
def test_checkpointing_counts_once(reentrant, estimator):
    kinds = ("grad_sq", "act_var") if estimator == "probe" else ("grad_sq", "fisher", "act_var")
    found = []
    for wrapped in (False, True):
        m, (x, y) = model(), data()
        x.requires_grad_()  # a reentrant checkpoint needs an input with a gradient
        with track(m, estimator=estimator, ema=None, statistics=kinds) as tracker:
            tracker.micro = 1
            h = x
            for block in m[:-1]:
                h = checkpoint(block, h, use_reentrant=reentrant) if wrapped else block(h)
            nn.functional.cross_entropy(m[-1](h).mean(1), y).backward()
            tracker.step()
        found.append({kind: dict(tracker.scores(kind)) for kind in kinds})
    for kind in kinds:
        assert_scores(found[1][kind], found[0][kind])


def test_forward_without_backward_counts_nothing():
    m, batch = model(), data()
    with track(m, statistics=("grad_sq", "act_var")) as tracker:
        m(batch[0])
        with torch.no_grad():
            m(batch[0])
        loss_of(m, batch).backward()
        tracker.step()
        torch.autograd.grad(loss_of(m, batch), [p for p in m.parameters() if p.requires_grad])
        tracker.step()
    assert tracker._averages.counts["grad_sq"].unique().tolist() == [1.0]
    assert tracker._averages.counts["act_var"].unique().tolist() == [1.0]


def test_act_var_is_the_trace_of_the_output_covariance():
    m, batches = model(), [data(seed=s, samples=n) for s, n in ((1, 4), (2, 6))]
    outputs = {}

    def keep(path):
        return lambda module, args, out: outputs.setdefault(path, []).append(out.detach())

    handles = [layer.register_forward_hook(keep(p)) for p, layer in fastlora.nn.linear.adapted_layers(m).items()]
    with track(m, statistics=("act_var",), ema=None) as tracker:
        accumulated(m, batches, tracker)
    for handle in handles:
        handle.remove()
    expected = {p: torch.cat([o.flatten(0, 1) for o in out]).var(0, unbiased=False).sum() for p, out in outputs.items()}
    assert_scores(tracker.scores("act_var"), expected)


@pytest.mark.parametrize("estimator", ["probe", "exact"])
def test_loss_scale_is_divided_out(estimator):
    m, batch = model(dtype=torch.float32), data(dtype=torch.float32)
    kinds = ("grad_sq", "act_var") if estimator == "probe" else ("grad_sq", "grad_abs", "act_var")
    assert_scale_divided_out(m, batch, kinds, lambda: track(m, estimator=estimator, ema=None, statistics=kinds))


def test_dropout_does_not_bias_the_probes():
    m, batch = model(dropout=0.5), data()
    m.train()
    kept = wide_probe(m, ("grad_sq",), lambda t: (torch.manual_seed(0), loss_of(m, batch).backward(), t.step()))
    torch.manual_seed(0)
    with track(m, estimator="exact", ema=None) as tracker:
        loss_of(m, batch).backward()
        tracker.step()
    assert_estimates(kept.scores("grad_sq"), dict(tracker.scores("grad_sq")))


def test_compiled_model_gives_the_same_statistics():
    batch = data(dtype=torch.float32)
    found = []
    for compiled in (False, True):
        m = model(dtype=torch.float32)
        with track(m, statistics=("grad_sq", "act_var")) as tracker:
            torch._dynamo.reset()
            run = torch.compile(m, backend="aot_eager", fullgraph=True) if compiled else m
            for _ in range(2):
                loss_of(run, batch).backward()
                tracker.step()
        found.append(tracker)
    for kind in ("grad_sq", "act_var"):
        assert_scores(found[1].scores(kind), dict(found[0].scores(kind)), rtol=1e-4)


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


@pytest.mark.parametrize("estimator", ["probe", "exact"])
def test_state_dict_resumes_to_the_same_numbers(estimator):
    def train(tracker, m, steps):
        for i in steps:
            loss_of(m, data(seed=i)).backward()
            tracker.step()

    m = model()
    whole = track(m, estimator=estimator, statistics=("grad_sq", "act_var"), seed=3)
    train(whole, m, range(6))
    whole.close()
    first = track(m, estimator=estimator, statistics=("grad_sq", "act_var"), seed=3)
    train(first, m, range(3))
    state = copy.deepcopy(first.state_dict())
    first.close()
    second = track(m, estimator=estimator, statistics=("grad_sq", "act_var"), seed=99)
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
        with pytest.raises(ValueError, match="state: expected the keys"):
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
        expected += 0.1 * (1 - float(weight)) * float(layer.delta()[layer.slices.rows(name)].square().sum())
    assert tracker.penalty(0.1).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("estimator, compiled", [("probe", False), ("probe", True), ("exact", False)])
def test_sampled_steps_are_the_average_and_are_explained(estimator, compiled):
    m, batches = model(), [data(seed=s) for s in range(7)]
    own = [weight_gradients(m, [b]) for b in batches]
    torch._dynamo.reset()
    run = torch.compile(m, backend="aot_eager", fullgraph=True) if compiled else m
    with track(m, estimator=estimator, probes=512, ema=None, every=3) as tracker:
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
    trackers = [
        tracked_in_parts(m, stops, lambda: track(m, estimator=estimator, every=every))[0] for stops in ((20,), (4, 20))
    ]
    whole, resumed = trackers
    assert torch.equal(whole._averages.counts["grad_sq"], resumed._averages.counts["grad_sq"])
    assert dict(whole.scores("grad_sq")) == dict(resumed.scores("grad_sq"))


def test_a_step_that_is_not_sampled_keeps_no_tensors():
    m = model()
    with track(m, estimator="exact", every=2) as tracker:
        for kept in (True, False):
            loss_of(m, data()).backward()
            assert all(bool(layer.probes["default"].taken) == kept for layer in tracker.layers.values())
            tracker.step()


def test_a_step_that_no_layer_samples_reads_nothing_and_draws_nothing(monkeypatch):
    m, batch, read, drawn = model(), data(), [], []
    with track(m, every=3) as tracker:
        fold, draw = tracker._fold, tracker._sampler.draw
        monkeypatch.setattr(tracker, "_fold", lambda inverse: read.append(tracker.steps) or fold(inverse))
        monkeypatch.setattr(tracker._sampler, "draw", lambda step: drawn.append(step) or draw(step))
        for _ in range(7):
            loss_of(m, batch).backward()
            tracker.step()
        assert tracker.steps == 7
    assert read == [0, 3, 6] and drawn == [3, 6]


BAD = {
    "estimator": ({"estimator": "guess"}, "estimator: expected one of"),
    "probes": ({"probes": 0}, "probes: expected 'auto', or an integer >= 1, got 0"),
    "probes type": ({"probes": 2.5}, "probes: expected 'auto', or an integer >= 1, got 2.5"),
    "ema": ({"ema": 1.0}, "ema: expected None for a mean, or a number >= 0 and < 1"),
    "warmup": ({"warmup": 0}, "warmup: expected None, or a number of steps >= 1"),
    "statistics": ({"statistics": ("grad",)}, "statistics: expected one of"),
    "nothing": ({"statistics": ()}, "statistics: expected at least one"),
    "grad_abs": ({"statistics": ("grad_abs",)}, "'grad_abs' cannot be estimated from ±1 probes; it needs"),
    "probe_kind": ({"probe_kind": "rows"}, "probe_kind: expected one of"),
    "probe_kind of exact": (
        {"probe_kind": "columns", "estimator": "exact"},
        "probe_kind: expected 'rademacher' with estimator='exact', got 'columns'",
    ),
    "signs": ({"probe_kind": "columns", "statistics": ("fisher", "grad_abs")}, "'fisher' has signs that 'grad_abs'"),
    "both": ({"statistics": ("grad_sq", "fisher")}, "one set of probes gives 'grad_sq' or 'fisher'"),
    "reduction": ({"loss_reduction": "max"}, "loss_reduction: expected one of"),
    "every": ({"every": 0}, "every: expected 'auto', or a number of steps >= 1, got 0"),
    "covariance": ({"statistics": ("act_cov",)}, "statistics: 'act_cov' is not estimated from probes; use"),
    "seed": ({"seed": "x"}, "seed: expected an integer"),
}


OF_ANOTHER_TYPE = {"probes type", "seed"}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named_and_nothing_is_attached(name):
    m = model()
    hooks = list(m._forward_pre_hooks)
    kwargs, message = BAD[name]
    kind = TypeError if name in OF_ANOTHER_TYPE else ValueError
    with pytest.raises(kind, match=message.replace("(", r"\(")):
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
        with pytest.raises(
            ValueError,
            match="kind: expected what is tracked, .*, got 'grad_abs'; it needs probe_kind='columns' or estimator=",
        ):
            tracker.scores("grad_abs")


@pytest.mark.parametrize("estimator", ["probe", "exact"])
def test_layers_that_never_ran_are_named_and_the_others_are_there_on_request(estimator):
    m, batch = model(), data()
    expected = weight_gradients(m, [batch], first_only)
    with track(m, estimator=estimator, statistics=("grad_sq", "act_var")) as tracker:
        with pytest.raises(RuntimeError, match="no grad_sq yet for 0.query, .*1.value: run backward and") as error:
            tracker.scores(missing="skip")  # there are no others
        assert "missing='skip'" not in str(error.value)
        first_only(m, batch).backward()
        tracker.step()
    for kind in tracker.kinds:
        said = f"no {kind} yet for 1.query, 1.key, 1.value: run backward and tracker.step(), or take the scores of the "
        with pytest.raises(RuntimeError, match=re.escape(said + "other 3 with missing='skip'")):
            tracker.scores(kind)
        assert list(tracker.scores(kind, missing="skip")) == ["0.query", "0.key", "0.value"]
    found = tracker.scores(missing="skip")
    if estimator == "exact":
        assert_scores(found, {key: expected[key].square().sum() for key in found})
    assert found.costs == {"0.query": 16, "0.key": 12, "0.value": 12}
    assert sum(fastlora.allocate(found, budget=6).values()) == 6
    with pytest.raises(ValueError, match="missing: expected one of"):
        tracker.scores(missing="ignore")


def leads_to_a_module(thing):
    """Whether an object reaches a module through what it holds, classes and functions aside."""
    shared = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)
    seen, todo = set(), [thing]
    while todo:
        thing = todo.pop()
        if isinstance(thing, nn.Module):
            return True
        if id(thing) in seen or isinstance(thing, shared):
            continue
        seen.add(id(thing))
        todo += gc.get_referents(thing)
    return False


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        dict(statistics=("grad_sq", "act_var")),
        dict(statistics=("fisher",)),
        dict(probe_kind="columns", statistics=("grad_sq", "grad_abs")),
        dict(estimator="exact", statistics=("grad_sq", "act_cov")),
    ],
)
def test_a_tracker_that_is_dropped_is_freed_at_once_and_nothing_of_it_holds_a_layer(options, closed):
    m = model()
    gc.collect()
    gc.disable()
    try:
        tracker = track(m, **options)
        for seed in range(2):
            (loss_of(m, data(seed=seed)) + tracker.penalty(0.1 * ("fisher" in tracker.kinds))).backward()
            tracker.apply_penalty()
            tracker.step()
        layer = m[0].query
        held = [layer.probes["default"], *m._forward_pre_hooks.values()]
        assert not any(map(leads_to_a_module, held)) and leads_to_a_module(tracker)
        if closed:
            tracker.close()
            assert not layer.probes
        alive = weakref.ref(tracker)
        del tracker, held
        assert alive() is None
    finally:
        gc.enable()


def test_a_model_whose_tracker_was_not_closed_can_be_tracked_by_its_copies_alone():
    m, batch = model(), data()
    tracker = track(m)
    for copied in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert not any(isinstance(hook, ForwardHook) for hook in copied._forward_pre_hooks.values())
        loss_of(copied, batch).backward()
        assert tracker._step.micro == 0
        with track(copied) as other:
            loss_of(copied, batch).backward()
            other.step()
        assert other.scores()
    loss_of(m, batch).backward()
    assert tracker._step.micro == 1
    tracker.close()
