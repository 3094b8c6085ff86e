"""Which effect can be found: ``python -m benchmarks.experiment.power`` simulates the tests of the plan.

The spread is measured on the runs that are there: differences of a setting from the baseline are taken apart into what
varies with the seed, with the sentence, and with both. Writes ``power.json`` and ``power.md``, the same each time
with one numpy.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..harness import result_files
from ..harness.tables import table
from . import runs as run_files
from .plan import ALPHA, COMPARISONS, DEV, EQUIVALENT, HELD_OUT, PRIMARY

OUT = Path(__file__).parents[1] / "results" / "experiment"
BASELINE, MEASURED = "lora", ("full", "fc", "fim", "eva")  # those that change predictions and learn
POWER, CONFIDENCE, DRAWS = 0.8, 0.9, 4000
SEEDS = (4, 5, 6, 8, 12, 16, 24)
SENTENCES = {"sst2": (DEV["sst2"], 5_000, HELD_OUT["sst2"]), "cola": (DEV["cola"], HELD_OUT["cola"] + DEV["cola"])}
# No run on CoLA has been measured: shares of acceptable sentences, of them found, of the others found, and of sentences
# on which one of two settings alone is right, are assumed.
ACCEPTABLE, SENSITIVITY, SPECIFICITY, DISCORDANT = 0.70, 0.90, 0.40, 0.10


class Squares(NamedTuple):
    """Mean squares of differences in being right, over ``seeds`` x ``sentences``, without interaction apart."""

    seed: float
    sentence: float
    rest: float
    seeds: int
    sentences: int


class Spread(NamedTuple):
    """Variances of the difference of two settings: per seed, per sentence, and per both."""

    seed: float
    sentence: float
    rest: float

    def of_seed(self, sentences: int) -> float:
        """Standard deviation over seeds of a difference measured on so many sentences."""
        return math.sqrt(self.seed + self.rest / sentences)


def squares(mine: Mapping[int, Mapping[str, Any]], base: Mapping[int, Mapping[str, Any]]) -> Squares:
    """Two-way analysis of variance of the seeds that both have.

    Labels are not needed: of two predictions that differ one is right, and which one is the same for every seed.
    """
    seeds = sorted(set(mine) & set(base))
    digits = [[np.array(list(map(int, runs[s]["predictions"]))) for s in seeds] for runs in (mine, base)]
    change = (np.array(digits[0]) - np.array(digits[1])).astype(float)
    gains = np.array([mine[s]["accuracy"] - base[s]["accuracy"] for s in seeds])
    count, size = change.shape
    mean = gains.mean()
    by_seed = size * float(((gains - mean) ** 2).sum())
    by_sentence = count * float((change.mean(0) ** 2).sum()) - count * size * mean**2
    rest = float((change**2).sum()) - count * size * mean**2 - by_seed - by_sentence
    return Squares(
        by_seed / (count - 1), by_sentence / (size - 1), rest / ((count - 1) * (size - 1)), count, size
    )  # fmt: skip


def pooled(found: Iterable[Squares], confidence: float | None = None) -> Spread:
    """Variances over several settings; with ``confidence`` the upper bound of what varies with the seed."""
    found = list(found)
    seed, sentence, rest = (float(np.mean([each[i] for each in found])) for i in range(3))
    if confidence is not None:
        from scipy.stats import chi2

        freedom = sum(each.seeds - 1 for each in found)
        seed *= freedom / float(chi2.ppf(1 - confidence, freedom))
    return Spread(max(0.0, seed - rest) / found[0].sentences, max(0.0, sentence - rest) / found[0].seeds, rest)


def matthews(right_1: Any, wrong_1: Any, right_0: Any, wrong_0: Any) -> Any:
    """Matthews correlation of counts: right and wrong among sentences with label 1 and 0."""
    scale = (right_1 + wrong_0) * (right_1 + wrong_1) * (right_0 + wrong_1) * (right_0 + wrong_0)
    return (right_1 * right_0 - wrong_1 * wrong_0) / np.sqrt(scale)


def _matthews_at(sensitivity: float, specificity: float) -> float:
    positive, negative = ACCEPTABLE, 1 - ACCEPTABLE
    rows = positive * sensitivity, positive * (1 - sensitivity), negative * specificity, negative * (1 - specificity)
    return float(matthews(*rows))


def matthews_spread(accuracy: Spread, sentences: int = 10_000) -> Spread:
    """The spread of a difference in Matthews correlation, from the assumed shares.

    What varies with the seed is that of accuracy times the slope of the correlation in accuracy; what varies with the
    sentence is drawn, and shared out as accuracy's is.
    """
    chance = np.random.default_rng(0)
    cells = []
    for label, hit in ((ACCEPTABLE, SENSITIVITY), (1 - ACCEPTABLE, SPECIFICITY)):
        both = hit - DISCORDANT / 2
        cells += [label * both, label * DISCORDANT / 2, label * DISCORDANT / 2, label * (1 - both - DISCORDANT)]
    n = chance.multinomial(sentences, cells, size=20_000).T.astype(float)
    first = matthews(n[0] + n[1], n[2] + n[3], n[4] + n[5], n[6] + n[7])
    second = matthews(n[0] + n[2], n[1] + n[3], n[4] + n[6], n[5] + n[7])
    total = sentences * float(np.var(first - second, ddof=1))
    slope = (_matthews_at(SENSITIVITY + 0.01, SPECIFICITY + 0.01) - _matthews_at(SENSITIVITY, SPECIFICITY)) / 0.01
    share = accuracy.sentence / (accuracy.sentence + accuracy.rest)
    return Spread(slope**2 * accuracy.seed, share * total, (1 - share) * total)


class Draws(NamedTuple):
    """Mean differences and their standard errors in experiments without effects, [experiments, tests]."""

    means: np.ndarray
    errors: np.ndarray
    seeds: int


def draw(spread: Spread, seeds: int, sentences: int, tests: int, shared: bool = False) -> Draws:
    """Experiments in which nothing has an effect; ``shared`` draws the evaluation sentences as well, for all seeds."""
    chance = np.random.default_rng([seeds, sentences, tests])
    own = spread.of_seed(sentences)
    means = own / math.sqrt(seeds) * chance.standard_normal((DRAWS, tests))
    errors = own * np.sqrt(chance.chisquare(seeds - 1, (DRAWS, tests)) / (seeds - 1) / seeds)
    if shared:
        means += math.sqrt(spread.sentence / sentences) * chance.standard_normal((DRAWS, tests))
    return Draws(means, errors, seeds)


def critical(draws: Draws) -> np.ndarray:
    """The |t| from which Holm rejects the first test, in each experiment: the others have no effect.

    It is at the level that is left once every other test that can be rejected was.
    """
    from scipy.stats import t

    others = np.sort(2 * t.sf(np.abs(draws.means[:, 1:] / draws.errors[:, 1:]), draws.seeds - 1), axis=1)
    tests = draws.means.shape[1]
    rejected = np.cumprod(others <= ALPHA / (tests - np.arange(tests - 1)), axis=1).sum(axis=1)
    return t.isf(ALPHA / (tests - rejected) / 2, draws.seeds - 1)


def power(effect: float, draws: Draws, limit: np.ndarray) -> float:
    """Share of experiments in which an effect of the first test is found."""
    return float((np.abs(draws.means[:, 0] + effect) >= limit * draws.errors[:, 0]).mean())


def smallest(draws: Draws) -> float:
    """The effect that is found with ``POWER``."""
    limit = critical(draws)
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle, draws, limit) >= POWER else (middle, high)
    return high


def closed_form(effect: float, deviation: float, seeds: int, tests: int = 1) -> float:
    """Power of one two-sided paired t-test at ``ALPHA / tests``, by the noncentral t distribution."""
    from scipy.stats import nct, t

    limit = t.isf(ALPHA / tests / 2, seeds - 1)
    shift = effect / deviation * math.sqrt(seeds)
    return float(nct.sf(limit, seeds - 1, shift) + nct.cdf(-limit, seeds - 1, shift))


def equivalence(draws: Draws, margin: float) -> float:
    """Share of experiments without effect in which two one-sided tests say that it is within the margin."""
    from scipy.stats import t

    reach = np.abs(draws.means[:, 0]) + t.isf(ALPHA, draws.seeds - 1) * draws.errors[:, 0]
    return float((reach < margin).mean())


def row(data: str, bound: str, spread: Spread, sentences: int, seeds: int) -> dict[str, Any]:
    """One line of the table: effects in points (hundredths), shares as they are."""
    found = {
        name: round(100 * smallest(draw(spread, seeds, sentences, tests)), 3)
        for name, tests in (("one", 1), ("primary", len(PRIMARY)), ("all", len(COMPARISONS)))
    }
    alone = draw(spread, seeds, sentences, 1)
    sampled = draw(spread, seeds, sentences, 1, shared=True)
    errs = power(0.0, sampled, critical(sampled))
    return {
        "data": data, "spread": bound, "sentences": sentences, "seeds": seeds, **found,
        "equivalence": round(equivalence(alone, EQUIVALENT[data]), 3), "errs": round(errs, 3),
    }  # fmt: skip


def simulate(found: Mapping[str, Mapping[int, Mapping[str, Any]]], baseline: str) -> dict[str, Any]:
    """The document of ``power.json`` from runs by method, the baseline's among them."""
    parts = {name: squares(found[name], found[baseline]) for name in found if name != baseline}
    spreads = {}
    for bound, confidence in (("measured", None), ("upper", CONFIDENCE)):
        spread = pooled(parts.values(), confidence)
        spreads |= {("sst2", bound): spread, ("cola", bound): matthews_spread(spread)}
    return {
        "command": "python -m benchmarks.experiment.power",
        "numpy": np.__version__,  # whose generators may draw otherwise in another version
        "power": POWER, "alpha": ALPHA, "draws": DRAWS, "confidence": CONFIDENCE,
        "baseline": baseline,
        "tests": {"one": 1, "primary": len(PRIMARY), "all": len(COMPARISONS)},
        "squares": {name: each._asdict() for name, each in parts.items()},
        "spreads": [
            {"data": data, "spread": bound, **{k: round(100 * v**0.5, 4) for k, v in spread._asdict().items()}}
            for (data, bound), spread in spreads.items()
        ],
        "rows": [
            row(data, bound, spread, sentences, seeds)
            for (data, bound), spread in spreads.items() for sentences in SENTENCES[data] for seeds in SEEDS
        ],
    }  # fmt: skip


