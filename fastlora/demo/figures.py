"""Pictures of the demo's results; reads only the results dict."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import mean, stdev
from typing import Any

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = {"head": "#666666", "full": "#0072B2", "lora": "#009E73", "fc": "#D55E00", "fw": "#CC79A7"}
PROJECTIONS = ("q", "k", "v")


def draw(results: dict[str, Any], out: Path) -> dict[str, str]:
    """Draw every picture as ``out/<name>.svg``; returns name -> caption. Raises ``OSError`` if it cannot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = {name: caption for name, (caption, _) in FIGURES.items() if name != "speed" or results.get("speed")}
    for name in found:
        with plt.rc_context({**_STYLE, "svg.hashsalt": name}):
            figure = FIGURES[name][1](plt, results)
            figure.savefig(out / f"{name}.svg", dpi=144, metadata={"Date": None}, transparent=True)
            plt.close(figure)
        (out / f"{name}.svg").write_text(_themed((out / f"{name}.svg").read_text()))
    return found


# Drawn in these colours, which then become those of the reader's theme.
_TEXT, _PAGE = "#1c1e21", "#fefdfc"
_THEME = (
    "<style>svg { --text: #1c1e21; --page: #ffffff } "
    "@media (prefers-color-scheme: dark) { svg { --text: #e6e8ea; --page: #16181b } }</style>"
)


