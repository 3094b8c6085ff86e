"""What the next experiment asks, fixed before it runs: ``python -m benchmarks.experiment.plan`` writes its page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..harness.tables import table
from .splits import Splits, fingerprint

PAGE = Path(__file__).with_name("hypotheses.md")

ALPHA = 0.05
EQUIVALENT = {"sst2": 0.005, "cola": 0.02}  # a difference within it is none: accuracy, Matthews correlation
RATES = (1e-3, 2e-3, 4e-3)  # of adapters; a head takes the same in every setting, HEAD_RATE
COLA_RATES = (5e-4, 1e-3, 2e-3)  # the same on CoLA, where a run is longer
FULL_RATES = (3e-5, 1e-4, 3e-4)
HEAD_RATE = 1e-3
PENALTIES = (1e-3, 1e-2, 1e-1)
TUNING_SEEDS = (110, 111)
SEEDS = (300, 301, 302, 303, 304, 305, 306, 307)
# Sentences of a run in batches of 32: of CoLA's 5,618 each four or five times.
TRAINED = {"sst2": 8_000, "cola": 28_000}
BATCH = 32
HELD_OUT = {"sst2": 21_160, "cola": 2_092}  # with FINGERPRINTS, what benchmarks.experiment.splits makes of the files
DEV = {"sst2": 872, "cola": 527}
TUNING = {"sst2": 3_889, "cola": 835}
FINGERPRINTS = {
    "sst2": {"tuning": "ac8559982ee0bdb4", "evaluation": "90ad4450f8bbbb7b", "dev": "6a9c9280974cf327"},
    "cola": {"tuning": "7b15e6b0f73dcf31", "evaluation": "4735d39fac7fbff6", "dev": "557346e804617801"},
}  # fmt: skip
# The share of sentences that contain or lie inside one that a run trains on, from benchmarks.experiment.splits.
NESTED = {"sst2": {"evaluation": 0.45, "dev": 0.02}, "cola": {"evaluation": 0.02, "dev": 0.02}}
FIRST_SEEDS = 5  # those that every comparison of a hypothesis gets before any gets more
FEWEST_SEEDS = 4  # of both settings, for a comparison to be tested
WITHOUT_SEEDS = SEEDS[:4]  # of the baseline, in which one adapter at a time is left out
WITHOUT_EVERY = 5  # on every fifth held-out sentence
# CPU seconds of a fp32 step of uniform LoRA over all linears and of a sentence's evaluation in bf16, from one short
# trial: good for a budget only.
STEP_SECONDS, SENTENCE_SECONDS = 0.17, 0.0011

BASELINE = "all-2"


class Setting(NamedTuple):
    """What is trained. Unless it says otherwise: all linears of the encoder, 82,944 parameters (rank 2 on each)."""

    name: str
    what: str
    rates: tuple[float, ...] = RATES
    penalties: tuple[float, ...] = (0.0,)

    @property
    def tuning_runs(self) -> int:
        return len(self.rates) * len(self.penalties) * len(TUNING_SEEDS)


class Comparison(NamedTuple):
    """A paired test of one setting against another, and what the claim expects of it: higher, lower or equal."""

    setting: str
    expected: str = "higher"
    against: str = BASELINE


class Hypothesis(NamedTuple):
    """The first comparison is the primary one."""

    name: str
    claim: str
    comparisons: tuple[Comparison, ...]


def _all(expected: str, *settings: str, against: str = BASELINE) -> tuple[Comparison, ...]:
    return tuple(Comparison(setting, expected, against) for setting in settings)


SETTINGS = (
    Setting(BASELINE, "uniform rank 2 over all linears: the baseline"),
    Setting("qkv", "uniform rank 6 over query, key and value: as many parameters"),
    Setting("mlp", "the two MLP matrices of each block, ranks 3 and 4, 43 in all: 82,560 parameters"),
    Setting("lower", "uniform rank 4 over all linears of the first three blocks"),
    Setting("upper", "uniform rank 4 over all linears of the last three blocks"),
    Setting("all-1", "uniform rank 1 over all linears"),
    Setting("all-8", "uniform rank 8 over all linears"),
    Setting("norm", "ranks by gradient norm per parameter at the start"),
    Setting("norm-1", "ranks by the same scores, with the parameters of rank 1"),
    Setting("norm-8", "ranks by the same scores, with the parameters of rank 8"),
    Setting("norm-warmup", "ranks by the same scores after a tenth of the steps, factors kept"),
    Setting("norm-tracked", "ranks by the same scores tracked, reallocated every tenth of the steps with keep=True"),
    Setting("norm-total", "ranks by gradient norm, not per parameter"),
    Setting("fisher", "ranks by the Fisher information of single samples"),
    Setting("fc", "ranks by FC-LoRA's composite"),
    Setting("fim", "ranks by FIM-LoRA's score"),
    Setting("variance", "ranks by the variance of activations"),
    Setting("random", "ranks by random scores, drawn anew for each seed: uneven for no reason"),
    Setting("penalty-sum", "FW-LoRA's penalty, weights by importance over its sum", penalties=PENALTIES),
    Setting("penalty-relative", "FW-LoRA's penalty, weights by importance over its largest", penalties=PENALTIES),
    Setting("penalty-uniform", "the same penalty with one weight on every matrix", penalties=PENALTIES),
    Setting("orthogonal", "orthogonal initialisation"),
    Setting("pissa", "PiSSA"),
    Setting("eva", "EVA's directions, uniform ranks"),
    Setting("lora-ga", "LoRA-GA"),
    Setting("adalora", "AdaLoRA of PEFT from rank 3 to 2, its schedule over a tenth to half of the steps"),
    Setting("dora", "DoRA at rank 2, its lengths beside it"),
    Setting("full", "full fine-tuning", rates=FULL_RATES),
    Setting("head", "the head alone"),
)

HYPOTHESES = (
    Hypothesis(
        "where", "Parameters over all linears do better than the same number on query, key and value, or on one part.",
        _all("lower", "qkv", "mlp", "lower", "upper"),
    ),
    Hypothesis(
        "how many", "Ranks by score do better than uniform ones where rank is scarce (1), not where it is ample (8).",
        (Comparison("norm-1", "higher", "all-1"), Comparison("norm-8", "equal", "all-8"),
         Comparison("all-1", "lower"), Comparison("all-8", "higher")),
    ),
    Hypothesis(
        "when", "Scores that follow training make better ranks than scores at the start.",
        _all("higher", "norm-tracked", "norm-warmup", against="norm"),
    ),
    Hypothesis(
        "which score", "Ranks by a score do better than uniform ones; random ranks do not.",
        (*_all("higher", "norm", "norm-total", "fisher", "fc", "fim", "variance"), Comparison("random", "equal")),
    ),
    Hypothesis(
        "penalty", "A penalty weighed by importance does better than a uniform one, and than none.",
        (*_all("higher", "penalty-relative", "penalty-sum", against="penalty-uniform"),
         *_all("higher", "penalty-relative", "penalty-sum", "penalty-uniform")),
    ),
    Hypothesis(
        "initialisation", "Factors that start from data or from W do better than the default.",
        _all("higher", "lora-ga", "orthogonal", "pissa", "eva"),
    ),
    Hypothesis(
        "peers", "Full fine-tuning does better than adapters; AdaLoRA and DoRA, tuned, do better than plain LoRA.",
        (*_all("higher", "full", "adalora", "dora"), Comparison("head", "lower")),
    ),
)  # fmt: skip

# From power.json, before anything was run: what the seeds that the budget may leave can find.
FOUND = "0.83 points with 8 seeds, 1.14 with 6, 1.43 with 5, 2.07 with 4"
SPREAD = 0.50  # points by which a difference on SST-2 was taken to vary with the seed, at most
# Added when the runs of a data set had been seen: what was found lower with a choice at an edge, the rate beyond it.
BEYOND = {"sst2": {"adalora": 8e-3, "pissa": 5e-4, "eva": 5e-4}, "cola": {"lora-ga": 2.5e-4}}
ORDER = ("where", "how many", "which score", "peers", "penalty", "when", "initialisation")  # in which they run

PRIMARY = tuple(hypothesis.comparisons[0] for hypothesis in HYPOTHESES)
COMPARISONS = tuple(comparison for hypothesis in HYPOTHESES for comparison in hypothesis.comparisons)


def comparisons_of(data: str, hypothesis: Hypothesis) -> tuple[Comparison, ...]:
    """All of them on SST-2; on CoLA the primary one, but for the penalty."""
    if data == "sst2":
        return hypothesis.comparisons
    return () if hypothesis.name == "penalty" else hypothesis.comparisons[:1]


def in_order(data: str) -> Iterator[tuple[Comparison, ...]]:
    """The comparisons of a data set, by hypothesis as they run."""
    by_name = {hypothesis.name: comparisons_of(data, hypothesis) for hypothesis in HYPOTHESES}
    for name in ORDER:
        if by_name[name]:
            yield by_name[name]


def settings_of(data: str) -> tuple[Setting, ...]:
    """Every setting that is compared on a data set, with its rates there."""
    pairs = [(comparison.setting, comparison.against) for part in in_order(data) for comparison in part]
    found = tuple(setting for setting in SETTINGS if any(setting.name in pair for pair in pairs))
    if data == "sst2":
        return found
    return tuple(setting._replace(rates=COLA_RATES) if setting.rates == RATES else setting for setting in found)


def core_hours(data: str) -> float:
    """All runs of a data set at ``STEP_SECONDS`` and ``SENTENCE_SECONDS``."""
    training = TRAINED[data] // BATCH * STEP_SECONDS
    tuned = training + TUNING[data] * SENTENCE_SECONDS
    final = training + (HELD_OUT[data] + DEV[data]) * SENTENCE_SECONDS
    return sum(setting.tuning_runs * tuned + len(SEEDS) * final for setting in settings_of(data)) / 3600


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def check(data: str, found: Splits) -> None:
    """``ValueError`` if splits are others than those that were planned."""
    for part, planned in FINGERPRINTS[data].items():
        made = fingerprint(getattr(found, part))
        if made != planned:
            raise ValueError(f"--data-dir: expected {data} with the {part} split {planned}, got {made}")


RULES = """\
# Hypotheses, written down before the runs

