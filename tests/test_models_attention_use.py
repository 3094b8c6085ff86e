"""Statistics and batches of several adapters in attention modules, whose inputs may differ for q, k and v."""

from __future__ import annotations

import copy

import pytest
import torch
from attention_help import E, arguments, pair, run
from helpers import config, randomise

import fastlora


class TestStatisticsOfCrossAttention:
    """q sees other rows than k and v, and the stacked matrix is one layer."""

    @pytest.mark.parametrize("target", ["qkv", ["in_proj"]])
    @pytest.mark.parametrize("which", ["cross", "apart"])
    def test_exact_and_probed(self, target, which):
        base, model = pair(target)
        call = run(which, False, need_weights=False)
        full = copy.deepcopy(model).double()
        full.attn.in_proj_weight.requires_grad_(True)
        call(full).square().sum().backward()
        gradient = full.attn.in_proj_weight.grad
        query, key, value = arguments(which, False, torch.float64)
        weights = [full.attn.in_proj_weight.detach() + full.attn.in_proj.delta()][0].chunk(3)
        projected = [(x @ w.T).reshape(-1, E) for x, w in zip((query, key, value), weights, strict=True)]
        spread = [p.var(dim=0, correction=0).sum().item() for p in projected]
        expected = [g.square().sum().item() for g in gradient.chunk(3)]
        if target == ["in_proj"]:
            spread, expected = [sum(spread)], [sum(expected)]
        with fastlora.track(model, estimator="exact", statistics=("grad_sq", "act_var")) as tracker:
            call(model).square().sum().backward()
            tracker.step()
        assert list(tracker.scores("grad_sq").values()) == pytest.approx(expected, rel=1e-4)
        assert list(tracker.scores("act_var").values()) == pytest.approx(spread, rel=1e-4)
        with fastlora.track(model, probes=8, ema=None, every=1, statistics=("grad_sq", "act_var")) as tracker:
            for _ in range(300):
                call(model).square().sum().backward()
                tracker.step()
        assert list(tracker.scores("grad_sq").values()) == pytest.approx(expected, rel=0.25)
        assert list(tracker.scores("act_var").values()) == pytest.approx(spread, rel=1e-4)

    @pytest.mark.parametrize("which", ["self", "cross"])
    def test_samples_are_told_apart_also_where_positions_come_first(self, which):
        for batch_first in (False, True):
            _, model = pair("qkv", batch_first=batch_first)
            call = run(which, batch_first, need_weights=False)
            with fastlora.track(model, estimator="exact", statistics=("fisher",), loss_reduction="sum") as tracker:
                call(model).square().sum().backward()
                tracker.step()
            args = arguments(which, batch_first, torch.float32)
            total = torch.zeros(3)
            for i in range(3):
                own = [a[i : i + 1] if batch_first else a[:, i : i + 1] for a in args]
                own = [own[0]] * 3 if which == "self" else [own[0], own[1], own[1]]
                single = copy.deepcopy(model)
                single.attn.in_proj_weight.requires_grad_(True)
                single(*own, need_weights=False)[0].square().sum().backward()
                total += torch.stack([g.square().sum() for g in single.attn.in_proj_weight.grad.chunk(3)]) / 3
            assert list(tracker.scores("fisher").values()) == pytest.approx(total.tolist(), rel=1e-4)


def test_a_batch_of_several_adapters():
    """Every sample with its own adapter equals the samples apart, also where positions come first."""
    for which in ("self", "cross"):
        for batch_first in (False, True):
            _, model = pair(batch_first=batch_first)
            fastlora.add_adapter(model, "b", config(target_modules="attention", r=2))
            randomise(model, 0.3)
            args = arguments(which, batch_first, torch.float32)
            with fastlora.use_adapters(model, ["default", "b", None]):
                together, _ = model(*args)
            for i, name in enumerate(["default", "b", None]):
                own = [a[i : i + 1] if batch_first else a[:, i : i + 1] for a in args]
                own = [own[0]] * 3 if which == "self" else [own[0], own[1], own[1]]
                with fastlora.use_adapters(model, [name]):
                    alone, _ = model(*own)
                mine = together[i : i + 1] if batch_first else together[:, i : i + 1]
                torch.testing.assert_close(mine, alone, rtol=1e-5, atol=1e-5)


def test_an_adapter_whose_targets_had_none_before():
    base, model = pair(["out_proj"])
    fastlora.add_adapter(model, "b", config(target_modules="qkv", r=2))
    call = run("cross", False)
    y = call(model)
    randomise(model, 0.3)
    with fastlora.use_adapters(model, "b"):
        assert not torch.allclose(call(model), call(base))
        assert list(fastlora.summary(model, "b").costs) == [f"attn.in_proj[{part}]" for part in "qkv"]
    assert y.shape == call(model).shape and not model.attn.in_proj_weight.requires_grad
