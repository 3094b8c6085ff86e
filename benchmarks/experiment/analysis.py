"""Means with confidence intervals, paired tests, Holm and equivalence over the comparisons of the plan."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from . import plan
from .jobs import beyond, chosen, tuning_jobs
from .runs import unpacked

Results = Sequence[Mapping[str, Any]]
COSTS = ("step_cpu_seconds", "cpu_seconds", "setup_cpu_seconds", "peak_mib")


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean and the half width of its 95 % interval, t over the values; None where one value has no spread."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"mean": mean, "half_width": None, "n": len(values)}
    from scipy.stats import t

    error = statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "half_width": float(t.ppf(0.975, len(values) - 1)) * error, "n": len(values)}


def paired(values: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """Mean difference of pairs, its 95 % interval and the two-sided p of a paired t-test (None without spread)."""
    differences = [a - b for a, b in zip(values, baseline, strict=True)]
    found = interval(differences)
    spread = statistics.stdev(differences) if len(differences) > 1 else 0.0
    if spread == 0.0:
        return {**found, "p": None}
    from scipy.stats import t

    statistic = statistics.fmean(differences) / (spread / math.sqrt(len(differences)))
    return {**found, "p": float(2 * t.sf(abs(statistic), len(differences) - 1))}


def equivalence(values: Sequence[float], baseline: Sequence[float], margin: float) -> float | None:
    """The larger p of two one-sided paired t-tests that the difference is beyond ``margin``; None without spread."""
    differences = [a - b for a, b in zip(values, baseline, strict=True)]
    spread = statistics.stdev(differences) if len(differences) > 1 else 0.0
    if spread == 0.0:
        return None
    from scipy.stats import t

    error = spread / math.sqrt(len(differences))
    return float(t.sf((margin - abs(statistics.fmean(differences))) / error, len(differences) - 1))


def holm(values: Mapping[Any, float | None], count: int | None = None) -> dict[Any, float | None]:
    """Holm's adjusted p-values of ``count`` tests (all that have one); missing ones stay missing."""
    known = sorted(((p, name) for name, p in values.items() if p is not None), key=lambda item: item[0])
    adjusted: dict[Any, float | None] = dict.fromkeys(values)
    largest, count = 0.0, len(known) if count is None else count
    for rank, (p, name) in enumerate(known):
        largest = max(largest, min(1.0, p * (count - rank)))
        adjusted[name] = largest
    return adjusted


