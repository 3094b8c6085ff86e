"""Numbers that the literature states: counted on models of the real shapes, or shown to be wrong by arithmetic."""

from __future__ import annotations

import pytest
import torch

import fastlora


def deit_base(**fields):
    import timm

    with torch.device("meta"):
        model = timm.create_model("deit_base_patch16_224", num_classes=100)
    return fastlora.inject(model, fastlora.LoraConfig(target_modules="qkv", modules_to_save=["head"], **fields))


def counted_at(ranks):
    """Counts at other ranks: a model without values cannot say whether B is zero, so it is injected afresh."""
    return fastlora.summary(deit_base(rank_pattern=ranks))


@pytest.mark.parametrize("budget, saturated, ours, total, stated", [(100, 6, 4, 129, 198_144), (50, 3, 2, 82, 125_952)])
def test_fc_lora_on_deit_base(budget, saturated, ours, total, stated):
    """36 matrices, floor 1, cap 16: the stated counts overshoot budgets of 100 and 50 ranks and leave the head out."""
    keys = list(fastlora.summary(deit_base()).costs)
    assert len(keys) == 36
    # Scores whose top saturates the cap; the rest spends what is left, one rank at a time where the score is small.
    scores = fastlora.Scores({k: 1.0 - i / 100 for i, k in enumerate(keys)}, "composite_minmax")
    ranks = fastlora.allocate(scores, budget, r_min=1, r_max=16, rule="fc_original")
    counted = counted_at(ranks)
    assert sorted(ranks.values(), reverse=True)[: saturated + 1] == [16] * saturated + [ours]
    assert sum(ranks.values()) == total == saturated * 16 + ours + (36 - saturated - 1)
    assert counted.adapter_params == stated == total * (768 + 768)
    assert counted.head_params == 768 * 100 + 100  # reported apart, not in the stated count
    spent = fastlora.allocate(scores, budget, r_min=1, r_max=16)
    assert sum(spent.values()) == budget and counted_at(spent).adapter_params == budget * 1536


def roberta_base(targets):
    import transformers

    sizes = dict(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, num_labels=2)
    with torch.device("meta"):
        model = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**sizes))
    total = sum(p.numel() for p in model.parameters())
    fastlora.inject(model, fastlora.LoraConfig(r=8, target_modules=targets))
    return fastlora.summary(model), total


def test_fw_lora_on_roberta_base_is_not_two_tenths_of_a_percent():
    targets = ["query", "key", "value", "intermediate.dense", "output.dense"]
    counted, total = roberta_base(targets)
    assert len(counted.rows) == 72 and counted.adapter_params == 1_327_104
    assert sum("attention.output.dense" in row.key for row in counted.rows) == 12  # the suffix takes them along
    assert 100 * counted.adapter_params / total == pytest.approx(1.06, abs=0.005)
    only, _ = roberta_base(["query", "key", "value"])
    assert 100 * only.adapter_params / total == pytest.approx(0.35, abs=0.005)
    assert only.adapter_params / total > 0.002  # even these exceed what is stated


def test_fim_lora_keeps_256_times_fewer_numbers():
    """K = 4096, r = 16: the statistic of B [N, r] against that of the weight [N, K]."""
    K = N = 4096
    layer = fastlora.nn.Linear(K, N, bias=False, r=16, device="meta")
    assert layer.weight.numel() / layer.lora_B["default"].weight.numel() == K / 16 == 256
