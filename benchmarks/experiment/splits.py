"""Training, tuning and evaluation sentences that cannot overlap: a sentence's hash says where it belongs.

    python -m benchmarks.experiment.splits --data-dir DATA

prints how many there are of each, with fingerprints, and how many of those that are evaluated share a stretch of words
with what a run trains on.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from . import data
from .data import Sentences


class Shares(NamedTuple):
    """Parts of the train file that are tuned and evaluated on, and the fewest sentences that will do for evaluation."""

    tuning: float
    evaluation: float
    fewest: int


SHARES = {"sst2": Shares(tuning=0.06, evaluation=0.31, fewest=20_000), "cola": Shares(0.10, 0.25, fewest=2_000)}


class Splits(NamedTuple):
    """No sentence is in two of them. ``left_out`` counts rows of the train file whose sentence is in the dev file."""

    train: Sentences
    tuning: Sentences
    evaluation: Sentences
    dev: Sentences
    left_out: int


def digest(text: str) -> str:
    """The hash of a sentence; case and blanks make no other sentence."""
    return hashlib.sha256(" ".join(text.casefold().split()).encode()).hexdigest()


def fingerprint(sentences: Sentences) -> str:
    """The hash of all sentences with their labels, whatever their order: what a run was evaluated on."""
    rows = sorted(f"{digest(text)} {label}" for text, label in zip(*sentences, strict=True))
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]


def refuse_overlap(parts: Mapping[str, Sentences]) -> None:
    """``ValueError`` naming two parts that share a sentence, and the sentence."""
    seen: dict[str, str] = {}
    for name, part in parts.items():
        for text, key in zip(part.texts, map(digest, part.texts), strict=True):
            if seen.setdefault(key, name) != name:
                raise ValueError(f"{name}: expected no sentence of {seen[key]}, got {text!r} ({key[:12]})")


def make(train: Sentences, dev: Sentences, shares: Shares) -> Splits:
    """Cut the train file. Every copy of a sentence goes the same way, however many rows the file has.

    ``ValueError`` where fewer are left for evaluation than ``shares.fewest``.
    """
    if not (shares.tuning > 0 and shares.evaluation > 0 and shares.tuning + shares.evaluation < 1):
        raise ValueError(f"shares: expected parts above 0 with a sum below 1, got {shares}")
    parts = {name: Sentences([], []) for name in ("train", "tuning", "evaluation")}
    in_dev = set(map(digest, dev.texts))
    for text, label in zip(*train, strict=True):
        key = digest(text)
        if key in in_dev:
            continue
        place = int(key[:8], 16) / 2**32
        held = "tuning" if place < shares.tuning else "evaluation" if place < shares.tuning + shares.evaluation else ""
        part = parts[held or "train"]
        part.texts.append(text)
        part.labels.append(label)
    found = Splits(**parts, dev=dev, left_out=len(train.texts) - sum(len(part.texts) for part in parts.values()))
    refuse_overlap({**parts, "dev": dev})
    if len(found.evaluation.texts) < shares.fewest:
        raise ValueError(f"evaluation: expected at least {shares.fewest} sentences, got {len(found.evaluation.texts)}")
    return found


def nested(part: Sentences, trained: Sentences, words: int = 3) -> float:
    """Of a part's sentences, how many contain one that is trained on, or lie inside one; of ``words`` words or more."""
    theirs = [tuple(text.casefold().split()) for text in trained.texts]
    whole = set(theirs)
    inside = {stretch for sentence in theirs for stretch in _stretches(sentence, words)}
    ours = [tuple(text.casefold().split()) for text in part.texts]
    found = [sentence in inside or not whole.isdisjoint(_stretches(sentence, words)) for sentence in ours]
    return sum(found) / len(found)


def _stretches(sentence: tuple[str, ...], words: int) -> Iterator[tuple[str, ...]]:
    for start in range(len(sentence)):
        for stop in range(start + words, len(sentence) + 1):
            yield sentence[start:stop]


def of(folder: Path, name: str) -> Splits:
    """The splits of a data set of ``SHARES`` from its files."""
    return make(*data.find(folder, name), SHARES[name])


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 with the reason when a file is missing or does not fit."""
    from . import plan  # which imports this module

    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiment.splits", description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with the subfolders sst2 and cola")
    folder = parser.parse_args(argv).data_dir
    try:
        for name in SHARES:
            found = of(folder, name)
            for part in ("train", "tuning", "evaluation", "dev"):
                sentences = getattr(found, part)
                print(f"{name} {part}: {len(sentences.texts):,} {fingerprint(sentences)}")
            trained = data.draw(found.train, plan.TRAINED[name], plan.SEEDS[0])
            for part in ("evaluation", "dev"):
                share = nested(getattr(found, part), trained)
                print(f"{name} {part}: {share:.2f} contain or lie inside one that the run of the first seed trains on")
            print(f"{name}: {found.left_out} rows of the train file are in the dev file and left out")
    except ValueError as error:
        print(f"splits: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
