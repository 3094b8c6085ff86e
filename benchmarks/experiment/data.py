"""SST-2 and CoLA from tab-separated files, as batches of token ids."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

Batch = dict[str, Tensor]


class Sentences(NamedTuple):
    """Texts with labels 0 and 1."""

    texts: list[str]
    labels: list[int]


# header -> columns of the sentence and of its label
HEADERS = {("sentence", "label"): (0, 1), ("source", "label", "mark", "sentence"): (3, 1)}
FILES = {"sst2": ("train.tsv", "dev.tsv"), "cola": ("in_domain_train.tsv", "in_domain_dev.tsv")}


def read(path: Path) -> Sentences:
    """A file with a header of ``HEADERS``; ``ValueError`` names the file and line that is something else."""
    texts, labels = [], []
    with path.open(encoding="utf-8") as lines:
        header = tuple(next(lines, "").rstrip("\n").split("\t"))
        if header not in HEADERS:
            known = " or ".join("<TAB>".join(names) for names in HEADERS)
            raise ValueError(f"{path}: expected the header {known}, got {list(header)}")
        text, label = HEADERS[header]
        for number, line in enumerate(lines, start=2):
            fields = line.rstrip("\n").split("\t")
            if len(fields) != len(header) or fields[label] not in ("0", "1"):
                raise ValueError(f"{path}:{number}: expected {', '.join(header)} with a label 0 or 1, got {line!r}")
            texts.append(fields[text])
            labels.append(int(fields[label]))
    return Sentences(texts, labels)


def find(folder: Path, name: str = "sst2") -> tuple[Sentences, Sentences]:
    """(train, dev) of a data set of ``FILES`` in a folder, or in its subfolder of that name."""
    base = folder / name if (folder / name).is_dir() else folder
    for file in FILES[name]:
        if not (base / file).is_file():
            raise ValueError(f"--data-dir: expected {file} in {base}")
    train, dev = (read(base / file) for file in FILES[name])
    return train, dev


def draw(sentences: Sentences, count: int, seed: int) -> Sentences:
    """``count`` of them in random order, each as often as any other or once more; by the seed alone."""
    if count < 1:
        raise ValueError(f"--sentences: expected a number >= 1, got {count}")
    chance, size = torch.Generator().manual_seed(seed), len(sentences.texts)
    epochs = [torch.randperm(size, generator=chance) for _ in range(-(-count // size))]
    chosen = torch.cat(epochs)[:count].tolist()
    return Sentences([sentences.texts[i] for i in chosen], [sentences.labels[i] for i in chosen])


def lengths_of(sentences: Sentences, tokenizer: Any, max_tokens: int) -> list[int]:
    """Tokens of each sentence."""
    return list(map(len, tokenizer(sentences.texts, truncation=True, max_length=max_tokens)["input_ids"]))


def by_length(sentences: Sentences, lengths: list[int], size: int, seed: int) -> Sentences:
    """The same sentences in batches of similar length, batches in random order: most of the padding goes.

    Sorted within pools of 50 batches, so that what a batch holds still depends on chance.
    """
    order: list[list[int]] = []
    for start in range(0, len(lengths), 50 * size):
        pool = sorted(range(start, min(start + 50 * size, len(lengths))), key=lengths.__getitem__)
        order += [pool[i : i + size] for i in range(0, len(pool), size)]
    whole = [batch for batch in order if len(batch) == size]
    turns = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [i for turn in turns for i in whole[turn]] + [i for batch in order if len(batch) < size for i in batch]
    return Sentences([sentences.texts[i] for i in chosen], [sentences.labels[i] for i in chosen])


def batches(sentences: Sentences, tokenizer: Any, size: int, max_tokens: int, drop_last: bool) -> Iterator[Batch]:
    """Batches in order, padded to their longest sentence."""
    stop = len(sentences.texts) // size * size if drop_last else len(sentences.texts)
    for start in range(0, stop, size):
        texts, labels = sentences.texts[start : start + size], sentences.labels[start : start + size]
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
        yield {**tokens, "labels": torch.tensor(labels)}
