"""SST-2 from tab-separated files, as batches of token ids."""

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


def read(path: Path) -> Sentences:
    """A file with the header ``sentence<TAB>label``; ``ValueError`` names the file and line that is something else."""
    texts, labels = [], []
    with path.open(encoding="utf-8") as lines:
        header = next(lines, "").rstrip("\n").split("\t")
        if header != ["sentence", "label"]:
            raise ValueError(f"{path}: expected the header sentence<TAB>label, got {header}")
        for number, line in enumerate(lines, start=2):
            fields = line.rstrip("\n").split("\t")
            if len(fields) != 2 or fields[1] not in ("0", "1"):
                raise ValueError(f"{path}:{number}: expected a sentence, a tab and 0 or 1, got {line!r}")
            texts.append(fields[0])
            labels.append(int(fields[1]))
    return Sentences(texts, labels)


def find(folder: Path) -> tuple[Sentences, Sentences]:
    """(train, dev) of a folder, or of its subfolder ``sst2``."""
    base = folder / "sst2" if (folder / "sst2").is_dir() else folder
    for name in ("train.tsv", "dev.tsv"):
        if not (base / name).is_file():
            raise ValueError(f"--data-dir: expected {name} in {base}")
    return read(base / "train.tsv"), read(base / "dev.tsv")


def draw(sentences: Sentences, count: int, seed: int) -> Sentences:
    """``count`` of them without replacement, in random order: the same for every method of a seed."""
    if not 0 < count <= len(sentences.texts):
        raise ValueError(f"--sentences: expected 1 to {len(sentences.texts)}, got {count}")
    chosen = torch.randperm(len(sentences.texts), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    return Sentences([sentences.texts[i] for i in chosen], [sentences.labels[i] for i in chosen])


def by_length(sentences: Sentences, size: int, seed: int) -> Sentences:
    """The same sentences in batches of similar length, batches in random order: two thirds of the padding go.

    Sorted within pools of 50 batches, so that what a batch holds still depends on chance.
    """
    lengths = [len(text.split()) for text in sentences.texts]
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
