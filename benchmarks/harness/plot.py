"""The picture of a run: time of each variant against PEFT, and what statistics cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PEER, OURS, FLOOR = "#b0b7bf", "#1f77b4", "#d9a441"
LAYER_ROWS = {
    "frozen": "frozen layers, no adapters",
    "fastlora": "fastlora",
    "fastlora_compiled": "fastlora, torch.compile",
    "python": "fastlora, pure Python",
    "function": "autograd.Function by hand",
    "handwritten": "plain torch by hand",
    "peft": "PEFT",
    "peft_compiled": "PEFT, torch.compile",
    "peft_fp32": "PEFT, fp32 adapters",
}
COST_ROWS = {
    "probes_step": ("probes", "ratio_to_fastlora"),
    "act_var_step": ("probes + act_var", "ratio_to_fastlora"),
    "exact_step": ("exact, every step", "ratio_to_fastlora"),
    "naive": ("requires_grad on W (PEFT)", "ratio_to_peft"),
}
_WHISKERS = {"elinewidth": 0.8, "ecolor": "#444444"}


def failed(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Results whose numbers were wrong: while there are any, no time of anything is shown."""
    return [result for result in document["results"] if result.get("gate", "passed") != "passed"]


def plot(document: dict[str, Any], path: Path) -> bool:
    """Draw ``path``; False where matplotlib is not installed, nothing binding was measured, or the gate is red."""
    results = [r for r in document["results"] if r["kind"] == "layer" and r["binding"]]
    if failed(document):
        return False
    try:
        import matplotlib
    except ImportError:
        return False
    if not results:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measured = {row["variant"] for result in results for row in result["rows"]}
    names = [name for name in reversed(LAYER_ROWS) if name in measured]
    costs = [name for name in reversed(COST_ROWS) if name in measured]
    figure, axes = plt.subplots(
        2, len(results), squeeze=False, sharey="row", figsize=(max(3 + 2.2 * len(results), 7.5), 5.8),
        gridspec_kw={"height_ratios": [max(len(names), 1), max(len(costs), 1)]}, layout="constrained",
    )  # fmt: skip
    for column, result in enumerate(results):
        rows = {row["variant"]: row for row in result["rows"]}
        _ratios(axes[0, column], f"{result['shape']} {result['dtype']}\n{result['model']}", rows, names)
        _costs(axes[1, column], rows, costs)
    versions = document["environment"]
    machine = f"{versions['cpu']}, one thread, torch {versions['torch']}, peft {versions['peft']}"
    figure.suptitle(f"q, k, v with LoRA, forward and backward: time / PEFT's, shorter is faster\n{machine}", size=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def _colour(name: str) -> str:
    if name == "frozen":
        return FLOOR
    return OURS if name.startswith(("fastlora", "python", "probes", "act_var", "exact")) else PEER


def _ratios(axis, title: str, rows: dict[str, Any], names: list[str]) -> None:
    """Bars of the medians, whiskers from the tenth to the ninetieth percentile, the number in each bar."""
    for place, name in enumerate(names):
        if name not in rows:
            continue
        ratio = rows[name]["ratio_to_peft"]
        middle = ratio["median"]
        axis.barh(place, middle, xerr=[[middle - ratio["p10"]], [ratio["p90"] - middle]], color=_colour(name),
                  error_kw=_WHISKERS)  # fmt: skip
        axis.text(
            0.04, place, f"{middle:.2f}", va="center", size=8, color="white" if _colour(name) == OURS else "black"
        )
    if "frozen" in rows:
        axis.axvline(rows["frozen"]["ratio_to_peft"]["median"], color=FLOOR, linewidth=1.2, linestyle="--")
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(names)), [LAYER_ROWS[name] for name in names], size=8)
    axis.set_xlim(0, 1.6)
    axis.set_title(title, size=9)


def _costs(axis, rows: dict[str, Any], names: list[str]) -> None:
    """What each kind of statistics adds, in percent, with the 95 % interval of the median."""
    for place, name in enumerate(names):
        if name not in rows:
            continue
        ratio = rows[name][COST_ROWS[name][1]]
        low, middle, high = (100 * (ratio[q] - 1) for q in ("median_low", "median", "median_high"))
        whiskers = [[middle - low], [high - middle]]
        axis.barh(place, middle, xerr=whiskers, color=_colour(name), error_kw=_WHISKERS)
        axis.text(max(high, 0) + 3, place, f"{middle:+.1f} %", va="center", size=8)
    axis.set_yticks(range(len(names)), [COST_ROWS[name][0] for name in names], size=8)
    axis.axvline(0.0, color="black", linewidth=0.8)
    axis.set_xlim(-12, 120)
    axis.set_xlabel("added by statistics, %", size=8)
