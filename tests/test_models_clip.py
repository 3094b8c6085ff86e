"""CLIP's towers at their real shapes: modules by role, and the stated number of parameters."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

import fastlora
from fastlora.nn.linear import adapted_layers


class ResidualAttentionBlock(nn.Module):
    """The block of OpenAI's CLIP, which open_clip took over."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads)
        parts = [("c_fc", nn.Linear(width, 4 * width)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(4 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(parts))

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


def tower(width=768, layers=12, heads=12):
    return nn.ModuleDict({"resblocks": nn.Sequential(*[ResidualAttentionBlock(width, heads) for _ in range(layers)])})


def vit_b_32():
    clip = pytest.importorskip("open_clip")
    vision = clip.CLIPVisionCfg(layers=12, width=768, head_width=64, patch_size=32, image_size=224)
    text = clip.CLIPTextCfg(context_length=77, vocab_size=49408, width=512, heads=8, layers=12)
    return clip.CLIP(512, vision, text).visual


@pytest.mark.parametrize("make", [tower, vit_b_32])
def test_four_targets_at_rank_16(make):
    with torch.device("meta"):
        model = make()
    targets = ["in_proj", "out_proj", "mlp.c_fc", "mlp.c_proj"]
    fastlora.inject(model, fastlora.LoraConfig(r=16, target_modules=targets))
    summary = fastlora.summary(model)
    assert len(adapted_layers(model)) == 48
    assert summary.modules_by_role == {"attention": 24, "mlp": 24, "other": 0}
    assert summary.adapter_params == 12 * 16 * (768 + 2304 + 2 * 768 + 2 * (768 + 3072)) == 2_359_296
    assert "adapted modules: attention 24, mlp 24" in str(summary)


def test_the_name_of_the_attention_means_both_projections():
    model = fastlora.inject(tower(16, 2, 2), fastlora.LoraConfig(r=2, target_modules=["attn"]))
    names = [f"resblocks.{i}.attn.{part}" for i in range(2) for part in ("in_proj", "out_proj")]
    assert list(adapted_layers(model)) == names
    assert all(layer.ranks() == {"weight": 2} for layer in adapted_layers(model).values())
    fields = dict(r=2, target_modules="attention", exclude_modules=["0.attn"])
    assert list(adapted_layers(fastlora.inject(tower(16, 2, 2), fastlora.LoraConfig(**fields)))) == names[2:]
    fields = dict(r=2, target_modules="attention", rank_pattern={"1.attn": 3, "in_proj[k]": 1})
    rows = fastlora.summary(fastlora.inject(tower(16, 2, 2), fastlora.LoraConfig(**fields))).rows
    assert {row.key.removeprefix("resblocks."): row.rank for row in rows} == {
        "0.attn.in_proj[q]": 2, "0.attn.in_proj[k]": 1, "0.attn.in_proj[v]": 2, "0.attn.out_proj": 2,
        "1.attn.in_proj[q]": 3, "1.attn.in_proj[k]": 3, "1.attn.in_proj[v]": 3, "1.attn.out_proj": 3,
    }  # fmt: skip


def test_every_adapter_gets_a_gradient_and_the_backbone_stays():
    model = tower(16, 2, 2)
    fastlora.inject(model, fastlora.LoraConfig(r=2, target_modules="all-linear"))
    before = {n: p.clone() for n, p in model.named_parameters() if ".lora_" not in n}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model["resblocks"](torch.randn(5, 3, 16)).square().sum().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in trained)
    after = dict(model.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in before.items())
