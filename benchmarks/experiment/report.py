"""The results as JSON, pictures and the page of the docs."""

from __future__ import annotations

import os
import statistics
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..harness import result_files
from ..harness.tables import table
from . import plan
from .analysis import Results, analyse
from .plots import FIGURES, NAMES, UNITS

APART = 0.02  # below the median of its setting, a run is named
COMMAND = "python -m benchmarks.experiment --data-dir DATA"


def write_report(found: Results, out: Path, page: Path | None = None) -> dict[str, Any]:
    """``results.json`` and the pictures in ``out``, and the page where there is to be one; returns the results."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = analyse(found)
    for data, part in results["data"].items():
        for name, (_, shown, draw) in FIGURES.items():
            if subject := shown(part):
                figure = draw(pyplot, subject, data)
                figure.savefig(out / f"{data}_{name}.png", dpi=110, bbox_inches="tight")
                pyplot.close(figure)
    result_files.write(out / "results.json", results)
    if page is not None:
        text = markdown(result_files.read(out / "results.json"), os.path.relpath(out, page.parent))
        page.write_text(text, encoding="utf-8")
    return results


def points(value: Mapping[str, Any], signed: bool = False) -> str:
    """A mean with the half width of its interval, in hundredths."""
    mean = f"{100 * value['mean']:{'+' if signed else ''}.2f}"
    return mean if value["half_width"] is None else f"{mean} ± {100 * value['half_width']:.2f}"


def _p(value: float | None) -> str:
    return "" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _tuning(found: Mapping[str, Any]) -> Iterator[str]:
    rows = []
    for name, tuned in found["tuning"].items():
        tried = ", ".join(
            f"{rate:g}{f' with {penalty:g}' if penalty else ''}: {100 * mean:.2f}"
            for rate, penalty, mean in tuned["tried"]
        )
        chosen = f"{tuned['rate']:g}{' with ' + format(tuned['penalty'], 'g') if tuned['penalty'] else ''}"
        rows.append([f"`{name}`", chosen, ", ".join(tuned["edges"]), tried])
    yield from table(["setting", "chosen", "at the edge", "rate: mean on the tuning split"], rows, words=(0, 1, 2, 3))


def _settings(found: Mapping[str, Any]) -> Iterator[str]:
    rows = []
    for name, setting in sorted(found["settings"].items(), key=lambda item: -item[1]["score"]["mean"]):
        counts = setting["parameters"]
        rows.append([
            f"`{name}`", str(setting["score"]["n"]), points(setting["score"]), points(setting["dev"]),
            f"{counts['adapters'] + counts['other']:,}", f"{setting['step_cpu_seconds']['mean']:.2f}",
            f"{setting['setup_cpu_seconds']['mean']:.1f}", f"{setting['cpu_seconds']['mean']:.0f}",
            f"{setting['peak_mib']['mean']:,.0f}",
        ])  # fmt: skip
    header = ["setting", "seeds", "score", "dev", "parameters", "CPU s a step", "to prepare", "in all", "peak MiB"]
    yield from table(header, rows)


def _comparisons(found: Mapping[str, Any]) -> Iterator[str]:
    rows = []
    for row in found["comparisons"]:
        test = row["found"]
        if test is None:
            continue
        rows.append([
            row["hypothesis"], f"`{row['setting']}`", f"`{row['against']}`", "yes" if row["primary"] else "",
            row["verdict"], str(test["n"]), points(test, signed=True), _p(test["p"]), _p(test["p_holm"]),
            _p(test["equivalent_p"]), points(test["dev"], signed=True),
        ])  # fmt: skip
    header = [
        "hypothesis", "setting", "minus", "primary", "what can be said", "seeds", "difference", "p", "p (Holm)",
        "p (equivalence)", "on dev",
    ]  # fmt: skip
    yield from table(header, rows, words=(0, 1, 2, 3, 4))


def _agreement(found: Mapping[str, Any]) -> Iterator[str]:
    what = {setting.name: setting.what for setting in plan.SETTINGS}
    yield "What an adapter brings: the loss rises by it when one matrix's adapter is left out of the trained baseline."
    yield "Spearman's correlation of each score with it over the 36 matrices, mean over seeds:"
    yield ""
    rows = []
    for name, rho in sorted(found["agreement"].items(), key=lambda item: -item[1]["mean"]):
        half = "" if rho["half_width"] is None else f" ± {rho['half_width']:.2f}"
        rows.append([f"`{name}`", what[name], str(rho["n"]), f"{rho['mean']:+.2f}{half}"])
    yield from table(["setting", "what", "seeds", "correlation"], rows, words=(0, 1))


def _spread(found: Mapping[str, Any], data: str) -> Iterator[str]:
    """How far the seeds are apart, beside what the plan took them to be: whether its power is what was had."""
    tests = {(row["setting"], row["against"]): row["found"] for row in found["comparisons"] if row["found"] is not None}
    spreads = {pair: 100 * test["spread"] for pair, test in tests.items()}
    fewest, planned = min(test["n"] for test in tests.values()), len(plan.SEEDS)
    seeds = f"all {planned} seeds" if fewest == planned else f"{fewest} seeds or more of the {planned} planned"
    yield f"Differences vary from seed to seed with a standard deviation of {_span(spreads.values())}, over"
    yield f"{seeds}."
    if data != "sst2":
        yield f"What `power.md` takes for {NAMES[data]} is assumed, not measured."
        return
    wide = {pair: spread for pair, spread in spreads.items() if spread > plan.SPREAD}
    if wide:
        yield f"The plan took {plan.SPREAD:.2f} at most. Where it was more, only effects as many times those of"
        yield "`power.md` could be found:\n"
        for (setting, against), spread in wide.items():
            yield f"- `{setting}` minus `{against}`: {spread:.2f}, {spread / plan.SPREAD:.1f} times"
    apart = list(_apart(found))
    if apart:
        yield f"\nSingle runs end more than {100 * APART:g} points below the median of their setting. They were looked"
        yield "for afterwards, and are in every test:\n"
        yield from apart


def _apart(found: Mapping[str, Any]) -> Iterator[str]:
    for name, setting in found["settings"].items():
        median = statistics.median(setting["scores"])
        for seed, score in zip(setting["seeds"], setting["scores"], strict=True):
            if score < median - APART:
                yield f"- `{name}` on seed {seed}: {100 * score:.2f}, median {100 * median:.2f}"


def _span(values: Collection[float]) -> str:
    return " to ".join(dict.fromkeys(f"{value:.2f}" for value in (min(values), max(values))))


def _not_run(results: Mapping[str, Any]) -> Iterator[str]:
    """Every comparison without an answer, by name."""
    for data in plan.TRAINED:
        part = results["data"].get(data)
        if part is None:
            yield f"- {NAMES[data]}: nothing of it."
            continue
        names: dict[str, list[str]] = {}
        for row in part["comparisons"]:
            if row["found"] is None:
                names.setdefault(row["hypothesis"], []).append(f"`{row['setting']}` against `{row['against']}`")
        for hypothesis, pairs in names.items():
            yield f"- {NAMES[data]}, {hypothesis}: {', '.join(pairs)}."
    if not results["data"].get("sst2", {}).get("agreement"):
        yield "- Leaving out one matrix's adapter at a time, the truth that scores should predict: nothing of it."


def _sayings(found: Mapping[str, Any], data: str) -> Iterator[str]:
    what = {setting.name: setting.what for setting in plan.SETTINGS}
    headings = (
        ("Found, as expected", lambda v: v.endswith(", as expected")),
        ("Found, against what was expected", lambda v: v.endswith("against what was expected")),
        (f"Equivalent: within {100 * plan.EQUIVALENT[data]:g} of each other", lambda v: v == "equivalent"),
        ("Could not be told", lambda v: v == "could not be told"),
    )
    for heading, belongs in headings:
        rows = [row for row in found["comparisons"] if belongs(row["verdict"])]
        yield f"\n**{heading}.**" + ("" if rows else " Nothing.")
        if rows:
            yield ""
        for row in rows:
            yield (
                f"- `{row['setting']}` ({what[row['setting']]}) minus `{row['against']}`: "
                f"{points(row['found'], signed=True)} over {row['found']['n']} seeds."
            )


INTRODUCTION = """\
# Where to put the parameters

