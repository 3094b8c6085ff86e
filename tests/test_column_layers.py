"""Columns of x in layers of several adapters and of several inputs, and over many steps."""

from __future__ import annotations

import pytest
import torch
from column_help import columns, every_draw
from torch import nn
from tracker_help import assert_scores, data, loss_of, model, track, weight_gradients

import fastlora


def test_an_adapter_of_a_mixed_batch_is_measured_on_its_own_rows():
    m = model()
    fastlora.add_adapter(m, "b", fastlora.LoraConfig(r=1, target_modules=["query", "value"], init_lora_weights=False))
    x, y = data()
    for ids in (torch.tensor([1, 0, 1, -1, 1, 0]), torch.tensor([0, 1, -1, 1, 0, 1]).repeat_interleave(5).view(6, 5)):
        mine = ids == 1

        def loss(m, ids=ids, mine=mine):
            with fastlora.use_adapters(m, ids):
                logits = m(x)
            each = nn.functional.cross_entropy(logits.flatten(0, 1), y.repeat_interleave(5), reduction="none")
            return (each.view(6, 5) * (mine if ids.dim() == 2 else mine[:, None])).sum()

        with fastlora.track(m, "exact", ema=None, adapter="b", statistics=("grad_sq",)) as exact:
            loss(m).backward()
            exact.step()
        with columns(m, ("grad_sq",), adapter="b", probes=1) as tracker:
            loss(m).backward()
            tracker.step()
            found = every_draw(tracker, lambda loss=loss: loss(m).backward(), ("grad_sq",))
        assert_scores(found["grad_sq"], dict(exact.scores("grad_sq")))


def test_an_adapter_that_is_absent_neither_learns_nor_counts():
    m = model()
    fastlora.add_adapter(m, "b", fastlora.LoraConfig(r=1, target_modules=["query"], init_lora_weights=False))
    with columns(m, ("grad_sq",), adapter="b") as tracker:
        for _ in range(2):
            with fastlora.use_adapters(m, torch.tensor([0, 0, -1, 0, 0, 0])):
                loss_of(m, data()).backward()
            tracker.step()
    assert tracker._sampler.counts.tolist() == [0, 0] and tracker._averages.counts["grad_sq"].tolist() == [0.0, 0.0]


class Cross(nn.Module):
    """Query, key and value of one stacked matrix; the query sees other rows."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x, other):
        return self.attn(x, other, other, need_weights=False)[0]


@pytest.mark.parametrize("target", ["qkv", ["in_proj"]])
def test_parts_of_a_layer_that_see_other_rows(target):
    torch.manual_seed(0)
    m = Cross().double()
    fastlora.inject(m, fastlora.LoraConfig(r=2, target_modules=target, init_lora_weights=False))
    x, other = data()[0], data(seed=2, tokens=7)[0]

    def run():
        m(x, other).square().sum().backward()

    kinds = ("grad_sq", "grad_abs", "act_var")
    with columns(m, kinds, probes=1) as tracker:
        run()
        tracker.step()
        found = every_draw(tracker, run)
    with track(m, "exact", ema=None, statistics=kinds) as exact:
        run()
        exact.step()
    assert_scores(found["grad_sq"], dict(exact.scores("grad_sq")))
    assert dict(tracker.scores("act_var")) == pytest.approx(dict(exact.scores("act_var")))


def test_scores_over_many_steps_are_as_near_as_the_draws_allow():
    m, batch, steps, k = model(), data(), 400, 3
    G = weight_gradients(m, [batch])
    with columns(m, ("grad_sq", "grad_abs"), probes=k) as tracker:
        for _ in range(steps + 1):
            loss_of(m, batch).backward()
            tracker.step()
            m.zero_grad()
    shares = tracker._sampler._shares[0][0].double()
    p = shares / shares.sum(1, keepdim=True)
    for kind, power, size in (("grad_sq", 2, 1), ("grad_abs", 1, None)):
        found = tracker.scores(kind)
        for i, (key, g) in enumerate(G.items()):
            each = g.abs().pow(power).sum(0)  # by column; one draw is each / p
            expected = each.sum()
            spread = ((each.square() / p[i]).sum() / expected.square() - 1).clamp(min=0).sqrt() / (steps * k) ** 0.5
            off = found[key] * (size or g.numel()) / expected - 1
            assert abs(float(off)) < 5 * float(spread) + 1e-9, (kind, key)
