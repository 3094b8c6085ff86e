"""What reaches the frozen linears of a real model in training: x and dy of several layers and steps."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastlora
from fastlora.nn.probe_rows import ColumnSampler, refreshes_norms
from fastlora.ops.reference import column_norms

from ..experiment import data as sst2

RANK, BATCH, MAX_TOKENS = 8, 32, 48
STEPS = (1, 9, 25)  # optimiser steps at which tensors are kept: after the first, early, later


class Recorded(NamedTuple):
    """One call of one layer: rows of x [M, K] and dy [M, N], padding included; its columns' norms in the steps before.

    norms [K] are what ``ColumnSampler`` averages: a tracker's at that step.
    """

    layer: str
    step: int
    x: Tensor
    dy: Tensor
    norms: Tensor


def made_up(count: int, seed: int = 0) -> sst2.Sentences:
    """Short judgements on films, where no data set is at hand."""
    chance = random.Random(seed)
    good = ["moving", "funny", "a joy", "clever", "warm and honest", "worth every minute", "beautifully shot"]
    bad = ["dull", "clumsy", "a waste of time", "flat", "painfully slow", "hard to sit through", "badly written"]
    starts = ["the film is", "this one is", "despite its cast the story is", "from start to finish it is", "simply"]
    ends = ["", " , and the music knows it", " , even for its genre", " from a director who should know", " at best"]
    labels = [chance.randrange(2) for _ in range(count)]
    texts = [f"{chance.choice(starts)} {chance.choice((bad, good)[y])}{chance.choice(ends)}" for y in labels]
    return sst2.Sentences(texts, labels)


def sentences(folder: Path | None, count: int) -> tuple[sst2.Sentences, str]:
    """Training sentences and where they are from."""
    if folder is None:
        return made_up(count), "made-up sentences"
    return sst2.draw(sst2.find(folder)[0], count, seed=0), "SST-2"


def _batches(tokenizer: Any, given: sst2.Sentences) -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(given.texts), BATCH):
        texts = given.texts[start : start + BATCH]
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        yield {**tokens, "labels": torch.tensor(given.labels[start : start + BATCH])}


class _Recorder:
    """Forward hooks that keep what passes while ``step`` is one of those wanted, and norms of columns before."""

    def __init__(self, model: nn.Module):
        self.step, self.found = -1, []
        layers = fastlora.nn.linear.adapted_layers(model)
        self.rows = {
            path: ColumnSampler([m.in_features], 1, 0, m.weight.device, ("grad_sq",)) for path, m in layers.items()
        }
        for path, layer in layers.items():
            layer.register_forward_hook(lambda module, args, y, path=path: self._seen(path, args[0], y))

    def _seen(self, path: str, x: Tensor, y: Tensor) -> None:
        if y.requires_grad and (self.step in STEPS or refreshes_norms(self.step)):
            step, rows = self.step, x.detach().flatten(0, -2).clone()
            y.register_hook(lambda dy: self._passed(path, step, rows, dy.flatten(0, -2).clone()))

    def _passed(self, path: str, step: int, x: Tensor, dy: Tensor) -> None:
        own = self.rows[path]
        if step in STEPS:
            self.found.append(Recorded(path, step, x, dy, own.norms[0][0].clone()))
        if refreshes_norms(step):
            own.learn([column_norms(x, [dy])[0]], torch.ones(1, dtype=torch.bool))


def record(model_path: str, folder: Path | None = None) -> tuple[list[Recorded], str]:
    """Tensors of every query, key and value of MiniLM while it learns, and where the sentences are from.

    AdamW on adapters of rank 8 and the head; dropout off, as nothing here is about it.
    """
    from ..experiment.train import load

    given, source = sentences(folder, BATCH * (max(STEPS) + 1))
    model, tokenizer = load(model_path, 0)
    config = fastlora.LoraConfig(r=RANK, lora_alpha=16, target_modules="qkv", modules_to_save=["classifier"])
    model = fastlora.inject(model, config).eval()
    recorder = _Recorder(model)
    optimizer = torch.optim.AdamW(fastlora.param_groups(model))
    for step, batch in enumerate(_batches(tokenizer, given)):
        recorder.step = step
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return recorder.found, source