def _themed(svg: str) -> str:
    """The drawing alone, without the header of a file, in the colours of a light or a dark page."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = svg.replace(_TEXT, "var(--text)").replace(_PAGE, "var(--page)")
    return re.sub(r"(<svg[^>]*>)", lambda match: match[1] + _THEME, svg, count=1)


_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _TEXT),
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "legend.frameon": False,
}


def _grid(values: dict[str, float]) -> list[list[float]]:
    """Values as rows of blocks and columns q, k, v."""
    found: dict[int, dict[str, float]] = {}
    for key, value in values.items():
        match = re.fullmatch(r"blocks\.(\d+)\..*\[([qkv])\]", key)
        if match is None:
            raise ValueError(f"values: expected keys such as 'blocks.0.attn.qkv[q]', got {key!r}")
        found.setdefault(int(match[1]), {})[match[2]] = value
    return [[found[block][name] for name in PROJECTIONS] for block in sorted(found)]


def _heat(axis: Any, grid: list[list[float]], title: str, form: str, **scale: Any) -> Any:
    picture = axis.imshow(grid, aspect="auto", cmap="viridis", **scale)
    axis.set_title(title)
    axis.set_xticks(range(len(PROJECTIONS)), PROJECTIONS)
    axis.set_yticks(range(len(grid)))
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            dark = picture.norm(value) < 0.6
            axis.text(x, y, format(value, form), ha="center", va="center", color="white" if dark else "black")
    return picture


def _rank_map(plt: Any, results: dict[str, Any]) -> Any:
    shown = results["ranks"][:4]
    seeds = results["settings"]["seeds"]
    top = max(max(ranks.values()) for ranks in shown)
    figure, axes = plt.subplots(1, len(shown), figsize=(2.4 * len(shown) + 1.2, 3.6), squeeze=False)
    for axis, ranks, seed in zip(axes[0], shown, seeds, strict=False):
        picture = _heat(axis, _grid(ranks), f"seed {seed}", "d", vmin=0, vmax=top)
    axes[0][0].set_ylabel("block")
    figure.colorbar(picture, ax=axes[0].tolist(), label="rank")
    return figure


def _importance(plt: Any, results: dict[str, Any]) -> Any:
    figure, axes = plt.subplots(1, 2, figsize=(7.6, 3.6))
    composite, shares = results["importance"]["composite"], results["importance"]["grad_sq"]
    picture = _heat(axes[0], _grid(composite), "FC-LoRA: composite before training", ".2f")
    figure.colorbar(picture, ax=axes[0], label="sum of z-scores")
    percent = {key: 100 * value for key, value in shares.items()}
    picture = _heat(axes[1], _grid(percent), "FW-LoRA: squared gradient while training", ".1f", vmin=0)
    figure.colorbar(picture, ax=axes[1], label="share of the total, %")
    axes[0].set_ylabel("block")
    return figure


def _curves(results: dict[str, Any]) -> dict[str, tuple[list[float], list[float], list[float]]]:
    """Seconds, accuracy in percent and its deviation over seeds (0 with one) of every method."""
    found = {}
    for name, method in results["methods"].items():
        points = list(zip(*(run["curve"] for run in method["runs"]), strict=True))
        rights = [[100 * seed[1] for seed in point] for point in points]
        spread = [stdev(right) if len(right) > 1 else 0.0 for right in rights]
        found[name] = [mean(seed[0] for seed in point) for point in points], [mean(right) for right in rights], spread
    return found


def _accuracy(plt: Any, results: dict[str, Any]) -> Any:
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 4.2))
    curves = _curves(results)
    for axis in axes:
        for name, (seconds, values, band) in curves.items():
            axis.plot(seconds, values, color=COLOURS[name], label=results["methods"][name]["label"], linewidth=1.8)
            lower, upper = ([v + side * b for v, b in zip(values, band, strict=True)] for side in (-1, 1))
            axis.fill_between(seconds, lower, upper, color=COLOURS[name], alpha=0.13, linewidth=0)
        axis.set_xlabel("seconds of training, calibration included")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("test accuracy, %")
    axes[0].set_ylim(top=100)
    axes[0].legend(loc="lower right")
    axes[1].set_title("where they differ")
    axes[1].set_ylim(*_zoom(curves))
    return figure


def _zoom(curves: dict[str, tuple[list[float], list[float], list[float]]]) -> tuple[float, float]:
    """The range of the second half of all curves that train more than a head, with their deviations."""
    late = [
        (value, band)
        for name, (_, values, bands) in curves.items()
        if name != "head"
        for value, band in list(zip(values, bands, strict=True))[len(values) // 2 :]
    ]
    return min(v - b for v, b in late) - 0.5, min(100.0, max(v + b for v, b in late) + 0.5)


def _pooled_ece(bins: dict[str, list[Any]]) -> float:
    total = sum(bins["counts"])
    filled = zip(bins["counts"], bins["accuracy"], bins["confidence"], strict=True)
    return sum(count * abs(right - sure) for count, right, sure in filled if count) / total


def _reliability(plt: Any, results: dict[str, Any]) -> Any:
    figure, axes = plt.subplots(1, 2, figsize=(7.6, 4.0), sharey=True)
    method = results["methods"][results["adapter"]["method"]]
    for axis, when in zip(axes, ("before", "after"), strict=True):
        bins = method["reliability"][when]
        edges, width = bins["edges"], bins["edges"][1] - bins["edges"][0]
        filled = [i for i, count in enumerate(bins["counts"]) if count]
        right = [bins["accuracy"][i] for i in filled]
        sure = [bins["confidence"][i] for i in filled]
        left = [edges[i] for i in filled]
        axis.bar(left, right, width, align="edge", color="#a9d5f2", edgecolor="white", label="accuracy in the bin")
        axis.plot([0, 1], [0, 1], color=_TEXT, linestyle="--", linewidth=1, label="calibrated")
        sizes = [12 + 160 * (bins["counts"][i] / max(bins["counts"])) ** 0.5 for i in filled]
        axis.scatter(sure, right, s=sizes, color="#D55E00", alpha=0.75, zorder=3, label="mean confidence")
        for i in filled:
            axis.text(edges[i] + width / 2, 0.012, str(bins["counts"][i]), ha="center", fontsize=6.5, color="#1b1d20")
        axis.set_title(f"{method['label']}, {when} temperature: pooled ECE {_pooled_ece(bins):.3f}")
        axis.set_xlabel("confidence")
        axis.set_xlim(0, 1.02)
        axis.set_ylim(0, 1.05)
    axes[0].set_ylabel("accuracy")
    axes[0].legend(loc="upper left", fontsize=8)
    return figure


def _overhead(plt: Any, results: dict[str, Any]) -> Any:
    cases = results["cost"]
    figure, axes = plt.subplots(1, len(cases), figsize=(3.9 * len(cases) + 1.2, 3.0), sharey=True, squeeze=False)
    for axis, case in zip(axes[0], cases, strict=True):
        box = {"boxstyle": "square,pad=0.1", "facecolor": _PAGE, "edgecolor": "none", "alpha": 0.8}
        names = [name for name in case["variants"] if name != "plain"][::-1]
        for y, name in enumerate(names):
            cost = case["variants"][name]
            middle, lower, upper = (100 * (cost[part] - 1) for part in ("ratio", "lower", "upper"))
            colour = {"control": "#666666", "probe": "#D55E00"}.get(name, "#0072B2")
            axis.plot([lower, upper], [y, y], color=colour, linewidth=5, alpha=0.35, solid_capstyle="butt")
            axis.plot(middle, y, "o", color=colour)
            axis.annotate(
                f"{middle:+.1f} %", (middle, y), (0, 8), textcoords="offset points", ha="center", fontsize=9, bbox=box
            )
        axis.axvline(0, color=_TEXT, linewidth=1)
        axis.set_yticks(range(len(names)), [results["cost_labels"][name] for name in names])
        axis.set_ylim(-0.5, len(names) - 0.2)
        axis.margins(x=0.18)
        axis.set_title(f"{case['title']}\nwidth {case['width']}, {case['rows']} rows")
        axis.set_xlabel("CPU time over a plain LoRA step, %")
        axis.grid(axis="x", alpha=0.25)
    return figure


def _speed(plt: Any, results: dict[str, Any]) -> Any:
    cases = results["speed"]
    figure, axes = plt.subplots(1, len(cases), figsize=(3.9 * len(cases) + 1.2, 2.2), sharey=True, squeeze=False)
    for axis, case in zip(axes[0], cases, strict=True):
        names = [*case["variants"]][::-1]
        for y, name in enumerate(names):
            cost = case["variants"][name]
            axis.barh(
                y, cost["ratio"], color={"fastlora": "#009E73", "peft": "#D55E00"}.get(name, "#888888"), height=0.6
            )
            axis.plot([cost["lower"], cost["upper"]], [y, y], color=_TEXT, linewidth=1.5)
            axis.annotate(
                f"{cost['ratio']:.2f}", (max(cost["upper"], cost["ratio"]), y), (4, 0), textcoords="offset points",
                va="center", fontsize=9,
            )  # fmt: skip
        axis.set_yticks(range(len(names)), [results["speed_labels"][name] for name in names])
        axis.margins(x=0.18)
        axis.set_title(f"{case['title']}\nwidth {case['width']}, {case['rows']} rows")
        axis.set_xlabel("CPU time of a training step over PEFT's")
        axis.grid(axis="x", alpha=0.25)
    return figure


# file name -> (caption, drawing)
FIGURES = {
    "rank_map": (
        "Ranks that FC-LoRA gives to q, k and v of every block, at the parameter budget of uniform ranks.",
        _rank_map,
    ),
    "importance": (
        "Importance of the frozen matrices, mean over seeds: from exact statistics before training, and from probes "
        "that ride in the backward while training.",
        _importance,
    ),
    "accuracy": (
        "Test accuracy over the training clock: mean and deviation over seeds. The methods take turns step by step, so "
        "all see the same machine; evaluation is not on the clock. On the right their second half, without head only.",
        _accuracy,
    ),
    "reliability": (
        "Confidence against accuracy on the test images of all seeds, before and after one scalar temperature for each "
        "seed, fitted on its validation images. The numbers at the foot, and the size of the dots, count the images.",
        _reliability,
    ),
    "overhead": (
        "What statistics add to a training step: median and quartiles of paired ratios, variants interleaved in "
        "alternating order, CPU time of one thread. The control is the plain step measured twice. Whether the usual "
        "way is cheaper on layers as narrow as the demo's, where what probes cost beside arithmetic weighs most, is "
        "said with its interval among the statements above.",
        _overhead,
    ),
    "speed": (
        "The same training step with the same adapter, one of rank r on the fused q, k, v of every block: this package "
        "and PEFT, median and quartiles of paired ratios, interleaved in alternating order, CPU time of one thread.",
        _speed,
    ),
}
