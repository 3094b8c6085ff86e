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
            "" if test["changed"] is None else f"{100 * test['changed']:.1f} %",
        ])  # fmt: skip
    header = [
        "hypothesis", "setting", "minus", "primary", "what can be said", "seeds", "difference", "p", "p (Holm)",
        "p (equivalence)", "on dev", "predictions that differ",
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


def _about(data: str, found: Mapping[str, Any]) -> Iterator[str]:
    trained, nested = plan.TRAINED[data], plan.NESTED[data]
    yield ABOUT[data].format(
        steps=trained // plan.BATCH, batch=plan.BATCH, sentences=trained, held_out=plan.HELD_OUT[data],
        dev=plan.DEV[data], nested=100 * nested["evaluation"], nested_dev=100 * nested["dev"],
    )  # fmt: skip
    primary = [row["primary"] for row in found["comparisons"]]
    others = "" if all(primary) else f", or over all {len(primary)} for the others"
    yield f"Holm: over {sum(primary)} primary comparisons{others}."


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
                f"{_further(found, (row['setting'], row['against']))}"
            )


INTRODUCTION = """\
# Where to put the parameters

An experiment on one pretrained model, all-MiniLM-L6-v2, and real sentences: does it matter which matrices have
adapters, and does importance help to choose their ranks? What it asks, how settings are tuned and which test decides
stands in `benchmarks/experiment/hypotheses.md`, written down before the runs; which effects it can find, in
`benchmarks/results/experiment/power.md`. This page is made from its runs by `{command}`: one row
a run in `benchmarks/results/experiment/runs.jsonl`.

Changed when runs had been seen:

- A first stretch of 61 shorter runs on SST-2, from which nothing could be told, is in `first_runs.jsonl` and counts for
  nothing. The plan after it has other rates and other seeds.
- CoLA's first 164 runs, of one epoch, are in `first_cola_runs.jsonl` and count for nothing: one class is predicted for
  all sentences in every one of them, of full fine-tuning too. Runs are five times as long since, and the penalty is
  left out.
- CoLA's rates were changed after 20 of those longer runs, when the difference of `qkv` and `all-2` over four seeds had
  been seen. Runs of them at rates that are still tried count.
- Settings that were found lower with a rate at the edge were tuned at one rate beyond it. What came of it stands
  beside the planned result, outside of the tests.

± is the 95 % interval, t over seeds, with the sentences as given: `power.md` says how often a test errs where
sentences are counted as drawn. Differences are paired by seed; p is of a two-sided paired t-test, then after Holm over
a data set's primary comparisons, or over all of them for the others, those that were not run counted too. "Better"
and "worse" are said after Holm. "As well as" and "equivalent" mean: shown to be within {sst2:g} points of accuracy, or
within {cola:g} hundredths of Matthews correlation, by two one-sided tests at {alpha:g} of each comparison by itself,
not corrected for their number.
"""

ABOUT = {
    "sst2": """\
A run takes {steps} steps of {batch}, each of its {sentences:,} phrases once. "Score" is the accuracy on {held_out:,}
phrases that no run trains on or is tuned on. They are cut from the same sentences: {nested:.0f} % contain, or lie
inside, a phrase of three words or more that a run trains on. "Dev" is {dev:,} sentences by themselves
({nested_dev:.0f} %): the check, on which nothing is tested.
""",
    "cola": """\
A run takes {steps} steps of {batch}, each of its sentences four or five times. "Score" is the Matthews correlation on
{held_out:,} sentences that no run trains on or is tuned on, and the {dev:,} of dev with them ({nested:.0f} % contain,
or lie inside, a sentence that is trained on). "Dev" is the {dev:,} alone.
""",
}

READ_WITH_CARE = """\
## Read with care

One model; short runs; few seeds: what holds after longer training is not told. Where ranks are shared out anew during
training, AdamW begins anew too, without the moments of the factors before. CPU seconds are of one thread on a machine
that other work shared, and compare settings roughly: an adapted linear multiplies by the faster of two libraries
(`benchmarks/results/floor.md`), any other by torch's own, so that a step with fewer adapted linears can take longer.
`{baseline}` in all includes leaving out its adapters. Peak memory is of the whole process, libraries and evaluation
included.
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
            test = rows[pair]["found"]
            difference = points(test, signed=True)
            if did[pair] == SIDES["equivalent"] and test["changed"] is not None:
                difference += f", where {100 * test['changed']:.1f} % of predictions differ"
            yield f"- {what} did {did[pair]} {other}: {difference}{_at_an_edge(found, pair)}.{_further(found, pair)}"
    untold = [f"`{a}` against `{b}`" for (a, b), row in rows.items() if row["verdict"] == "could not be told"]
    if untold:
        yield f"- Could not be told: {', '.join(untold)}."


def _at_an_edge(found: Mapping[str, Any], pair: tuple[str, str]) -> str:
    edges: dict[str, list[str]] = {}
    for setting in pair:
        tuned = found["tuning"][setting]
        for name in tuned["edges"]:
            key, place = ("rate", 0) if name == "rate" else ("penalty", 1)
            side = "lowest" if tuned[key] == min(row[place] for row in tuned["tried"]) else "highest"
            edges.setdefault(f"{side} {name}", []).append(f"`{setting}`")
    return "".join(f", with {' and '.join(names)} at the {edge} tried" for edge, names in edges.items())


def _further(found: Mapping[str, Any], pair: tuple[str, str]) -> str:
    """What a rate beyond the edge did, which was looked at afterwards."""
    row = found["beyond"].get(pair[0])
    if row is None or pair[1] != plan.BASELINE:
        return ""
    tuned = f"tuning gives {100 * row['tuned']:.2f} after {100 * row['chosen']:.2f}"
    if (test := row["found"]) is not None:
        tuned += f", and the difference is {points(test, signed=True)} over {test['n']} seeds"
    return f" Beyond the planned rates, at {row['rate']:g}, {tuned}."


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
    within = {data: 100 * margin for data, margin in plan.EQUIVALENT.items()}
    lines = [INTRODUCTION.format(command=COMMAND, alpha=plan.ALPHA, **within)]
    lines += ["## What follows", ""]
    for data, part in results["data"].items():
        follows = list(_follows(part)) or ["- Nothing yet: too few runs."]
        lines += [f"On {NAMES[data]}, in {UNITS[data]}:", "", *follows, ""]
    lines += [*_defaults(results), ""]
    for data, part in results["data"].items():
        lines += [f"## {NAMES[data]}, {UNITS[data]}", "", *_about(data, part), *_sayings(part, data), ""]
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
    lines.append(READ_WITH_CARE.format(baseline=plan.BASELINE))
    lines += [
        f"Ran with: {', '.join(f'{name} {value}' for name, value in found.items())}."
        for found in results["environments"]
    ]
    return "\n".join(lines) + "\n"