NAMES = {
    "sst2": "SST-2, points of accuracy",
    "cola": "CoLA, hundredths of Matthews correlation (assumed, not measured)",
}


def markdown(document: Mapping[str, Any]) -> str:
    """The page beside the numbers."""
    tests, lines = document["tests"], []
    for data, name in NAMES.items():
        rows = [
            [each["spread"], f"{each['sentences']:,}", str(each["seeds"]), *(f"{each[k]:.2f}" for k in tests),
             f"{each['equivalence']:.0%}", f"{each['errs']:.1%}"]
            for each in document["rows"] if each["data"] == data
        ]  # fmt: skip
        header = [f"of {count}" if count > 1 else "one test" for count in tests.values()]
        margin = f"equivalent within {100 * EQUIVALENT[data]:g}"
        lines += ["", f"## {name}", ""]
        lines += table(["seed's spread", "sentences", "seeds", *header, margin, "errs"], rows)
    spreads = table(
        ["data", "bound", "seed", "sentence", "both"],
        [[e["data"], e["spread"], *(f"{e[k]:.2f}" for k in ("seed", "sentence", "rest"))] for e in document["spreads"]],
        words=(0, 1),
    )
    return (
        "\n".join(
            [
                INTRODUCTION.format(**document, names=", ".join(f"`{name}`" for name in document["squares"])),
                *spreads,
                *lines,
            ]
        )
        + "\n"
    )


