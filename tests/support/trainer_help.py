"""A tiny classifier of text, data for it, and what the tests of the trainers compare."""

from __future__ import annotations

import copy
import dataclasses
import functools

import torch
from torch import nn

import fastlora
from fastlora.nn.linear import adapted_layers

TEXT = dict(
    vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    max_position_embeddings=40, num_labels=3,
)  # fmt: skip


@functools.cache
def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BertForSequenceClassification(BertConfig(**TEXT))


def bert(r=4, targets="qkv", dropout=0.1, **fields) -> nn.Module:
    """The same weights at every call, adapters included."""
    model = copy.deepcopy(_bert())
    if not dropout:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    config = dict(r=r, target_modules=targets, lora_dropout=dropout, modules_to_save=["classifier"])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return fastlora.inject(model, fastlora.LoraConfig(**{**config, **fields}))


def texts(samples=24) -> list[dict]:
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 50, (samples, 9), generator=g)
    labels = torch.randint(3, (samples,), generator=g)
    return [dict(input_ids=t, labels=int(y)) for t, y in zip(tokens, labels, strict=True)]


class Images(nn.Module):
    """A timm model as the trainers want it: labels in, loss out."""

    def __init__(self):
        super().__init__()
        import timm

        sizes = dict(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)
        self.model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **sizes)

    def forward(self, pixel_values, labels=None):
        logits = self.model(pixel_values)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"logits": logits} if loss is None else {"loss": loss, "logits": logits}


def images(samples=24) -> list[dict]:
    g = torch.Generator().manual_seed(1)
    pixels = torch.randn(samples, 3, 16, 16, generator=g)
    labels = torch.randint(5, (samples,), generator=g)
    return [dict(pixel_values=x, labels=int(y)) for x, y in zip(pixels, labels, strict=True)]


def vit(r=4) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = fastlora.LoraConfig(r=r, target_modules="qkv", modules_to_save=["head"], lora_dropout=0.1)
        return fastlora.inject(Images(), config)


def factors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{path}.{f}.{name}": p.detach().clone()
        for path, layer in adapted_layers(model).items()
        for f in ("lora_A", "lora_B")
        for name, p in getattr(layer, f).named_parameters()
    }


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


def shifted(model: nn.Module) -> nn.Module:
    """With other trained weights, so that a resume that loads nothing is seen."""
    with torch.no_grad():
        for parameter in trained_parameters(model):
            parameter.add_(0.5)
    return model


def still(model: nn.Module) -> nn.Module:
    """Without dropout in the adapters."""
    for layer in adapted_layers(model).values():
        layer.adapter_specs = {n: dataclasses.replace(s, dropout=0.0) for n, s in layer.adapter_specs.items()}
    return model


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]
