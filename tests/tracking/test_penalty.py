"""FW-LoRA's penalty through a tracker: autograd and the gradient by hand, forms, weights, absent adapters."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tracker_help import data, loss_of, model, track

import fastlora
from fastlora.ops import multi_tensor, native

OPTIONS = list(itertools.product(("delta", "decay"), ("sum", "relative", "uniform")))


def tracked(m, batches, **kwargs):
    tracker = track(m, estimator="exact", ema=None, **kwargs)
    for batch in batches:
        loss_of(m, batch).backward()
        tracker.step()
    m.zero_grad()
    return tracker


def expected_penalty(tracker, weight, form, normalize):
    """The definition in plain torch, matrix by matrix."""
    F = torch.tensor(list(tracker.scores("grad_sq").values()), dtype=torch.float64)
    shares = {"sum": F / F.sum(), "relative": F / F.max(), "uniform": torch.full_like(F, 1 / len(F))}[normalize]
    total = 0.0
    for share, (path, name) in zip(shares.tolist(), tracker.matrices, strict=True):
        layer = tracker.layers[path]
        a, b, s = layer.pairs()[list(layer.slices).index(name)]
        if form == "delta":
            total = total + weight * (1 - share) * (s * b @ a).square().sum()
        else:
            total = total + weight / 2 * (1 - share) * (a.square().sum() + b.square().sum())
    return total


def gradients(m):
    return [p.grad.clone() for p in m.parameters() if p.requires_grad and p.grad is not None]


@pytest.mark.parametrize("form, normalize", OPTIONS)
def test_value_and_gradient_by_hand(form, normalize):
    m = model()
    with tracked(m, [data(seed=s) for s in range(3)]) as tracker:
        expected = expected_penalty(tracker, 0.1, form, normalize)
        value = tracker.penalty(0.1, form=form, normalize=normalize)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
        (loss_of(m, data()) + value).backward()
        by_autograd = gradients(m)
        m.zero_grad()
        loss_of(m, data()).backward()
        before = [p.grad for p in m.parameters() if p.grad is not None]
        tracker.apply_penalty(0.1, form=form, normalize=normalize)
        assert all(p.grad is g for p, g in zip([p for p in m.parameters() if p.grad is not None], before, strict=True))
        for mine, other in zip(gradients(m), by_autograd, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-14)
        assert not torch.equal(by_autograd[0], torch.zeros_like(by_autograd[0]))


def test_the_weights_differ_between_the_forms():
    m = model()
    with tracked(m, [data()]) as tracker:
        values = {(form, n): tracker.penalty(1.0, form=form, normalize=n).item() for form, n in OPTIONS}
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
        ({"form": "l1"}, ValueError, "form: expected one of .'delta', 'decay'., got 'l1'"),
        ({"normalize": "max"}, ValueError, "normalize: expected one of .'sum', 'relative', 'uniform'., got 'max'"),
        ({"weight": float("nan")}, ValueError, "weight: expected a finite number"),
        ({"weight": "1"}, TypeError, "weight: expected a finite number"),
        ({"adapter": "b"}, ValueError, r"adapter: expected one of \['default'\], got 'b'"),
    ],
)
def test_bad_arguments_are_named_before_anything_changes(call, kwargs, error, message):
    m = model()
    with track(m, warmup=5) as tracker:  # importance is not there yet: the argument is refused all the same
        with pytest.raises(error, match=message):
            getattr(tracker, call)(**kwargs)
    assert all(p.grad is None for p in m.parameters())


@pytest.fixture
def launches(monkeypatch) -> Counter:
    """Calls of the native multi-tensor operators by name."""
    found = Counter()

    def counted(name: str, operator: Any) -> Callable:
        def call(*args):
            found[name] += 1
            return operator(*args)

        return call

    for name in ("penalty", "penalty_grad_", "squared_norms"):
        monkeypatch.setattr(torch.ops.fastlora, name, counted(name, getattr(torch.ops.fastlora, name)))
    return found


def gradients_of(m, add):
    m.zero_grad(set_to_none=True)
    add()
    return gradients(m)


needs_native = pytest.mark.skipif(not native.available(), reason="the native library is not there")


@needs_native
@pytest.mark.parametrize("normalize", ["sum", "relative", "uniform"])
def test_all_matrices_in_one_launch(launches, normalize):
    """Value, backward and gradient by hand each: the numbers of the formula, four times its own error at most."""
    m, exact = model(torch.float32), model(torch.float64)
    exact.load_state_dict(m.state_dict())
    with tracked(m, [data(torch.float32)]) as tracker, tracked(exact, [data()]) as wide:
        assert fastlora.explain(m).penalty == {"default": ("native", "")}
        assert fastlora.explain(exact).penalty["default"][0] == "formula"
        wide.importance = tracker._weighing()[0].double()  # the same weights in both
        mine = gradients_of(m, lambda: tracker.penalty(0.1, normalize=normalize).backward())
        by_hand = gradients_of(m, lambda: tracker.apply_penalty(0.1, normalize=normalize))
        assert launches == {"penalty": 1, "penalty_grad_": 2}
        value = tracker.penalty(0.1, normalize=normalize)
        for layer in tracker.layers.values():
            layer.backend = "reference"
        assert fastlora.explain(m).penalty == {"default": ("formula", "backend 'reference' was asked for")}
        formula = gradients_of(m, lambda: tracker.apply_penalty(0.1, normalize=normalize))
        assert launches == {"penalty": 2, "penalty_grad_": 2}
        truth = gradients_of(exact, lambda: wide.apply_penalty(0.1, normalize=normalize))
        torch.testing.assert_close(value.double(), wide.penalty(0.1, normalize=normalize), rtol=1e-6, atol=0)
        assert len(truth) == len(mine) == len(by_hand)
        for a, b, f, t in zip(mine, by_hand, formula, truth, strict=True):
            allowed = 4 * (f - t).abs().max() + torch.finfo(torch.float32).eps * t.abs().max()
            assert (a - t).abs().max() <= allowed and (b - t).abs().max() <= allowed


@needs_native
def test_the_native_penalty_leaves_frozen_factors_out_and_can_be_differentiated_again(launches):
    m = model(torch.float32)
    with tracked(m, [data(torch.float32)]) as tracker:
        frozen = m[1].value.lora_A["default"].weight.requires_grad_(False)
        by_hand = gradients_of(m, lambda: tracker.apply_penalty(0.1))
        assert frozen.grad is None
        by_autograd = gradients_of(m, lambda: tracker.penalty(0.1).backward())
        assert frozen.grad is None and launches["penalty_grad_"] == 2
        a = m[0].query.lora_A["default"].weight
        (again,) = torch.autograd.grad(tracker.penalty(0.1), a, create_graph=True)
        (second,) = torch.autograd.grad(again.square().sum(), a)
        assert second.abs().max() > 0
        m.zero_grad(set_to_none=True)
        (2.0 * tracker.penalty(0.1)).backward()
        # One operator on the same operands, and a power of two: no rounding differs.
        for one, other, twice in zip(by_hand, by_autograd, gradients(m), strict=True):
            assert torch.equal(one, other) and torch.equal(twice, 2 * one)


@needs_native
def test_a_step_without_the_node_reduces_all_weights_in_one_launch(launches, monkeypatch):
    m = model(torch.float32)
    with track(m) as tracker:
        monkeypatch.setattr(tracker, "_native", None)
        loss_of(m, data(torch.float32)).backward()
        grads = [tracker.layers[path].probes[tracker.adapter].Z[name].grad.double() for path, name in tracker.matrices]
        expected = [g.square().sum().item() / tracker.probes for g in grads]
        tracker.step()
        assert list(tracker.scores("grad_sq").values()) == pytest.approx(expected, rel=1e-6)
        assert launches == {"squared_norms": 1}


@needs_native
@pytest.mark.parametrize(
    "tensors, why",
    [
        ([torch.zeros(2, 2), torch.zeros(2, 2, device="meta")], "one launch takes one device, .* cpu and meta"),
        ([torch.zeros(2, 2, dtype=torch.float64)], "take float32, bfloat16, float16, not float64"),
        ([torch.zeros(2, 2, device="meta")], "no kernel for meta"),
        ([torch.zeros(2, 2).as_subclass(type("Sharded", (torch.Tensor,), {}))], "plain tensors, not Sharded"),
    ],
)
def test_what_the_native_operators_do_not_take_is_said(tensors, why):
    assert re.search(why, multi_tensor.unsupported_reason("penalty_grad_", tensors))


class Halved(torch.nn.Module):
    def forward(self, factor):
        return 0.5 * factor


def test_parametrized_factors_are_penalised_through_what_they_are_made_of():
    m = model()
    torch.nn.utils.parametrize.register_parametrization(m[0].query.lora_B["default"], "weight", Halved())
    with tracked(m, [data()]) as tracker:
        loss = tracker.penalty(0.1)
        assert loss.item() == pytest.approx(expected_penalty(tracker, 0.1, "delta", "sum").item())
        loss.backward()
        assert m[0].query.lora_B["default"].parametrizations.weight.original.grad.abs().sum() > 0
        m.zero_grad()
        with pytest.raises(ValueError, match="'default' are parametrized or pruned .* add tracker.penalty\\(\\) to"):
            tracker.apply_penalty(0.1)
        assert gradients(m) == []
