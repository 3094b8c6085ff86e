"""Sections and pictures of the report on statistics (cost against error) and on growth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..harness.tables import cell, table

Results = list[dict[str, Any]]
# Ways to the whole gradient, whose error is rounding; the naive way is PEFT's with requires_grad on W.
COLOURS = {"rademacher": "#1f77b4", "columns": "#d62728"}
WHOLE = {"naive": "ratio_to_peft", "hooks": "ratio_to_fastlora", "exact_step": "ratio_to_fastlora"}


def _percent(ratio: dict[str, float]) -> str:
    low, middle, high = (100 * (ratio[q] - 1) for q in ("median_low", "median", "median_high"))
    return f"{middle:+.1f} [{low:+.1f}, {high:+.1f}]"


def _cost(results: Results, labels: dict[str, str]) -> Iterator[str]:
    yield "## What ||G_W||² costs"
    yield ""
    yield "Forward and backward of q, k and v. % over the layers without statistics (the naive way: over PEFT, on"
    yield "which it is built), median of paired ratios [95 % bootstrap interval]; the control shows the noise. Kept:"
    yield "MiB that autograd holds for backward. With tracker.step() one layer bears alone what a model pays once."
    for result in results:
        outputs = "/".join(map(str, result["outputs"]))
        yield ""
        yield f"### {result['model']}: M = {result['rows_of_x']}, {result['width']} -> {outputs}, r = {result['rank']}"
        yield ""
        rows = []
        for row in result["rows"]:
            name = row["variant"]
            over = row["ratio_to_peft"] if name == "naive" else row["ratio_to_fastlora"]
            kept, error = result["saved_bytes"].get(name), result["errors"].get(name)
            size = "" if kept is None else f"{kept / 2**20:.2f}"
            wrong, rounds = "" if error is None else f"{error:.0e}", str(row["ms"]["rounds"])
            rows.append([labels[name], f"{row['ms']['median']:.3f}", _percent(over), size, wrong, rounds])
        yield from table(["way", "ms", "% over without [95 %]", "kept", "error", "rounds"], rows)


def _errors(results: Results, labels: dict[str, str]) -> Iterator[str]:
    yield "## How good estimates of ||G_W||² are"
    for result in results:
        first = result["rows"][0]
        yield ""
        yield (
            f"{result['model']} learning from {result['source']}: x and dy of {result['layers']} matrices at steps "
            f"{result['steps']}, {first['draws']} draws each ({first['calls'] * first['draws']:,} estimates a row). "
            f"Relative error, root mean square: of one step [p10, p90 over calls], and of an EMA with 0.98. The whole "
            f"gradient in fp32 is off by {result['rounding']:.0e}."
        )
        yield ""
        rows = [[row["kind"], str(row["k"]), f"{100 * row['single']:.1f} [{100 * row['single_p10']:.1f}, "
                 f"{100 * row['single_p90']:.1f}]", f"{100 * row['ema']:.2f}", f"{100 * row['bias']:+.2f}",
                 f"{row['spearman']:.4f}"] for row in result["rows"]]  # fmt: skip
        header = ["kind", "k", "one step, %", "EMA, %", "bias, %", "Spearman of the EMA with exact"]
        yield from table(header, rows)


def _mebibytes(some: list[int] | None) -> str:
    return f"{some[0] / 2**20:.2f} to {some[-1] / 2**20:.2f}" if some else "-"


def _growth(results: Results, labels: dict[str, str]) -> Iterator[str]:
    yield "## Growth"
    yield ""
    yield "Time of forward and backward (median of rounds), bytes that autograd keeps, and the peak of resident memory"
    yield "over parameters and x, as c·n^p: p by least squares on logarithms [95 % interval, from the residuals]."
    yield "Expected: what the operations alone say at these sizes."
    yield ""
    rows = []
    for result in results:
        fits = result["time"], result["kept"], result.get("peak")
        powers = [f"{f['p']:.2f} [{f['low']:.2f}, {f['high']:.2f}]" if f else "-" for f in fits]
        span = f"{result['sizes'][0]} to {result['sizes'][-1]}"
        rows.append([result["axis"], span, *powers,
                     result["expected"], f"{result['ms'][0]['median']:.2f} to {result['ms'][-1]['median']:.2f}",
                     _mebibytes(result["bytes"]), _mebibytes(result.get("peaks"))])  # fmt: skip
    header = ["over", "sizes", "time: p", "kept: p", "peak: p", "expected of time", "ms", "MiB kept", "MiB at the peak"]
    yield from table(header, rows, (0, 1, 5))
    for result in results:
        yield ""
        yield f"{result['axis']}: {result['case']}. {cell(result['ms'][-1], 2)} ms at the largest."


SECTIONS = (("statistics", _cost), ("estimates", _errors), ("growth", _growth))


def _canvas(path: Path, draw: Callable[[Any], Any], size: tuple[float, float]) -> bool:
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=size, layout="constrained")
    draw(figure)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def _points(costs: dict[str, Any], errors: dict[str, Any]) -> list[tuple[str, str, float, float, float, float]]:
    """(label, kind, cost in %, its interval, error) of every way that was both timed and judged."""
    rows, found = {row["variant"]: row for row in costs["rows"]}, []
    for row in errors["rows"]:
        ratio = rows.get(f"{row['kind']}_{row['k']}", {}).get("ratio_to_fastlora")
        if ratio:
            found.append((f"k = {row['k']}", row["kind"], *_span(ratio), row["ema"]))
    for name, measure in WHOLE.items():
        if name in rows:
            found.append((name.removesuffix("_step"), "whole", *_span(rows[name][measure]), errors["rounding"]))
    return found


def _span(ratio: dict[str, float]) -> tuple[float, float, float]:
    low, middle, high = (100 * (ratio[q] - 1) for q in ("median_low", "median", "median_high"))
    return middle, low, high


def pareto(document: dict[str, Any], path: Path) -> bool:
    """Cost against error, one panel a shape; False where there is nothing to draw, or the gate is red."""
    costs = [r for r in document["results"] if r["kind"] == "statistics"]
    errors = next((r for r in document["results"] if r["kind"] == "estimates"), None)
    if not costs or errors is None or any(r.get("gate", "passed") != "passed" for r in document["results"]):
        return False

    def draw(figure: Any) -> None:
        for axis, result in zip(figure.subplots(1, len(costs), sharey=True, squeeze=False)[0], costs, strict=True):
            for i, (label, kind, middle, low, high, error) in enumerate(_points(result, errors)):
                if kind == "whole":  # as good as exact: a line at its cost
                    axis.axvline(middle, color="#b0b7bf", linestyle="--", linewidth=1)
                    height = 0.98 - 0.2 * (i % 3)
                    axis.text(middle, height, f"{label}: {error:.0e}", rotation=90, size=7, ha="right", va="top",
                              transform=axis.get_xaxis_transform())  # fmt: skip
                    continue
                axis.errorbar(middle, 100 * error, xerr=[[middle - low], [high - middle]], fmt="o",
                              color=COLOURS.get(kind, "#555555"), label=kind if label == "k = 1" else None)  # fmt: skip
                axis.annotate(label, (middle, 100 * error), xytext=(4, 5), textcoords="offset points", size=8)
            axis.set_xscale("symlog", linthresh=2)
            axis.set_ylim(bottom=0)
            axis.axvline(0, color="black", linewidth=0.6)
            axis.set_xlabel("added to the layer's step, %")
            axis.set_title(result["model"], size=9)
        figure.axes[0].set_ylabel("error of the average, %")
        if figure.axes[0].get_legend_handles_labels()[0]:
            figure.axes[0].legend(fontsize=8, loc="lower right")
        cpu = document["environment"]["cpu"]
        figure.suptitle(f"||G_W||²: cost against error (tensors of {errors['model']}); {cpu}, one thread", size=9)

    return _canvas(path, draw, (3.2 + 3.2 * len(costs), 4.2))


def growth(document: dict[str, Any], path: Path) -> bool:
    """Time over each size on logarithmic axes, with the fitted power."""
    results = [r for r in document["results"] if r["kind"] == "growth"]
    if not results or any(r.get("gate", "passed") != "passed" for r in document["results"]):
        return False

    def draw(figure: Any) -> None:
        for axis, result in zip(figure.subplots(1, len(results), squeeze=False)[0], results, strict=True):
            times = [ms["median"] for ms in result["ms"]]
            sizes, fit = result["sizes"], result["time"]
            axis.loglog(sizes, times, "o", color="#1f77b4")
            axis.loglog(sizes, [fit["c"] * n ** fit["p"] for n in sizes], color="#1f77b4", linewidth=0.8)
            axis.set_title(f"{result['axis']}: p = {fit['p']:.2f}", size=9)
            axis.set_xticks(sizes[:: (len(sizes) + 3) // 4], map(str, sizes[:: (len(sizes) + 3) // 4]))
            axis.tick_params(labelsize=7, which="both")
            axis.minorticks_off()
        figure.axes[0].set_ylabel("ms")

    return _canvas(path, draw, (2.4 * len(results), 3.0))


PLOTS: dict[str, Callable[[dict[str, Any], Path], bool]] = {"pareto": pareto, "growth": growth}
