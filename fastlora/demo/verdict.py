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
    "Differences are paired, and judged by an interval: one is called only if its interval lies on one side of 0, and "
    "is not resolved if the interval holds 0. For accuracies half of it is the larger of the 95 % point of Student's t "
    "times the paired standard error over seeds and twice the paired standard error over the test images of a seed; "
    "for costs it is the 95 % interval of the median over rounds. With one seed no accuracy is judged; nothing is "
    "corrected for the number of comparisons."
)


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and sample deviation; the deviation of a single value is unknown."""
    return {"mean": mean(values), "deviation": stdev(values) if len(values) > 1 else None}


def t95(degrees: int) -> float:
    return _T95[degrees - 1] if degrees <= len(_T95) else 2.2


def judged(low: float | None, high: float | None) -> int | None:
    """1 where an interval lies above 0, -1 below, 0 where it holds 0 (not resolved); None without one."""
    if low is None or high is None:
        return None
    return (low > 0) - (high < 0)


def difference(rights: Sequence[Tensor], others: Sequence[Tensor]) -> dict[str, Any]:
    """Paired comparison of two methods: per seed a 0/1 vector of right answers on the same images."""
    gaps = [a - b for a, b in zip(rights, others, strict=True)]
    by_seed = [float(gap.mean()) for gap in gaps]
    over_images = math.sqrt(mean(float(gap.var()) / len(gap) for gap in gaps))
    over_seeds = stdev(by_seed) / math.sqrt(len(by_seed)) if len(by_seed) > 1 else None
    low = high = None
    if over_seeds is not None:
        half = max(t95(len(by_seed) - 1) * over_seeds, 2 * over_images)
        low, high = mean(by_seed) - half, mean(by_seed) + half
    return {
        "mean": mean(by_seed),
        "by_seed": by_seed,
        "error_over_seeds": over_seeds,
        "error_over_images": over_images,
        "low": low,
        "high": high,
        "called": bool(judged(low, high)),
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
        said, low, high = f"{first} against {second}: {100 * entry['mean']:+.1f} points", entry["low"], entry["high"]
        if low is None:
            sentences.append(f"{said}, one seed, not judged.")
            continue
        verdict = "beyond noise" if judged(low, high) else "not resolved"
        sentences.append(f"{said} (interval {100 * low:+.1f} to {100 * high:+.1f}), {verdict}.")
    return sentences


def calibration_sentences(results: dict[str, Any]) -> list[str]:
    """One sentence: for which methods the temperature changes ECE by more than the seeds differ."""
    groups: dict[int, list[str]] = {-1: [], 1: [], 0: []}
    for method in results["methods"].values():
        changes = [run["ece_after"] - run["ece_before"] for run in method["runs"]]
        if len(changes) < 2:
            return ["Temperature and ECE: one seed, not judged."]
        half = t95(len(changes) - 1) * stdev(changes) / math.sqrt(len(changes))
        low, high = mean(changes) - half, mean(changes) + half
        groups[judged(low, high)].append(
            f"{method['label']} ({mean(changes):+.3f}, interval {low:+.3f} to {high:+.3f})"
        )
    words = {-1: "lowers ECE of", 1: "raises ECE of", 0: "has no resolved effect on ECE of"}
    said = [f"{words[sign]} {', '.join(labels)}" for sign, labels in groups.items() if labels]
    return [f"The temperature {'; '.join(said)} (paired t over seeds, 95 %)."]


_OVER_CONTROL = {1: "more than the control", -1: "less than the control", 0: "not resolved from the control"}
_USUAL_WAY = {
    1: "the usual way costs more",
    -1: "the usual way is cheaper at this width: what probes cost a layer beside arithmetic does not shrink with it, "
    "the gradients of its weights do",
    0: "which of the two is cheaper is not resolved",
}


def cost_sentences(results: dict[str, Any]) -> list[str]:
    """Two sentences for every measured size: what probes cost over the control, and the usual way beside them."""
    sentences = []
    for case in results["cost"]:
        ratios, where = case["variants"], f"{case['title']} (width {case['width']}, {case['rows']} rows)"
        found = {(d["first"], d["second"]): d for d in case["differences"]}
        over, usual = found["probe", "control"], found["requires_grad", "probe"]
        sentences.append(
            f"Statistics by probes, {where}: {ratios['probe']['ratio'] - 1:+.1%} of a step, "
            f"{_interval(over)} over the control: {_said(over, _OVER_CONTROL)}."
        )
        sentences.append(
            f"The usual way, requires_grad on W, {where}: {ratios['requires_grad']['ratio'] - 1:+.1%} of a step, "
            f"{_interval(usual)} over the probes: {_said(usual, _USUAL_WAY)}."
        )
    return sentences


def _interval(entry: dict[str, Any]) -> str:
    if entry["low"] is None:
        return f"{entry['median']:+.1%}"
    return f"{entry['median']:+.1%} (95 % interval {entry['low']:+.1%} to {entry['high']:+.1%})"


def _said(entry: dict[str, Any], words: dict[int, str]) -> str:
    sign = judged(entry["low"], entry["high"])
    return "too few rounds to judge" if sign is None else words[sign]
