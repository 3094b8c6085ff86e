"""FW-LoRA's penalty through a tracker: autograd and the gradient by hand, forms, weights, absent adapters."""

from __future__ import annotations

import itertools

import pytest
import torch
from tracker_help import data, loss_of, model, track

import fastlora

OPTIONS = list(itertools.product(("delta", "decay"), ("sum", "relative", "uniform")))


def tracked(m, batches, **kwargs):
    tracker = track(m, "exact", ema=None, **kwargs)
    for batch in batches:
        loss_of(m, batch).backward()
        tracker.step()
    m.zero_grad()
    return tracker


def expected_penalty(tracker, lmbda, form, normalise):
    """The definition in plain torch, matrix by matrix."""
    F = torch.tensor(list(tracker.scores("grad_sq").values()), dtype=torch.float64)
    shares = {"sum": F / F.sum(), "relative": F / F.max(), "uniform": torch.full_like(F, 1 / len(F))}[normalise]
    total = 0.0
    for share, (path, name) in zip(shares.tolist(), tracker.matrices, strict=True):
        layer = tracker.layers[path]
        a, b, s = layer.pairs()[list(layer.slices).index(name)]
        if form == "delta":
            total = total + lmbda * (1 - share) * (s * b @ a).square().sum()
        else:
            total = total + lmbda / 2 * (1 - share) * (a.square().sum() + b.square().sum())
    return total


def gradients(m):
    return [p.grad.clone() for p in m.parameters() if p.requires_grad and p.grad is not None]


@pytest.mark.parametrize("form, normalise", OPTIONS)
def test_value_and_gradient_by_hand(form, normalise):
    m = model()
    with tracked(m, [data(seed=s) for s in range(3)]) as tracker:
        expected = expected_penalty(tracker, 0.1, form, normalise)
        value = tracker.penalty(0.1, form, normalise)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
        (loss_of(m, data()) + value).backward()
        by_autograd = gradients(m)
        m.zero_grad()
        loss_of(m, data()).backward()
        before = [p.grad for p in m.parameters() if p.grad is not None]
        tracker.apply_penalty(0.1, form, normalise)
        assert all(p.grad is g for p, g in zip([p for p in m.parameters() if p.grad is not None], before, strict=True))
        for mine, other in zip(gradients(m), by_autograd, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-14)
        assert not torch.equal(by_autograd[0], torch.zeros_like(by_autograd[0]))


def test_the_weights_differ_between_the_forms():
    m = model()
    with tracked(m, [data()]) as tracker:
        values = {options: tracker.penalty(1.0, *options).item() for options in OPTIONS}
    assert len({round(value, 9) for value in values.values()}) == len(OPTIONS)


def test_gradients_are_created_where_there_are_none():
    m = model()
    with tracked(m, [data()]) as tracker:
        m.zero_grad(set_to_none=True)
        tracker.apply_penalty(0.1)
        mine = gradients(m)
        m.zero_grad(set_to_none=True)
        tracker.penalty(0.1).backward()
        for a, b in zip(mine, gradients(m), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)
        assert mine and all(not p.grad._is_view() for p in m.parameters() if p.grad is not None)


def test_matrices_without_an_adapter_and_frozen_factors_are_skipped():
    m = model()
    first = next(iter(fastlora.summary(m).costs))
    fastlora.set_ranks(m, {first: 0})
    with tracked(m, [data()]) as tracker:
        frozen = m[1].value.lora_A["default"].weight.requires_grad_(False)
        expected = expected_penalty(tracker, 0.1, "delta", "sum")
        torch.testing.assert_close(tracker.penalty(0.1), expected, rtol=1e-12, atol=0)
        tracker.apply_penalty(0.1)
        assert frozen.grad is None and m[1].value.lora_B["default"].weight.grad is not None
        fastlora.set_ranks(m, dict.fromkeys(tracker.keys, 0), reinit=True)
        tracker.apply_penalty(0.1)
        assert tracker.penalty(0.1).item() == 0.0


def test_nothing_is_added_before_importance_is_frozen():
    m = model()
    tracker = track(m, warmup=2)
    for step in range(3):
        tracker.apply_penalty(1.0)
        assert all(p.grad is None for p in m.parameters()) == (step < 2)
        assert (tracker.penalty(1.0).item() > 0) == (step == 2)
        m.zero_grad(set_to_none=True)
        loss_of(m, data(seed=step)).backward()
        tracker.step()
        m.zero_grad(set_to_none=True)


@pytest.mark.parametrize("call", ["penalty", "apply_penalty"])
@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        ({"form": "l1"}, ValueError, "form must be 'delta' or 'decay', got 'l1'"),
        ({"normalise": "max"}, ValueError, "normalise must be 'sum', 'relative' or 'uniform', got 'max'"),
        ({"lmbda": float("nan")}, ValueError, "lmbda must be finite"),
        ({"lmbda": "1"}, TypeError, "lmbda must be a number"),
        ({"adapter": "b"}, ValueError, "adapter: no tracked layer has an adapter 'b', only default"),
    ],
)
def test_bad_arguments_are_named_before_anything_changes(call, kwargs, error, message):
    m = model()
    with track(m, warmup=5) as tracker:  # importance is not there yet: the argument is refused all the same
        with pytest.raises(error, match=message):
            getattr(tracker, call)(**kwargs)
    assert all(p.grad is None for p in m.parameters())