INTRODUCTION = """\
# What can be found

`{command}`: the smallest effect that is found with power {power:.0%} at level {alpha:g}, by paired t-tests over seeds
and Holm over the comparisons of `benchmarks/experiment/hypotheses.md` ({draws:,} simulated experiments a cell, so
that a power is known to 1.3 points). One comparison has an effect, the others none: the hardest case for Holm.
"Equivalent": how often two one-sided tests say so where there is no effect. "Errs": how often one paired t-test finds
an effect that is not there, where the evaluation sentences are counted as drawn and not as given.

Measured on runs of {names} against `{baseline}`: differences taken apart into what varies with the seed, with the
sentence, and with both. What varies with the seed is taken as measured and at its upper bound with confidence
{confidence:.0%}. The differences share their baseline, so that the bound is somewhat too low; tests are simulated as
independent. Held-out phrases may vary otherwise than the dev set's sentences: `--runs`, `--baseline` and `--settings`
read other runs.

CoLA is a model: 70 % acceptable, of which 90 % are found and 40 % of the others, one of two settings alone right on
10 %.

Standard deviations, in hundredths: of the seed, and of the others on one sentence.
"""


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 with the reason when runs are missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiment.power", description=__doc__)
    parser.add_argument("--runs", type=Path, default=OUT / run_files.PILOT, help="measured runs (%(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for power.json and power.md (%(default)s)")
    parser.add_argument("--baseline", default=BASELINE, help="what settings are compared with (%(default)s)")
    parser.add_argument("--settings", nargs="+", default=MEASURED, metavar="SETTING", help=" ".join(MEASURED))
    arguments = parser.parse_args(argv)
    names = (arguments.baseline, *arguments.settings)
    found = run_files.by_method(run_files.read(arguments.runs), names)
    few = [name for name in names if len(found.get(name, ())) < 2]
    if few:
        print(f"power: --runs: expected two seeds of {', '.join(few)}, got fewer in {arguments.runs}", file=sys.stderr)
        return 2
    document = simulate(found, arguments.baseline)
    arguments.out.mkdir(parents=True, exist_ok=True)
    result_files.write(arguments.out / "power.json", document)
    (arguments.out / "power.md").write_text(markdown(document), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
