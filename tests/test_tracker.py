"""Statistics against the gradients autograd would give, and what they count."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from tracker_help import (
    Attention,
    Twice,
    accumulated,
    assert_estimates,
    assert_scale_divided_out,
    assert_scores,
    data,
    loss_of,
    model,
    per_sample_gradients,
    track,
    weight_gradients,
    wide_probe,
)

import fastlora


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
            run = torch.compile(m, backend="aot_eager", fullgraph=True) if compiled else m
            for _ in range(2):
                loss_of(run, batch).backward()
                tracker.step()
        found.append(tracker)
    for kind in ("grad_sq", "act_var"):
        assert_scores(found[1].scores(kind), dict(found[0].scores(kind)), rtol=1e-4)
