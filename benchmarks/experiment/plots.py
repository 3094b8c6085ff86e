"""Pictures of the experiment's results; each reads only the results dict and may have nothing to show."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .methods import BASELINE


def _accuracy(plt: Any, results: Mapping[str, Any]) -> Any:
    methods = list(results["methods"].items())[::-1]
    figure, axis = plt.subplots(figsize=(7.5, 0.42 * len(methods) + 1.2))
    for y, (name, method) in enumerate(methods):
        accuracy = method["accuracy"]
        colour = "#D55E00" if name == BASELINE else "#0072B2"
        half = accuracy["half_width"] or 0.0
        axis.errorbar(100 * accuracy["mean"], y, xerr=100 * half, fmt="o", color=colour, capsize=3)
        if name == BASELINE:
            axis.axvline(100 * accuracy["mean"], color=colour, linewidth=0.8, alpha=0.6)
    axis.set_yticks(range(len(methods)), [method["label"] for _, method in methods])
    axis.set_xlabel("SST-2 dev accuracy, %: mean and 95 % interval over seeds")
    axis.grid(axis="x", alpha=0.25)
    return figure


def _cells(ranks: Mapping[str, float]) -> dict[tuple[int, str], float]:
    found = {}
    for key, rank in ranks.items():
        match = re.search(r"layer\.(\d+)\..*\.(query|key|value)$", key)
        if match:
            found[int(match[1]), match[2]] = rank
    return found


def _rank_map(plt: Any, results: Mapping[str, Any]) -> Any:
    chosen = [results["methods"][name] for name in ("fc", "fim", "adalora", "eva") if name in results["methods"]]
    shown = {method["label"]: _cells(method["ranks"]) for method in chosen}
    shown = {label: cells for label, cells in shown.items() if cells}
    if not shown:
        return None
    top = max(max(cells.values()) for cells in shown.values())
    figure, axes = plt.subplots(1, len(shown), figsize=(2.4 * len(shown) + 0.8, 3.4), sharey=True, squeeze=False)
    for axis, (label, cells) in zip(axes[0], shown.items(), strict=True):
        depth = 1 + max(layer for layer, _ in cells)
        roles = ("query", "key", "value")
        grid = [[cells.get((layer, role), float("nan")) for role in roles] for layer in range(depth)]
        image = axis.imshow(grid, cmap="viridis", vmin=0, vmax=top, aspect="auto")
        for layer, row in enumerate(grid):
            for column, rank in enumerate(row):
                shade = "white" if rank < 0.6 * top else "black"
                axis.text(column, layer, f"{rank:.1f}", ha="center", va="center", fontsize=8, color=shade)
        axis.set_xticks(range(3), roles)
        axis.set_title(label, fontsize=10)
    axes[0][0].set_ylabel("layer")
    figure.colorbar(image, ax=list(axes[0]), label="rank, mean over seeds", fraction=0.03)
    return figure


def _agreement(plt: Any, results: Mapping[str, Any]) -> Any:
    shown = {when: found for when, found in results["agreement"].items() if found}
    if not shown:
        return None
    figure, axes = plt.subplots(1, len(shown), figsize=(4.2 * len(shown), 3.8), squeeze=False)
    for axis, (when, found) in zip(axes[0], shown.items(), strict=True):
        exact, probe = zip(*found["pairs"], strict=True)
        axis.loglog(exact, probe, "o", markersize=4, alpha=0.6, color="#0072B2")
        ends = [min(exact), max(exact)]
        axis.loglog(ends, ends, color="#444444", linewidth=1)
        axis.set_title(f"{when} training: Spearman {found['spearman']['mean']:.3f}", fontsize=10)
        axis.set_xlabel("exact grad_sq")
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel(f"probes, k = {next(iter(shown.values()))['probes']}")
    return figure


# file name -> (caption, drawing)
FIGURES = {
    "accuracy": ("Accuracy of every method, mean and 95 % interval over seeds; the line is uniform LoRA.", _accuracy),
    "ranks": ("Ranks by layer and projection, mean over seeds.", _rank_map),
    "agreement": ("grad_sq by probes against exact, one point a matrix and seed.", _agreement),
}
