"""Outputs that their owner changes in place, with and without activation checkpointing, as the base's may be."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import LoraConfig

D = 16
EDITS = {
    "add": lambda y: y.add_(1.0),
    "relu": torch.relu_,
    "rows": lambda y: (y[:, 0].zero_(), y)[1],
    "a view": lambda y: (y.view(y.shape[0], -1).mul_(3.0), y)[1],
}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(D, D) for _ in range(3))

    def forward(self, x, edit):
        q, k = edit(self.q_proj(x)), self.k_proj(x)
        v = edit(self.v_proj(x))
        return q * 1.5 + edit(k).tanh() + v


class One(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, edit):
        return edit(self.layer(x)) * 1.5


KINDS = {
    "attention": (Attention, ["q_proj", "k_proj", "v_proj"], lambda: torch.randn(2, 5, D)),
    "linear": (lambda: One(nn.Linear(D, D)), ["layer"], lambda: torch.randn(2, 5, D)),
    "convolution": (lambda: One(nn.Conv1d(D, D, 3, padding=1)), ["layer"], lambda: torch.randn(2, D, D)),
    "embedding": (lambda: One(nn.Embedding(9, D)), ["layer"], lambda: torch.randint(9, (2, 5))),
}


def result(model, x, edit, way):
    """The output and the gradients of x and of what is trained."""
    model.zero_grad()
    x = x.clone().requires_grad_() if x.is_floating_point() else x
    y = model(x, edit) if way == "plain" else checkpoint(model, x, edit, use_reentrant=way == "reentrant")
    y.sin().sum().backward()
    return [y.detach(), x.grad, *[p.grad for p in model.parameters() if p.requires_grad]]


@pytest.mark.parametrize("way", ["plain", "reentrant", "not reentrant"])
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("kind", KINDS)
def test_as_the_base_allows_it(kind, edit, way):
    build, targets, inputs = KINDS[kind]
    if (kind, way) == ("embedding", "reentrant"):
        pytest.skip("a reentrant checkpoint gives no gradients where no input requires one")
    torch.manual_seed(0)
    model, x = build(), inputs()
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    model = fastlora.inject(model, config).double()
    x = x.double() if x.is_floating_point() else x
    want = result(copy.deepcopy(model), x, lambda y: EDITS[edit](y.clone()), "plain")
    for _ in range(2):
        for got, expected in zip(result(model, x, EDITS[edit], way), want, strict=True):
            torch.testing.assert_close(got, expected)
    fastlora.add_adapter(model, "b", config)
    with fastlora.use_adapters(model, ["default", "b"]):
        result(model, x, EDITS[edit], way)


BLIP = dict(hidden_size=32, intermediate_size=48, projection_dim=32, num_hidden_layers=1, num_attention_heads=2)
BLIP_TEXT = dict(
    BLIP, vocab_size=50, encoder_hidden_size=32, max_position_embeddings=16, hidden_dropout=0.0,
    attention_probs_dropout_prob=0.0, bos_token_id=0, eos_token_id=1, pad_token_id=3, sep_token_id=2,
)  # fmt: skip


@pytest.mark.parametrize("first", ["checkpointing", "inject"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("targets", ["attention", ["word_embeddings"]])
def test_blip_adds_positions_to_what_its_embedding_returns(targets, reentrant, first):
    transformers = pytest.importorskip("transformers")
    vision = dict(BLIP, image_size=16, patch_size=8)
    torch.manual_seed(0)
    model = transformers.BlipModel(transformers.BlipConfig(text_config=BLIP_TEXT, vision_config=vision)).train()
    ids, pixels = torch.randint(4, 50, (2, 7)), torch.randn(2, 3, 16, 16)

    def gradients():
        model.zero_grad()
        model(input_ids=ids, pixel_values=pixels, return_loss=True).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None]

    def enable():
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})

    if first == "checkpointing":
        enable()
    fastlora.inject(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    if first == "inject":
        want = gradients()
        enable()
    else:
        model.gradient_checkpointing_disable()
        want = gradients()
        enable()
    got = gradients()
    assert want and len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)
    fastlora.unload(model)
    embedding = model.text_model.embeddings.word_embeddings
    assert not any(h.__module__.startswith("fastlora") for h in embedding._forward_hooks.values())