Made from `benchmarks/experiment/plan.py` by `python -m benchmarks.experiment.plan`. What can be found with it:
`benchmarks/results/experiment/power.md`.

A first plan was the same but for four things: 3,200 phrases of SST-2 in a run, the rates 0.001, 0.003 and 0.01, a
rate that rises over a sixteenth of the steps, and other seeds. Its first 61 runs, all of hypothesis 1, are kept in
`benchmarks/results/experiment/first_runs.jsonl`. Nothing could be told from them: differences varied from seed to seed
by 1.9 points, where longer runs had let expect half a point; 0.01 fell apart in every setting, and 0.003 ended some
three points lower in two runs of 31. So runs are longer here, rates closer together, the rise is a tenth of the steps,
and every seed is new. Leaving out one adapter at a time was added. All of it was written before any of these runs.

CoLA has a plan of its own since its first 164 runs, of one epoch, which are kept in
`benchmarks/results/experiment/first_cola_runs.jsonl`: in every one of them, full fine-tuning included, one class is
predicted for all sentences. For five epochs, tried on the seed 110, `all-2` at 0.002 reached a Matthews correlation of
0.20 on the tuning split, full fine-tuning at 0.0001 one of 0.30. So a run is five times as long there; and the penalty
is left out, whose two settings differ by 0.02 points on SST-2 and take a third of all runs. In its first 20 runs
`all-2` and `qkv` were best in tuning at 0.001, the lowest of the rates of SST-2, and predicted one class at 0.004. So
the rates on CoLA are half as high: changed when the difference of these two over four seeds had been seen, before any
other setting was run. What was run at 0.004 counts for nothing.

