"""Means with confidence intervals, paired tests against the baseline, and agreement of estimates."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .methods import BASELINE, METHODS

Runs = Mapping[str, Mapping[int, Mapping[str, Any]]]


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and the half width of its 95 % interval, t over the values; None where one value has no spread."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"mean": mean, "half_width": None, "n": len(values)}
    from scipy.stats import t

    error = statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "half_width": float(t.ppf(0.975, len(values) - 1)) * error, "n": len(values)}


def paired(values: Sequence[float], baseline: Sequence[float]) -> dict[str, float | None]:
    """Mean difference of pairs, its 95 % interval and the two-sided p of a paired t-test (None without spread)."""
    differences = [a - b for a, b in zip(values, baseline, strict=True)]
    found = interval(differences)
    spread = statistics.stdev(differences) if len(differences) > 1 else 0.0
    if spread == 0.0:
        return {**found, "p": None}
    from scipy.stats import t

    statistic = statistics.fmean(differences) / (spread / math.sqrt(len(differences)))
    return {**found, "p": float(2 * t.sf(abs(statistic), len(differences) - 1))}


def holm(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Holm's adjusted p-values; missing ones stay missing."""
    known = sorted((p, name) for name, p in values.items() if p is not None)
    adjusted: dict[str, float | None] = dict.fromkeys(values)
    largest = 0.0
    for rank, (p, name) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        adjusted[name] = largest
    return adjusted


def _both(runs: Runs, method: str, field: str) -> tuple[list[float], list[float]]:
    """A field of a method and of the baseline on the seeds that both have."""
    seeds = sorted(set(runs[method]) & set(runs.get(BASELINE, {})))
    return [runs[method][s][field] for s in seeds], [runs[BASELINE][s][field] for s in seeds]


def _method(runs: Runs, method: str) -> dict[str, Any]:
    results = [runs[method][seed] for seed in sorted(runs[method])]
    mine, base = _both(runs, method, "accuracy")
    steps = [a / b for a, b in zip(*_both(runs, method, "step_cpu_seconds"), strict=True)]
    ranks = [r["ranks"] for r in results if r["ranks"]]
    keys = ranks[0] if ranks else ()
    return {
        "label": METHODS[method][0],
        "seeds": sorted(runs[method]),
        "accuracy": interval([r["accuracy"] for r in results]),
        "ece": interval([r["ece"] for r in results]),
        "against_baseline": None if method == BASELINE or not mine else paired(mine, base),
        "step_cpu_seconds": interval([r["step_cpu_seconds"] for r in results]),
        "step_ratio": interval(steps) if steps else None,
        "setup_cpu_seconds": interval([r["setup_cpu_seconds"] for r in results]),
        "parameters": results[0]["parameters"],
        "total_rank": statistics.fmean(sum(r.values()) for r in ranks) if ranks else None,
        "ranks": {key: statistics.fmean(r[key] for r in ranks) for key in keys},
        "settled": [r["settled"][-1] for r in results if r.get("settled")],
    }


def _agreement(runs: Runs, when: str) -> dict[str, Any] | None:
    found = [r[when] for r in runs.get(BASELINE, {}).values() if when in r]
    if not found:
        return None
    values = {name: interval([f[name] for f in found]) for name in ("spearman", "rms_error")}
    pairs = [[f["exact"][key], f["probe"][key]] for f in found for key in f["exact"]]
    return {**values, "probes": found[0]["probes"], "batches": found[0]["batches"], "pairs": pairs}


def _drift(runs: Runs) -> dict[str, Any] | None:
    """Correlation of exact importance before training with the average over the steps until it is frozen."""
    import fastlora

    found = []
    for seed, base in runs.get(BASELINE, {}).items():
        tracked = runs.get("fw-sum", {}).get(seed)
        if tracked and "agreement_before" in base:
            before = fastlora.Scores(base["agreement_before"]["exact"], "grad_sq")
            found.append(before.rank_correlation(fastlora.Scores(tracked["scores"], "grad_sq")))
    return interval(found) if found else None


def _factors(runs: Runs, normalize: str) -> list[float] | None:
    """Smallest, median and largest factor 1 - I of FW-LoRA over matrices and seeds."""
    factors = []
    for run in runs.get(f"fw-{normalize}", {}).values():
        values = list(run["scores"].values())
        scale = sum(values) if normalize == "sum" else max(values)
        factors += [1 - v / scale for v in values]
    return [min(factors), statistics.median(factors), max(factors)] if factors else None


def _same_predictions(runs: Runs) -> dict[str, float]:
    """Share of dev sentences on which a penalty's run predicts what plain LoRA's of that seed does."""
    found = {}
    for method in ("fw-sum", "fw-relative", "fw-uniform"):
        mine, base = _both(runs, method, "predictions") if method in runs else ([], [])
        if mine:
            found[method] = statistics.fmean(
                a == b for one, other in zip(mine, base, strict=True) for a, b in zip(one, other, strict=True)
            )
    return found


def analyse(runs: Runs) -> dict[str, Any]:
    """Everything that the report says, from the files of runs."""
    methods = {name: _method(runs, name) for name in METHODS if name in runs}
    tests = {n: m["against_baseline"]["p"] for n, m in methods.items() if m["against_baseline"]}
    for name, p in holm(tests).items():
        methods[name]["against_baseline"]["p_holm"] = p
    everywhere = [run["environment"] for by_seed in runs.values() for run in by_seed.values()]
    return {
        "environments": [found for i, found in enumerate(everywhere) if found not in everywhere[:i]],
        "settings": next(iter(next(iter(runs.values())).values()))["settings"],
        "methods": methods,
        "agreement": {when: _agreement(runs, f"agreement_{when}") for when in ("before", "after")},
        "drift": _drift(runs),
        "same_predictions": _same_predictions(runs),
        "factors": {normalize: _factors(runs, normalize) for normalize in ("sum", "relative")},
    }