def _finals(results: Results, data: str) -> dict[str, dict[int, Mapping[str, Any]]]:
    """Runs by setting and seed that are those of the setting's choice."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for setting in plan.settings_of(data):
        choice = chosen(data, setting, results)
        for r in results:
            if choice is None or (r["data"], r["phase"], r["setting"]) != (data, "final", setting.name):
                continue
            if (r["rate"], r["penalty"]) == (choice.rate, choice.penalty) and r["seed"] in plan.SEEDS:
                found.setdefault(setting.name, {})[r["seed"]] = r
    return found


def _tuning(results: Results, data: str, setting: plan.Setting) -> dict[str, Any] | None:
    choice = chosen(data, setting, results)
    if choice is None:
        return None
    jobs = set(tuning_jobs(data, setting))
    tried: dict[tuple[float, float], list[float]] = {}
    for r in results:
        if (r["data"], r["phase"], r["setting"], r["rate"], r["penalty"], r["seed"]) in jobs:
            tried.setdefault((r["rate"], r["penalty"]), []).append(r["tuning"])
    table = [[rate, penalty, statistics.fmean(scores)] for (rate, penalty), scores in sorted(tried.items())]
    return {"rate": choice.rate, "penalty": choice.penalty, "edges": list(choice.edges), "tried": table}


def _setting(runs: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    rows = [runs[seed] for seed in sorted(runs)]
    keys = next((r["ranks"] for r in rows if r["ranks"]), {})
    return {
        "seeds": sorted(runs),
        "scores": [r["score"] for r in rows],
        "score": interval([r["score"] for r in rows]),
        "dev": interval([r["dev"] for r in rows]),
        **{name: interval([r[name] for r in rows if r[name] is not None]) for name in COSTS},
        "parameters": rows[0]["parameters"],
        "diverged": sum(r["diverged"] for r in rows),
        "ranks": {key: statistics.fmean(r["ranks"][key] for r in rows) for key in keys},
    }


def _comparison(
    found: Mapping[str, Mapping[int, Mapping[str, Any]]], comparison: plan.Comparison, margin: float
) -> dict[str, Any] | None:
    mine, base = found.get(comparison.setting, {}), found.get(comparison.against, {})
    seeds = sorted(set(mine) & set(base))
    if len(seeds) < plan.FEWEST_SEEDS:
        return None
    both = {name: [[runs[s][name] for s in seeds] for runs in (mine, base)] for name in ("score", "dev")}
    differences = [a - b for a, b in zip(*both["score"], strict=True)]
    return {
        **paired(*both["score"]),
        "seeds": seeds,
        "spread": statistics.stdev(differences),
        "equivalent_p": equivalence(*both["score"], margin),
        "dev": paired(*both["dev"]),
        "changed": _changed([(mine[seed], base[seed]) for seed in seeds]),
    }


def _changed(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> float | None:
    """The part of the held-out predictions that differ, mean over pairs of runs; None where they were not kept."""
    if not all("predictions" in run for pair in pairs for run in pair):
        return None
    both = [[unpacked(run["predictions"]) for run in pair] for pair in pairs]
    return statistics.fmean(a != b for pair in both for a, b in zip(*pair, strict=True))


def verdict(found: Mapping[str, Any] | None, expected: str) -> str:
    """What may be said of a comparison: one of six answers."""
    if found is None:
        return "not run"
    if found["p_holm"] is not None and found["p_holm"] < plan.ALPHA:
        side = "higher" if found["mean"] > 0 else "lower"
        return f"{side}, as expected" if side == expected else f"{side}, against what was expected"
    # The same difference on every seed leaves nothing to test: both may have learned nothing.
    same = found["equivalent_p"] is not None and found["equivalent_p"] < plan.ALPHA
    return "equivalent" if same else "could not be told"


def _compared(found: Mapping[str, Any], data: str) -> list[dict[str, Any]]:
    """Every comparison of a data set; Holm counts those that were not run."""
    margin = plan.EQUIVALENT[data]
    rows, families = [], {"primary": {}, "all": {}}
    for hypothesis in plan.HYPOTHESES:
        for place, comparison in enumerate(plan.comparisons_of(data, hypothesis)):
            result = _comparison(found, comparison, margin)
            rows.append({**comparison._asdict(), "hypothesis": hypothesis.name, "primary": place == 0, "found": result})
            p = None if result is None else result["p"]
            families["all"][len(rows) - 1] = p
            if place == 0:
                families["primary"][len(rows) - 1] = p
    adjusted = {name: holm(family, len(family)) for name, family in families.items()}
    for i, row in enumerate(rows):
        if row["found"] is not None:
            row["found"]["p_holm"] = adjusted["primary" if row["primary"] else "all"][i]
        row["verdict"] = verdict(row["found"], row["expected"])
    return rows


def _precision(found: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, Any] | None:
    """bf16 against fp32 on dev, over the final runs that have both."""
    rows = [run for runs in found.values() for run in runs.values() if "dev_fp32" in run]
    if not rows:
        return None
    gaps = [r["dev"] - r["dev_fp32"] for r in rows]
    return {
        "runs": len(rows), "changed": statistics.fmean(r["dev_changed"] for r in rows),
        "largest": max(map(abs, gaps)), "mean": statistics.fmean(gaps),
    }  # fmt: skip


def _agreement(found: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Spearman's correlation of scores with what the loss rises by without a matrix's adapter.

    By the first setting that has them: others differ in how many ranks are shared out.
    """
    gains = {seed: run["without"] for seed, run in found.get(plan.BASELINE, {}).items() if "without" in run}
    table: dict[str, dict[str, Any]] = {}
    seen: list[Any] = []
    for name, mine in found.items():
        rows = [(mine[seed]["scores"], gains[seed]) for seed in gains if "scores" in mine.get(seed, {})]
        if rows and rows not in seen:
            seen.append(rows)
            table[name] = interval([_spearman([(scores[key], gain[key]) for key in scores]) for scores, gain in rows])
    return table


def _spearman(pairs: Sequence[tuple[float, float]]) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(*zip(*pairs, strict=True)).statistic)


def _beyond(results: Results, data: str, found: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, Any]:
    """By setting at the rate beyond the edge: in tuning, beside its choice, and less the baseline where it was run."""
    rows, base = {}, found.get(plan.BASELINE, {})
    for name, rate in plan.BEYOND[data].items():
        if (tuned := beyond(data, name, results)) is None:
            continue
        mine = {r["seed"]: r["score"] for r in results
                if (r["data"], r["phase"], r["setting"], r["rate"]) == (data, "final", name, rate)}  # fmt: skip
        seeds = sorted(mine.keys() & base.keys())
        scores = [mine[seed] for seed in seeds], [base[seed]["score"] for seed in seeds]
        rows[name] = {"rate": rate, "tuned": tuned[0], "chosen": tuned[1],
                      "found": paired(*scores) if len(seeds) >= plan.FEWEST_SEEDS else None}  # fmt: skip
    return rows


def _unique(values: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    return [value for value in values if value not in found and not found.append(value)]


def analyse(results: Results) -> dict[str, Any]:
    """Everything that the report says, from the rows of runs."""
    document: dict[str, Any] = {"environments": _unique(r["environment"] for r in results), "data": {}}
    for data in _unique(r["data"] for r in results):
        found = _finals(results, data)
        mine = [r for r in results if r["data"] == data]
        rates = {setting.name: setting.rates for setting in plan.settings_of(data)}
        planned = [r for r in mine if r["rate"] in rates[r["setting"]]]
        document["data"][data] = {
            "runs": len(planned),
            "cpu_hours": sum(r["cpu_seconds"] for r in planned) / 3600,
            "diverged": [[r["setting"], r["phase"], r["rate"], r["seed"]] for r in mine if r["diverged"]],
            "tuning": {s.name: t for s in plan.settings_of(data) if (t := _tuning(results, data, s)) is not None},
            "settings": {name: _setting(runs) for name, runs in found.items()},
            "comparisons": _compared(found, data),
            "precision": _precision(found),
            "agreement": _agreement(found),
            "beyond": _beyond(results, data, found),
        }
    return document