## Rules

- **Data.** all-MiniLM-L6-v2. A run trains once on each of {sst2} of SST-2's training phrases, or on {cola} sentences
  of CoLA, each of the training split as often as any other or once more, in batches of {batch}; drawn and mixed anew
  for each seed. The splits are cut from the train file by hash of the sentence (`benchmarks/experiment/splits.py`);
  others than those below are refused by their fingerprints.
- **Adapters.** lora_alpha is twice the uniform rank: scale 2 on every matrix, whatever its rank. Ranks by score share
  out the parameters of the uniform rank, from 0 to four times that rank; scores are from 8 of the run's own batches.
  Gradient norm and Fisher, which are sums over a matrix, are taken per parameter of a rank, but for `norm-total`; the
  others as they are. No dropout but the model's. The penalty's importance is frozen after a tenth of the steps.
- **Optimiser.** AdamW without weight decay, gradients clipped to norm 1, a cosine after a linear rise over a tenth of
  the steps, in fp32. Evaluated with the adapters merged and the model in bf16, three times as fast; the first
  seed's run of each setting is evaluated on dev in fp32 too, to say how many predictions that changes.
- **Measured.** SST-2: accuracy on the held-out phrases (which is tested), and on dev. CoLA: Matthews correlation on
  the held-out sentences and dev together (which is tested), and on dev. With each: CPU seconds a step and in all,
  peak memory, trainable parameters.
- **Tuning.** Every setting alike: the rates {rates} on SST-2 and {cola_rates} on CoLA (full fine-tuning
  {full}) and, where there is a penalty, each with lambda {penalties}, on the seeds {tuning_seeds}; the
  highest mean on the tuning split is taken, the lower rate on a tie. The head's rate is {head:g}; where the head alone
  is trained, the three rates are the head's. A choice at the edge of its three is reported as such. Each data set is
  tuned by itself.
- **Runs.** The chosen setting on the fresh seeds {seeds}. A run that diverges counts with what it ends with: it
  ends at the first loss that is not a number.
- **Test.** A two-sided paired t-test over seeds for every comparison below. The first of a hypothesis is its primary
  one: the claim holds if that one is below {alpha:g} after Holm over the {primary} primary comparisons, and as
  expected. The others are findings only if below {alpha:g} after Holm over all {all} comparisons of SST-2. CoLA has
  the primary comparisons only, but for the penalty, with a Holm of their own. Every difference is reported with its
  95 % interval, whatever its test says.
