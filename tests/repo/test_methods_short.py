"""Each published method in under 15 lines of the public API; the README quotes these bodies."""

from __future__ import annotations

import inspect
import itertools
import textwrap

import pytest
import torch
import torch.nn.functional as F
from support import model_zoo as zoo

import fastlora


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def fc_lora(model, loader, validation):
    config = fastlora.LoraConfig(r=4, lora_alpha=8, target_modules="qkv", modules_to_save=["head"])
    model = fastlora.inject(model, config)
    scores = fastlora.calibrate(model, loader, loss_fn, steps=4, method="fc")
    fastlora.set_ranks(model, fastlora.allocate(scores, budget=24, r_min=1, r_max=16))
    optimizer = torch.optim.AdamW(fastlora.param_groups(model))
    for batch in loader:
        loss_fn(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    logits, labels = model(validation[0]).detach(), validation[1]
    temperature = fastlora.training.fit_temperature(logits, labels)
    return fastlora.training.ece(logits, labels), fastlora.training.ece(logits, labels, temperature=temperature)


def fw_lora(model, loader):
    model = fastlora.inject(model, fastlora.LoraConfig(r=4, target_modules="all-linear", modules_to_save=["head"]))
    optimizer = torch.optim.AdamW(fastlora.param_groups(model))
    with fastlora.track(model, warmup=3, every=1) as tracker:
        for batch in loader:
            loss_fn(model, batch).backward()
            tracker.apply_penalty(1e-4, normalize="relative")
            optimizer.step()
            optimizer.zero_grad()
            tracker.step()
    return tracker.scores("grad_sq")


def fim_lora(model, loader):
    model = fastlora.inject(model, fastlora.LoraConfig(r=4, target_modules="all-linear", modules_to_save=["head"]))
    scores = fastlora.calibrate(model, loader, loss_fn, steps=6, method="fim")
    ranks = fastlora.reallocate(model, scores)  # the same total; floor 2, cap twice r
    return ranks, scores.convergence, scores.breakdown()


def deep_lora(model, loader, steps):
    model = fastlora.apply_policy(model, "deep_lora", fastlora.LoraConfig(r=4, lora_alpha=8))
    optimizer = torch.optim.AdamW(fastlora.param_groups(model, lr_lora=5e-4, lr_norm=1e-3, lr_head=1e-3))
    scheduler = fastlora.training.Cosine(optimizer, steps, floor=1e-5, freeze=steps // 3)
    with fastlora.training.Diagnostics(optimizer) as diagnostics:
        for batch in loader:
            loss_fn(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        return diagnostics.epoch()


def clip(model, loader):
    targets = ["in_proj", "out_proj", "c_fc", "c_proj"]
    model = fastlora.inject(model, fastlora.LoraConfig.preset("medium", r=4, target_modules=targets))
    optimizer = torch.optim.AdamW(fastlora.param_groups(model, lr_lora=2e-4))
    for images, texts in loader:
        out = model(images, texts)
        logits = out["logit_scale"] * out["image_features"] @ out["text_features"].T
        F.cross_entropy(logits, torch.arange(len(images))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return fastlora.summary(model)


@pytest.fixture
def batches():
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 3, 16, 16, generator=g), torch.randint(5, (4,), generator=g)) for _ in range(6)]


@pytest.mark.parametrize("method", [fc_lora, fw_lora, fim_lora, deep_lora, clip])
def test_under_fifteen_lines(method):
    body = textwrap.dedent(inspect.getsource(method)).strip().splitlines()[1:]
    assert len(body) < 15


def test_fc_lora(build, batches):
    model = build("timm_vit")
    before, after = fc_lora(model, batches, (torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])))
    assert sum(row.rank for row in fastlora.summary(model).rows) == 24
    assert 0.0 <= before <= 1.0 and 0.0 <= after <= 1.0


def test_fw_lora(build, batches):
    model = build("timm_vit")
    scores = fw_lora(model, batches)
    assert scores.kind == "grad_sq" and len(scores) == len(fastlora.summary(model).rows) == 8
    assert all(value > 0 for value in scores.values())


def test_fim_lora(build, batches):
    ranks, convergence, table = fim_lora(build("timm_vit"), batches)
    assert sum(ranks.values()) == 4 * 8 and min(ranks.values()) >= 2 and max(ranks.values()) <= 8
    assert len(convergence) == 5 and list(table.by_depth) == ["blocks.0", "blocks.1"]


def test_deep_lora(build, batches):
    stream = itertools.islice(itertools.cycle(batches), 9)
    found = deep_lora(build("timm_vit"), stream, 9)
    assert [(name, group.steps) for name, group in found.items()] == [("lora", 6), ("norm", 9), ("head", 9)]


def test_clip():
    g = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(3, 3, 16, 16, generator=g), torch.randint(50, (3, 9), generator=g)) for _ in range(3)]
    model = zoo.build("open_clip").train()
    summary = clip(model, pairs)
    assert summary.modules_by_role == {"attention": 8, "mlp": 8, "other": 0}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == summary.adapter_params
    assert all(bool(b.any()) for n, b in model.named_parameters() if ".lora_B." in n)