An experiment on one pretrained model, all-MiniLM-L6-v2, and real sentences: does it matter which matrices have
adapters, and does importance help to choose their ranks? What it asks, how everything is tuned and which test decides
was written down before it ran, in `benchmarks/experiment/hypotheses.md`; which effects it can find, in
`benchmarks/results/experiment/power.md`. This page is made from its runs by `{command}`: one row
a run in `benchmarks/results/experiment/runs.jsonl`. A first stretch of 61 shorter runs, from which
nothing could be told, is in `first_runs.jsonl`; why it ended is said in `hypotheses.md`. So are CoLA's first runs, of
one epoch, in `first_cola_runs.jsonl`: one class is predicted for all sentences in every one of them, of full
fine-tuning too.

± is the 95 % interval, t over seeds. "Score" is on sentences that no run trains on or is tuned on. Differences are
paired by seed; p is of a two-sided paired t-test, then after Holm over {primary} primary comparisons, or over all {all}
for the others, those that were not run counted too. Equivalent: two one-sided tests. Intervals are of seeds, with
the sentences as given: `power.md` says how often such a test errs where sentences are counted as drawn.
"""

READ_WITH_CARE = """\
## Read with care

One model; short runs, {steps} steps of {batch}; few seeds. A run sees {sentences:,} phrases once: what holds after
longer training is not told. Where ranks are shared out anew during training, AdamW begins anew too, without the
moments of the factors before. CPU seconds are of one thread on a machine that other work shared, and compare settings
roughly: an adapted linear multiplies by the faster of two libraries (`benchmarks/results/floor.md`), any other by
torch's own, so that a step with fewer adapted linears can take longer. `{baseline}` in all includes leaving out its
adapters. Peak memory is of the whole process, libraries and evaluation included.
"""


# What a comparison means for who uses the package.
SIDES = {"higher": "better than", "equivalent": "as well as", "lower": "worse than"}
PLACES = {
    "worse than": 'adapt all linears (`target_modules="all-linear"`) rather than query, key and value',
    "better than": 'adapt query, key and value (`target_modules="qkv"`) rather than all linears',
    "as well as": "all linears and query, key and value do as well as each other",
}
PARTS = {"mlp": "the MLPs", "lower": "the first three blocks", "upper": "the last three blocks"}
SCORES = ("norm", "norm-total", "fisher", "fc", "fim", "variance")
OTHERS = {
    ("random", plan.BASELINE): ("Sharing ranks out at random", "sharing them out evenly"),
    ("norm-1", "all-1"): ("Sharing out few ranks (1 on average) by gradient norm", "doing so evenly"),
    ("norm-8", "all-8"): ("Sharing out many ranks (8 on average) by gradient norm", "doing so evenly"),
    ("norm-tracked", "norm"): ("Reallocating during training", "ranks from scores at the start"),
    ("norm-warmup", "norm"): ("Ranks from scores after a tenth of the steps", "ranks from scores at the start"),
    ("all-1", plan.BASELINE): ("Rank 1 everywhere", "rank 2"),
    ("all-8", plan.BASELINE): ("Rank 8 everywhere", "rank 2"),
    ("penalty-relative", "penalty-uniform"): ("A penalty weighed by importance", "a uniform one"),
    ("penalty-sum", "penalty-uniform"): ("A penalty weighed by importance over its sum", "a uniform one"),
    ("penalty-relative", plan.BASELINE): ("A penalty weighed by importance", "none"),
    ("penalty-sum", plan.BASELINE): ("A penalty weighed by importance over its sum", "none"),
    ("penalty-uniform", plan.BASELINE): ("A uniform penalty", "none"),
    ("orthogonal", plan.BASELINE): ("Orthogonal initialisation", "the default"),
    ("pissa", plan.BASELINE): ("PiSSA", "the default initialisation"),
    ("eva", plan.BASELINE): ("EVA at uniform ranks", "the default initialisation"),
    ("lora-ga", plan.BASELINE): ("LoRA-GA", "the default initialisation"),
    ("dora", plan.BASELINE): ("DoRA", "LoRA at as high a rank"),
    ("adalora", plan.BASELINE): ("AdaLoRA", "LoRA at uniform ranks"),
    ("full", plan.BASELINE): ("Full fine-tuning", "LoRA of rank 2 on all linears"),
    ("head", plan.BASELINE): ("Training the head alone", "LoRA of rank 2 on all linears"),
}


def _did(verdict: str) -> str | None:
    """How a setting did beside the other, if that could be told."""
    return SIDES.get(verdict.partition(",")[0])


def _follows(found: Mapping[str, Any]) -> Iterator[str]:
    """What the comparisons of a data set bear out, and what they do not."""
    rows = {(row["setting"], row["against"]): row for row in found["comparisons"]}
    did = {pair: _did(row["verdict"]) for pair, row in rows.items()}
    if (place := did["qkv", plan.BASELINE]) is not None:
        yield f"- At as many parameters, in runs as short as these, {PLACES[place]}."
    for side in SIDES.values():
        parts = [f"{what} alone" for name, what in PARTS.items() if did.get((name, plan.BASELINE)) == side]
        if parts:
            yield f"- As many parameters on {' or on '.join(parts)} do {side} on all linears."
    for side in SIDES.values():
        names = [f"`{name}`" for name in SCORES if did.get((name, plan.BASELINE)) == side]
        if names:
            yield f"- Ranks by {', '.join(names)} did {side} uniform ones."
    for pair, (what, other) in OTHERS.items():
        if did.get(pair) is not None:
            difference = points(rows[pair]["found"], signed=True)
            yield f"- {what} did {did[pair]} {other}: {difference}{_at_an_edge(found, pair)}."
    untold = [f"`{a}` against `{b}`" for (a, b), row in rows.items() if row["verdict"] == "could not be told"]
    if untold:
        yield f"- Could not be told: {', '.join(untold)}."


def _at_an_edge(found: Mapping[str, Any], pair: tuple[str, str]) -> str:
    edges = [name for setting in pair for name in found["tuning"][setting]["edges"]]
    if not edges:
        return ""
    further = found["beyond"].get(pair[0])
    if further is None:
        return f", where a {edges[0]} is at the edge of those tried"
    return f", at the edge of the rates that were planned; {_further(further)}"


def _further(row: Mapping[str, Any]) -> str:
    """What a rate beyond the edge did, which was looked at afterwards."""
    tuned = f"beyond it, at {row['rate']:g}, {100 * row['tuned']:.2f} in tuning ({100 * row['chosen']:.2f} at the edge)"
    if row["found"] is None:
        return tuned
    return f"{tuned} and a difference of {points(row['found'], signed=True)} over {row['found']['n']} seeds"


def _defaults(results: Mapping[str, Any]) -> Iterator[str]:
    """What the package starts with, as far as every data set bears it out."""
    better = {
        row["setting"] for part in results["data"].values() for row in part["comparisons"]
        if _did(row["verdict"]) == "better than"
    }  # fmt: skip
    yield "No default is changed where nothing was found."
    if not better & set(SCORES):
        yield "Uniform ranks stay what the package starts with: no score of importance has been shown to do better."


def markdown(results: Mapping[str, Any], pictures: str = "../benchmarks/results/experiment") -> str:
    """The page, with the folder of its pictures."""
    lines = [INTRODUCTION.format(command=COMMAND, primary=len(plan.PRIMARY), all=len(plan.COMPARISONS))]
    lines += ["## What follows", ""]
    for data, part in results["data"].items():
        follows = list(_follows(part)) or ["- Nothing yet: too few runs."]
        lines += [f"On {NAMES[data]}, in {UNITS[data]}:", "", *follows, ""]
    lines += [*_defaults(results), ""]
    for data, part in results["data"].items():
        lines += [f"## {NAMES[data]}, {UNITS[data]}", *_sayings(part, data), ""]
        if any(row["found"] for row in part["comparisons"]):
            lines += [*_comparisons(part), ""]
            lines += [*_spread(part, data), ""]
        if part["agreement"]:
            lines += [*_agreement(part), ""]
        if part["settings"]:
            lines += [*_settings(part), ""]
        lines += [
            f"![{caption}]({pictures}/{data}_{name}.png)\n"
            for name, (caption, shown, _) in FIGURES.items() if shown(part)
        ]  # fmt: skip
        if part["tuning"]:
            lines += ["Tuned on the seeds of tuning, each rate on two; an edge is the lowest or highest tried:", ""]
            lines += [*_tuning(part), ""]
        if part["diverged"]:
            lines += ["Diverged, and counted with what they ended with: " + ", ".join(
                f"`{setting}` at {rate:g}, seed {seed} ({phase})" for setting, phase, rate, seed in part["diverged"]
            ) + ".", ""]  # fmt: skip
        if part["precision"]:
            found = part["precision"]
            lines += [
                f"Evaluated in bf16: over {found['runs']} runs it changes {found['changed']:.1f} of the "
                f"{plan.DEV[data]} predictions on dev, and the score there by {100 * found['largest']:.2f} at most, "
                f"{100 * found['mean']:+.3f} on average.", "",
            ]  # fmt: skip
        planned = sum(s.tuning_runs + len(plan.SEEDS) for s in plan.settings_of(data))
        lines += [f"{part['runs']} of {planned} planned runs, {part['cpu_hours']:.1f} core-hours.", ""]
    lines += ["## Not run", "", *(list(_not_run(results)) or ["Nothing: every run that was planned is made."]), ""]
    first = plan.TRAINED["sst2"]
    lines.append(
        READ_WITH_CARE.format(steps=first // plan.BATCH, batch=plan.BATCH, sentences=first, baseline=plan.BASELINE)
    )
    lines += [
        f"Ran with: {', '.join(f'{name} {value}' for name, value in found.items())}."
        for found in results["environments"]
    ]
    return "\n".join(lines) + "\n"