- **Equivalence.** Where nothing is found: two one-sided tests at {alpha:g}, within half a point of accuracy (SST-2)
  or {matthews:g} of Matthews correlation (CoLA). "Equivalent" is said only then, "could not be told" otherwise.
- **Order.** SST-2 before CoLA, hypotheses in the order {order};
  in each, the primary comparison is tuned and run on the first {first} seeds, then the others are, then all on the
  other seeds. Runs stop at an hour fixed before them, whatever they show. A comparison is over the seeds that both
  settings have; one with fewer than {fewest} is reported as not run, and stays in the count of Holm.
- **What an adapter brings.** In the baseline's runs on the seeds {without} each matrix's adapter is left out of the
  trained model, one at a time, and the loss on every {every}th held-out phrase of SST-2 is taken again: what it rises
  by is the gain that scores should predict. Spearman's correlation over the 36 matrices, with the scores of each
  setting that has them, on the same seed (so from the same batches); the mean over seeds with its interval. No test.
- **Power.** If the spread over seeds is at its upper bound, a primary comparison on SST-2 finds with power 80 % an
  effect of {found}.
- **Limits.** Held-out phrases come from sentences of which other phrases are trained on: no phrase is shared, but
  words are; the dev set of whole sentences is the check. A t-test over seeds takes the evaluation sentences as given;
  `power.md` says how often it errs where they are counted as drawn.
"""

BUDGET = """
From {step:g} CPU s a step and {sentence:g} ms a sentence, a short trial.
Scores, initialisations from data and full fine-tuning cost more. Two processes of one thread each.
"""

AFTERWARDS = """\
## Added when the runs of a data set had been seen

Settings that were found lower than `all-2` with a rate at an edge of the three are each tuned at one rate beyond it
on the same two seeds: {beyond}.
Where that is better than the choice, it is run on the eight seeds, and its difference stands beside the planned one,
outside of the tests above and of their Holm. (The head alone, at an edge too, is left as it is: no rate makes up for
20 points.)"""


def page() -> str:
    """The text of ``hypotheses.md``."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield RULES.format(
        sst2=f"{TRAINED['sst2']:,}", cola=f"{TRAINED['cola']:,}", batch=BATCH, rates=_numbers(RATES),
        cola_rates=_numbers(COLA_RATES),
        full=_numbers(FULL_RATES), penalties=_numbers(PENALTIES), tuning_seeds=_numbers(TUNING_SEEDS), head=HEAD_RATE,
        seeds=_numbers(SEEDS), order=", ".join(ORDER), first=FIRST_SEEDS, found=FOUND, fewest=FEWEST_SEEDS,
        without=_numbers(WITHOUT_SEEDS), every=WITHOUT_EVERY,
        alpha=ALPHA, primary=len(PRIMARY), all=len(COMPARISONS), matthews=EQUIVALENT["cola"],
    )  # fmt: skip
    yield "## Splits\n"
    counts = {"tuning": TUNING, "evaluation": HELD_OUT, "dev": DEV}
    yield from table(
        ["data", "split", "sentences", "fingerprint"],
        [
            [data, split, f"{counts[split][data]:,}", f"`{print_}`"]
            for data, prints in FINGERPRINTS.items() for split, print_ in prints.items()
        ], words=(0, 1, 3),
    )  # fmt: skip
    what = {setting.name: setting.what for setting in SETTINGS}
    for number, (name, claim, comparisons) in enumerate(HYPOTHESES, start=1):
        yield f"\n## {number}. {name}\n\n{claim}\n"
        rows = [
            [f"`{setting}`", what[setting], f"`{against}`", expected, "primary" if i == 0 else ""]
            for i, (setting, expected, against) in enumerate(comparisons)
        ]
        yield from table(["setting", "what", "against", "expected", ""], rows, words=(0, 1, 2, 3, 4))
    yield (
        f"\n`{BASELINE}`: {what[BASELINE]}. Unless it says otherwise, a setting has the linears of all six\n"
        "blocks (not the pooler) and 82,944 parameters beside the head."
    )
    yield "\n## Budget\n"
    rows = []
    for data in TRAINED:
        chosen = settings_of(data)
        runs = [sum(s.tuning_runs for s in chosen), len(chosen) * len(SEEDS)]
        rows.append([data, str(len(chosen)), *map(str, runs), f"{core_hours(data):.1f}"])
    yield from table(["data", "settings", "runs to tune", "runs", "core-hours"], rows)
    yield BUDGET.format(step=STEP_SECONDS, sentence=1000 * SENTENCE_SECONDS)
    beyond = "; ".join(
        f"on {data} " + ", ".join(f"`{name}` at {rate:g}" for name, rate in rates.items())
        for data, rates in BEYOND.items()
    )
    yield AFTERWARDS.format(beyond=beyond)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
