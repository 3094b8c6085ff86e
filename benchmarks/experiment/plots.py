"""Pictures of the experiment's results; each reads only the results."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .plan import BASELINE, EQUIVALENT

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"
NAMES = {"sst2": "SST-2", "cola": "CoLA"}
UNITS = {"sst2": "points of accuracy", "cola": "hundredths of Matthews correlation"}


def _measured(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: s for name, s in found["settings"].items() if s["score"]["half_width"] is not None}


def _accuracy(plt: Any, settings: Mapping[str, Any], data: str) -> Any:
    by_count: dict[int, list[str]] = {}  # counts within a percent are one place on the axis
    for name in sorted(settings, key=lambda name: sum(settings[name]["parameters"].values())):
        count = sum(settings[name]["parameters"].values())
        by_count.setdefault(next((c for c in by_count if abs(c - count) < 0.01 * c), count), []).append(name)
    names = [name for part in by_count.values() for name in part]
    figure, axis = plt.subplots(figsize=(0.4 * len(names) + 2.5, 5.2))
    middle = 100 * settings.get(BASELINE, settings[names[0]])["score"]["mean"]
    low, high = (middle + side * 1200 * EQUIVALENT[data] for side in (-1, 1))
    ticks = []
    for gap, part in enumerate(by_count.values()):
        places = [names.index(name) + gap for name in part]
        ticks.append(sum(places) / len(places))
        for x, name in zip(places, part, strict=True):
            score, colour = settings[name]["score"], ORANGE if name == BASELINE else BLUE
            mean, half = 100 * score["mean"], 100 * score["half_width"]
            outside = not low < mean < high
            axis.errorbar(x, mean, yerr=half, fmt="o", color=colour, capsize=3)
            place = max(low, min(mean + half, high))
            text = f"{name}: {mean:.2f}" if outside else name
            axis.annotate(text, (x, place), (0, 4), textcoords="offset points", fontsize=8, rotation=90, ha="center")
    axis.set_xticks(ticks, [f"{count:,}" for count in by_count], fontsize=8)
    axis.set_ylim(low, high)
    axis.margins(x=0.08)
    axis.set_xlabel("trained parameters, head included")
    axis.set_ylabel(f"{NAMES[data]}, {UNITS[data]}: mean, 95 %")
    axis.grid(axis="y", alpha=0.25)
    return figure


def _tested(found: Mapping[str, Any]) -> list[Any]:
    return [row for row in found["comparisons"] if row["found"] is not None][::-1]


def _effects(plt: Any, rows: Sequence[Any], data: str) -> Any:
    figure, axis = plt.subplots(figsize=(8, 0.36 * len(rows) + 1.3))
    margin = 100 * EQUIVALENT[data]
    limit = 8 * margin
    axis.axvspan(-margin, margin, color=GREY, alpha=0.12, linewidth=0)
    axis.axvline(0, color=GREY, linewidth=0.8)
    for y, row in enumerate(rows):
        colour = {"equivalent": GREY, "could not be told": BLUE}.get(row["verdict"], ORANGE)
        test = row["found"]
        half = 100 * (test["half_width"] or 0.0)
        mean = 100 * test["mean"]
        axis.errorbar(mean, y, xerr=half, fmt="s" if row["primary"] else "o", color=colour, capsize=3)
        if abs(mean) > limit:
            side, edge, gap = ("right", limit, -4) if mean > 0 else ("left", -limit, 4)
            text = f"{mean:+.2f} ± {half:.2f}"
            axis.annotate(text, (edge, y), (gap, 0), textcoords="offset points", fontsize=8, ha=side, va="center")
    axis.set_xlim(-limit, limit)
    axis.set_yticks(range(len(rows)), [f"{row['setting']} - {row['against']}" for row in rows], fontsize=8)
    axis.set_xlabel(f"{NAMES[data]}, {UNITS[data]}: difference, 95 %; squares: primary; grey band: equivalent")
    axis.grid(axis="x", alpha=0.25)
    return figure


def _scored(found: Mapping[str, Any]) -> list[Any]:
    return sorted(found["agreement"].items(), key=lambda item: item[1]["mean"])


def _agreement(plt: Any, rows: Sequence[Any], data: str) -> Any:
    figure, axis = plt.subplots(figsize=(7, 0.36 * len(rows) + 1.3))
    axis.axvline(0, color=GREY, linewidth=0.8)
    for y, (name, rho) in enumerate(rows):
        colour = GREY if name == "random" else BLUE
        axis.errorbar(rho["mean"], y, xerr=rho["half_width"] or 0.0, fmt="o", color=colour, capsize=3)
    axis.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    axis.set_xlim(-1, 1)
    axis.set_xlabel("Spearman's correlation of scores with what the loss rises by without an adapter, 95 %")
    axis.grid(axis="x", alpha=0.25)
    return figure


_ROLES = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")


def _cells(ranks: Mapping[str, float]) -> dict[tuple[int, int], float]:
    found = {}
    for key, rank in ranks.items():
        match = re.search(r"layer\.(\d+)\.(.*)$", key)
        role = next((i for i, name in enumerate(_ROLES) if match and match[2].endswith(name)), None)
        if match and role is not None:
            found[int(match[1]), role] = rank
    return found


def _uneven(found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _cells(setting["ranks"]) for name, setting in found["settings"].items()
        if len(set(setting["ranks"].values())) > 2 and len(setting["ranks"]) > 12
    }  # fmt: skip


def _rank_map(plt: Any, shown: Mapping[str, Any], data: str) -> Any:
    wide = min(6, len(shown))
    rows = -(-len(shown) // wide)
    size = (2.4 * wide + 0.8, 3.2 * rows)
    figure, axes = plt.subplots(rows, wide, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis in list(axes.flat)[len(shown) :]:
        axis.set_axis_off()
    for axis, (name, cells) in zip(axes.flat, shown.items(), strict=False):
        depth = 1 + max(layer for layer, _ in cells)
        grid = [[cells.get((layer, role), float("nan")) for role in range(len(_ROLES))] for layer in range(depth)]
        image = axis.imshow(grid, cmap="viridis", aspect="auto")
        axis.set_xticks(range(len(_ROLES)), ("q", "k", "v", "out", "up", "down"), fontsize=8)
        axis.set_title(name, fontsize=9)
        figure.colorbar(image, ax=axis, fraction=0.05)
    for first in axes[:, 0]:
        first.set_ylabel("layer")
    return figure


# file name -> (caption, what it shows of the results of a data set, drawing)
FIGURES: dict[str, tuple[str, Callable[[Mapping[str, Any]], Any], Callable[[Any, Any, str], Any]]] = {
    "accuracy": ("Score against trained parameters.", _measured, _accuracy),
    "effects": ("Every difference with its 95 % interval.", _tested, _effects),
    "agreement": ("Scores against what each adapter brings.", _scored, _agreement),
    "ranks": ("Ranks by layer and type, mean over seeds.", _uneven, _rank_map),
}
