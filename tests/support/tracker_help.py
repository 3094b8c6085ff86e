"""Small models whose frozen weights have known gradients, for the tests of statistics."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import fastlora


def track(*args, **kwargs):
    """Every step is sampled unless the test is about sampling: the models here are tiny."""
    return fastlora.track(*args, **{"every": 1, **kwargs})


class Attention(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(d, d), nn.Linear(d, d // 2), nn.Linear(d, d // 2)

    def forward(self, x):
        q, k, v = self.query(x), self.key(x), self.value(x)
        return torch.cat([q[..., : k.shape[-1]] * k.tanh(), v], dim=-1)


class Twice(nn.Module):
    """One projection called twice in a forward."""

    def __init__(self, d):
        super().__init__()
        self.fc1 = nn.Linear(d, d)

    def forward(self, x):
        return self.fc1(self.fc1(x).tanh())


def model(dtype=torch.float64, layer=Attention, d=8, targets=("query", "key", "value"), dropout=0.0, depth=2):
    torch.manual_seed(0)
    m = nn.Sequential(*[layer(d) for _ in range(depth)], nn.Linear(d, 3)).to(dtype)
    config = fastlora.LoraConfig(
        r=2, lora_alpha=4, target_modules=list(targets), init_lora_weights=False, lora_dropout=dropout
    )
    return fastlora.inject(m, config)


def data(dtype=torch.float64, samples=6, tokens=5, d=8, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(samples, tokens, d, generator=g, dtype=dtype), torch.randint(3, (samples,), generator=g)


def loss_of(m, batch):
    x, y = batch
    return nn.functional.cross_entropy(m(x).mean(1), y)


def weight_gradients(m, batches, loss=loss_of):
    """G_W of every matrix by asking autograd for it: the sum over the batches of the gradient of each loss."""
    m = copy.deepcopy(m)
    layers = fastlora.nn.linear.adapted_layers(m)
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    for batch in batches:
        loss(m, batch).backward()
    return {
        fastlora.nn.linear.matrix_key(path, name): layer.weight.grad[layer.slices.rows(name)]
        if layer.weight.grad is not None
        else None
        for path, layer in layers.items()
        for name in layer.slices
    }


def per_sample_gradients(m, batch):
    x, y = batch
    single = [weight_gradients(m, [(x[i : i + 1], y[i : i + 1])]) for i in range(len(y))]
    return {key: torch.stack([g[key] for g in single]) for key in single[0]}


def assert_scores(scores, expected, rtol=1e-9):
    assert list(scores) == list(expected)
    for key in expected:
        assert scores[key] == pytest.approx(float(expected[key]), rel=rtol), key


def accumulated(m, batches, tracker):
    for batch in batches:
        (loss_of(m, batch) / len(batches)).backward()
    tracker.step()


def wide_probe(m, statistics, run, probes=4096, **kwargs):
    with track(m, estimator="probe", probes=probes, ema=None, statistics=statistics, **kwargs) as tracker:
        run(tracker)
    return tracker


def assert_estimates(scores, expected, probes=4096):
    # Rademacher quadratic form: variance of ||Q||²/k is at most 2 ||G||_F^4 / k.
    for key, value in expected.items():
        assert abs(scores[key] / float(value) - 1) < 5 * math.sqrt(2 / probes), key


def assert_scale_divided_out(m, batch, kinds, tracking, steps=1):
    """Scores are the same with and without a loss scale; ``tracking`` makes the tracker."""
    scaler, found = torch.amp.GradScaler("cpu", init_scale=1024.0), []
    for use in (False, True):
        with tracking() as tracker:
            for _ in range(steps):
                loss = loss_of(m, batch)
                (scaler.scale(loss) if use else loss).backward()
                tracker.step(scaler=scaler if use else None)
        m.zero_grad()
        found.append({kind: dict(tracker.scores(kind)) for kind in kinds})
    for kind in kinds:
        assert_scores(found[1][kind], found[0][kind], rtol=1e-5)


def tracked_in_parts(m, stops, tracking):
    """Steps up to each of ``stops``, a new tracker taking up the state of the one before: the last, and its state."""
    state, begin = None, 0
    for end in stops:
        with tracking() as tracker:
            if state is not None:
                tracker.load_state_dict(state)
            for seed in range(begin, end):
                loss_of(m, data(seed=seed)).backward()
                tracker.step()
            state, begin = copy.deepcopy(tracker.state_dict()), end
    return tracker, state


def first_only(m, batch):
    """A loss that skips the second block, as a dropped layer does."""
    x, y = batch
    return nn.functional.cross_entropy(m[2](m[0](x)).mean(1), y)


def running_average(samples, beta):
    """``Σ w f / Σ w`` over optimizer steps in float64: each (f, n) is held for the n steps that it stands for.

    w = β^(steps after it), 1 without β.
    """
    steps = [float(value) for value, n in samples for _ in range(n)]
    weights = [1.0 if beta is None else float(beta) ** (len(steps) - 1 - i) for i in range(len(steps))]
    return math.fsum(w * f for w, f in zip(weights, steps, strict=True)) / math.fsum(weights)
