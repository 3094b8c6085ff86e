"""From single runs to statements: means with spreads, differences beyond noise, and the claims that must hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from ..training.temperature import reliability
from .lanes import ADAPTERS, METHODS
from .recipe import CLASSES, Settings

# Two-sided 95 % points of Student's t for 1 to 10 degrees of freedom, then close to the normal's.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
COMPARED = (
    ("lora", "head"), ("fc", "head"), ("fw", "head"), ("full", "head"),
    ("lora", "full"), ("fc", "full"), ("fw", "full"), ("fc", "lora"), ("fw", "lora"),
)  # fmt: skip
RULE = (
    "A difference is called only if its mean over the seeds exceeds both the 95 % point of Student's t times the "
    "paired standard error over seeds, and twice the paired standard error over the test images of a seed. "
    "Everything else is within noise. With one seed nothing is called; nothing is corrected for the number of "
    "comparisons."
)


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and sample deviation; the deviation of a single value is unknown."""
    return {"mean": mean(values), "deviation": stdev(values) if len(values) > 1 else None}


def t95(degrees: int) -> float:
    return _T95[degrees - 1] if degrees <= len(_T95) else 2.2


def difference(rights: Sequence[Tensor], others: Sequence[Tensor]) -> dict[str, Any]:
    """Paired comparison of two methods: per seed a 0/1 vector of right answers on the same images."""
    gaps = [a - b for a, b in zip(rights, others, strict=True)]
    by_seed = [float(gap.mean()) for gap in gaps]
    over_images = math.sqrt(mean(float(gap.var()) / len(gap) for gap in gaps))
    over_seeds = stdev(by_seed) / math.sqrt(len(by_seed)) if len(by_seed) > 1 else None
    if over_seeds is None:
        threshold = None
    else:
        threshold = max(t95(len(by_seed) - 1) * over_seeds, 2 * over_images)
    called = threshold is not None and abs(mean(by_seed)) > threshold
    return {
        "mean": mean(by_seed),
        "by_seed": by_seed,
        "error_over_seeds": over_seeds,
        "error_over_images": over_images,
        "threshold": threshold,
        "called": called,
    }


def differences(rights: dict[str, list[Tensor]]) -> list[dict[str, Any]]:
    return [
        {"first": first, "second": second, **difference(rights[first], rights[second])} for first, second in COMPARED
    ]  # fmt: skip


def method_summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Numbers of the table, over the seeds of one method."""
    classes = [mean(run["per_class"][c] for run in runs) for c in range(CLASSES)]
    out: dict[str, Any] = {
        name: spread([run[name] for run in runs])
        for name in ("accuracy", "ece_before", "ece_after", "temperature", "seconds_per_step", "setup_seconds")
    }
    # Over the classes, of which there are exactly five: the population deviation.
    deviation = math.sqrt(mean((value - mean(classes)) ** 2 for value in classes))
    out["per_class"] = {"values": classes, "mean": mean(classes), "deviation": deviation}
    return out


def diagram(outcomes: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Reliability before and after the temperature, pooled over seeds; None where a bin is empty."""
    labels = torch.cat([outcome["labels"] for outcome in outcomes])
    out = {}
    for when, field in (("before", "logits"), ("after", "scaled")):
        bins = reliability(torch.cat([outcome[field] for outcome in outcomes]), labels)
        out[when] = {
            "edges": bins.edges.tolist(),
            "counts": bins.counts.tolist(),
            "confidence": [_known(value) for value in bins.confidence.tolist()],
            "accuracy": [_known(value) for value in bins.accuracy.tolist()],
        }
    return out


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def claims(results: dict[str, Any], settings: Settings) -> list[dict[str, Any]]:
    """What a sound build must show; the demo fails if one of them does not hold."""
    lowest = min(results["base"]["accuracy"])
    found = [
        {
            "claim": f"the base reaches {settings.min_base_accuracy:.1%} on held-out images of its own classes",
            "value": f"lowest of {len(settings.seeds)}: {lowest:.1%}",
            "holds": lowest >= settings.min_base_accuracy,
        }
    ]
    for entry in results["differences"]:
        if entry["first"] in ADAPTERS and entry["second"] == "head":
            worst = min(entry["by_seed"])
            label = METHODS[entry["first"]][0]
            found.append(
                {
                    "claim": f"{label} beats head only by at least {100 * settings.min_gain:.1f} points in every seed",
                    "value": f"{100 * entry['mean']:+.1f} points on average, {100 * worst:+.1f} at worst",
                    "holds": worst >= settings.min_gain,
                }
            )
    gap = results["adapter"]["reload_max_difference"]
    found.append(
        {
            "claim": f"the saved adapter, read back, gives the same logits to {settings.max_reload_difference:g}",
            "value": f"largest difference {gap:.1e}",
            "holds": gap <= settings.max_reload_difference,
        }
    )
    return found


def accuracy_sentences(results: dict[str, Any]) -> list[str]:
    """One sentence for every compared pair."""
    sentences = []
    for entry in results["differences"]:
        first, second = (METHODS[entry[side]][0] for side in ("first", "second"))
        gap = f"{100 * entry['mean']:+.1f} points"
        if entry["called"]:
            said = f"{first} against {second}: {gap}, beyond noise (threshold {100 * entry['threshold']:.1f})."
        elif entry["threshold"] is None:
            said = f"{first} against {second}: {gap}, one seed, not judged."
        else:
            said = f"{first} against {second}: {gap}, within noise (threshold {100 * entry['threshold']:.1f})."
        sentences.append(said)
    return sentences


def calibration_sentences(results: dict[str, Any]) -> list[str]:
    """One sentence: for which methods the temperature changes ECE by more than the seeds differ."""
    groups: dict[str, list[str]] = {"lowers": [], "raises": [], "does not change": []}
    for method in results["methods"].values():
        changes = [run["ece_after"] - run["ece_before"] for run in method["runs"]]
        if len(changes) < 2:
            return ["Temperature and ECE: one seed, not judged."]
        threshold = t95(len(changes) - 1) * stdev(changes) / math.sqrt(len(changes))
        verb = "does not change" if abs(mean(changes)) <= threshold else "lowers" if mean(changes) < 0 else "raises"
        groups[verb].append(f"{method['label']} ({mean(changes):+.3f})")
    said = [f"{verb} ECE of {', '.join(labels)}" for verb, labels in groups.items() if labels]
    return [f"The temperature {'; '.join(said)} beyond what the seeds differ (paired t, 95 %)."]


def cost_sentences(results: dict[str, Any]) -> list[str]:
    """One sentence for every measured size: is the cost of the probes visible above the control?"""
    sentences = []
    for case in results["cost"]:
        probe, control = case["variants"]["probe"], case["variants"]["control"]
        clear = probe["lower"] > control["upper"]
        verdict = "above what the control shows" if clear else "within the control's quartiles, so not resolved here"
        sentences.append(
            f"Statistics by probes, {case['title']} (width {case['width']}, {case['rows']} rows): "
            f"{probe['ratio'] - 1:+.1%} of a step (quartiles {probe['lower'] - 1:+.1%} to {probe['upper'] - 1:+.1%}; "
            f"control {control['lower'] - 1:+.1%} to {control['upper'] - 1:+.1%}), {verdict}."
        )
    return sentences
