"""Ranks from scores on a model, scores by projection and depth, presets."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import config, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bad_input import assert_untouched, state_of

import fastlora
from fastlora.config import PRESETS, LoraConfig
from fastlora.importance.scores import Scores
from fastlora.model.ranks import reallocate


def ranks_of(model):
    return {row.key: row.rank for row in fastlora.summary(model).rows}


class TestReallocate:
    @pytest.fixture
    def model(self, build):
        return fastlora.inject(build("timm_vit"), config(target_modules="qkv"))

    def test_the_total_stays_and_follows_the_scores(self, model):
        scores = fastlora.Scores(dict(zip(ranks_of(model), (1.0, 2.0, 4.0, 8.0, 1e-9, 3.0), strict=True)), "lora_b_var")
        ranks = reallocate(model, scores)
        assert ranks == ranks_of(model) == fastlora.allocate(scores, 24, r_min=2, r_max=8)
        assert sum(ranks.values()) == 24 and min(ranks.values()) == 2 and max(ranks.values()) == 8
        assert all(row.scale == 2.0 for row in fastlora.summary(model).rows)  # alpha / r of before
        assert not any(p.any() for n, p in model.named_parameters() if "lora_B" in n)

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.floats(0, 1e6), min_size=6, max_size=6), st.sampled_from([1, 2, 4]))
    def test_the_published_overspending_cannot_happen(self, values, floor):
        import timm

        with torch.device("meta"):
            sizes = dict(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)
            model = timm.create_model("vit_tiny_patch16_224", **sizes)
        # B on the meta device has no values to be compared with zero.
        fastlora.inject(model, config(target_modules="qkv", init_lora_weights=False))
        keys = list(ranks_of(model))
        model.to_empty(device="cpu")
        ranks = reallocate(model, dict(zip(keys, values, strict=True)), r_min=floor)
        assert sum(ranks.values()) == 24 and all(floor <= r <= 8 for r in ranks.values())

    def test_parameters_caps_and_subsets(self, build):
        model = fastlora.inject(build("bert"), config(target_modules="all-linear", r=32))
        keys = list(ranks_of(model))[:3]
        ranks = reallocate(model, {keys[0]: 5.0, keys[1]: 1.0, keys[2]: 0.0})
        assert ranks == {keys[0]: 32, keys[1]: 32, keys[2]: 32}  # twice the rank is more than the matrices can have
        ranks = reallocate(
            model,
            {keys[0]: 5.0, keys[1]: 1.0},
            6 * 64,
            r_min=1,
            r_max=5,
            unit="params",
            costs=fastlora.summary(model).costs,
        )
        assert ranks == {keys[0]: 5, keys[1]: 1} and ranks_of(model)[keys[2]] == 32

    def test_refusals(self, model, build):
        key = next(iter(ranks_of(model)))
        trained = randomise(copy.deepcopy(model))
        bad = [
            (
                model,
                ({"blocks.0.attn.qkw[q]": 1.0},),
                {},
                r"scores: unknown matrix .*did you mean 'blocks.0.attn.qkv\[q\]'",
            ),
            (model, ({key: 1.0},), {"budget": 1}, "budget = 1 ranks is below the 2"),
            (model, ({key: float("nan")},), {}, "scores.* must be finite"),
            (model, ({},), {}, "scores must not be empty"),
            (model, ({key: 1.0},), {"r_min": 5, "r_max": 4}, "r_min = 5 is larger than r_max = 4"),
            (model, ({key: 1.0},), {"unit": "layers"}, "unit must be one of"),
            (trained, ({key: 1.0},), {}, "has been trained .*reinit=True"),
            (build("timm_vit"), ({key: 1.0},), {}, "model: has no adapters"),
        ]
        for m, args, kwargs, message in bad:
            before = state_of(m)
            with pytest.raises(ValueError, match=message):
                reallocate(m, *args, **kwargs)
            assert_untouched(m, before)
        assert sum(reallocate(trained, dict.fromkeys(ranks_of(trained), 1.0), reinit=True).values()) == 24


class TestBreakdown:
    def test_by_hand(self):
        scores = {"blocks.0.attn.qkv[q]": 1.0, "blocks.0.mlp.fc1": 2.0, "blocks.1.attn.qkv[q]": 5.0, "pooler": 8.0}
        found = Scores(scores, kind="grad_sq").breakdown()
        assert found.by_projection == {"attn.qkv[q]": 3.0, "mlp.fc1": 2.0, "pooler": 8.0}
        assert found.by_depth == {"blocks.0": 1.5, "blocks.1": 5.0, "": 8.0}
        lines = str(found).splitlines()
        assert lines[0].split() == ["block", "attn.qkv[q]", "mlp.fc1", "pooler", "mean"]
        assert lines[2].split() == ["blocks.0", "1", "2", "1.5"] and lines[-1].split() == ["mean", "3", "2", "8", "4"]

    @pytest.mark.parametrize(
        "key, block, projection",
        [
            ("bert.encoder.layer.11.attention.self.query", "bert.encoder.layer.11", "attention.self.query"),
            ("layers.2.blocks.5.attn.qkv[v]", "layers.2.blocks.5", "attn.qkv[v]"),
            ("encoder.block.3.layer.0.SelfAttention.q", "encoder.block.3", "layer.0.SelfAttention.q"),
            ("0.fc1", "0", "fc1"),
            ("layer3.fc1", "", "layer3.fc1"),
        ],
    )
    def test_keys_of_families(self, key, block, projection):
        assert list(Scores({key: 1.0}, kind="grad_sq").breakdown().cells) == [(block, projection)]

    def test_bad_scores(self):
        with pytest.raises(ValueError, match="scores must not be empty"):
            Scores({}, kind="grad_sq").breakdown()
        with pytest.raises(ValueError, match="must be finite"):
            Scores({"a": float("inf")}, kind="grad_sq").breakdown()


class TestPresets:
    @pytest.mark.parametrize(
        "difficulty, r, alpha, matrices",
        [("simple", 8, 16, 4), ("medium", 16, 32, 8), ("complex", 32, 64, 8), ("very_complex", 64, 128, 8)],
    )
    def test_on_a_model(self, difficulty, r, alpha, matrices):
        import timm

        with torch.device("meta"):
            sizes = dict(img_size=16, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=5)
            model = timm.create_model("vit_tiny_patch16_224", **sizes)
        chosen = LoraConfig.preset(difficulty, modules_to_save=["head"])
        assert (chosen.r, chosen.lora_alpha, chosen.modules_to_save) == (r, alpha, ["head"])
        rows = fastlora.summary(fastlora.inject(model, chosen)).rows
        assert len(rows) == matrices and {(row.rank, row.scale) for row in rows} == {(r, 2.0)}

    def test_overrides_and_refusals(self):
        assert LoraConfig.preset("simple", r=4, split_qkv=True).split_qkv is True
        assert LoraConfig.preset("simple", r=4).r == 4
        with pytest.raises(ValueError, match=r"difficulty: expected one of \('simple', .*got 'easy'"):
            LoraConfig.preset("easy")
        with pytest.raises(ValueError, match="r: expected"):
            LoraConfig.preset("simple", r=0)
        assert list(PRESETS) == ["simple", "medium", "complex", "very_complex"]
