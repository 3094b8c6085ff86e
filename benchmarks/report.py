"""Tables and a plot from the JSON of the benchmarks: ``python benchmarks/report.py results/layer.json``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NOT_MEASURED = "informative: this CPU has neither avx512_bf16 nor AMX, bf16 is emulated"
PEERS = ("frozen", "handwritten", "peft", "peft_fp32")
# Rows whose ratio to untracked fastlora is the cost of statistics.
STATISTICS = ("control", "probes", "act_var", "probes_step", "act_var_step")


def _layers(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [result for result in document["results"] if result["kind"] == "layer"]


def _table(header: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + "|".join("---" if i == 0 else "---:" for i in range(len(header))) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _environment(environment: dict[str, Any]) -> Iterator[str]:
    load = ", ".join(f"{value:.1f}" for value in environment["load_average"])
    yield f"{environment['cpu']}, {environment['cores']} cores visible, {environment['threads']} thread used."
    yield (
        f"{environment['clock']}, variants interleaved in alternating order, {environment['warmup_rounds']} warm-up "
        f"rounds discarded, garbage collector off while timing. Load average at the end: {load}."
    )
    native = environment["native_isa"] or "not built, so the reference backend was measured"
    yield (
        f"torch {environment['torch']} ({environment['torch_cpu']}), peft {environment['peft']}, Python "
        f"{environment['python']}, fastlora {environment['fastlora']} at {environment['source']}, native: {native}."
    )


def _title(result: dict[str, Any]) -> str:
    kind = "fused" if result["fused"] else "separate"
    outputs = "/".join(map(str, result["outputs"]))
    return (
        f"{result['shape']} {result['dtype']}: {result['model']}, M = {result['rows_of_x']}, "
        f"{result['width']} -> {outputs} {kind}, r = {result['rank']}"
    )


def _cell(ratio: dict[str, float], digits: int = 3) -> str:
    return f"{ratio['median']:.{digits}f} [{ratio['p10']:.{digits}f}, {ratio['p90']:.{digits}f}]"


def _verdict(result: dict[str, Any]) -> str:
    if result["target"] is None:
        return "No target."
    if not result["binding"]:
        return f"Target {result['target']:.2f} of PEFT: not binding on this CPU."
    ratio = next(row["ratio_to_peft"]["median"] for row in result["rows"] if row["variant"] == "fastlora")
    return f"Target {result['target']:.2f} of PEFT: {'met' if ratio <= result['target'] else 'missed'} at {ratio:.3f}."


def _layer(result: dict[str, Any], labels: dict[str, str]) -> Iterator[str]:
    yield f"### {_title(result)}"
    yield ""
    if result["gate"] != "passed":
        yield f"The correctness gate failed, no ratio is given: {result['reason']}"
        return
    rounds, calls = result["rows"][0]["ms"]["rounds"], result["calls_per_round"]
    note = "" if result["binding"] else f" ({NOT_MEASURED})"
    yield f"{rounds} rounds of {calls} calls{note}; the last column is the largest error against float64."
    yield _verdict(result)
    yield ""
    rows = []
    for row in result["rows"]:
        ratio, error = row["ratio_to_peft"], result["errors"].get(row["variant"])
        quartiles = f"{ratio['p25']:.3f} to {ratio['p75']:.3f}"
        rows.append([labels[row["variant"]], f"{row['ms']['median']:.3f}", _cell(ratio), quartiles,
                     "" if error is None else f"{error:.0e}"])  # fmt: skip
    yield from _table(["variant", "ms", "ratio to PEFT [p10, p90]", "quartiles", "error"], rows)


def _percent(ratio: dict[str, float]) -> str:
    low, middle, high = (100 * (ratio[q] - 1) for q in ("median_low", "median", "median_high"))
    return f"{middle:+.2f} [{low:+.2f}, {high:+.2f}]"


def _statistics(results: list[dict[str, Any]], labels: dict[str, str]) -> Iterator[str]:
    yield "## What statistics add to the layer's training step"
    yield ""
    yield "Percent over untracked fastlora: median of paired ratios [its 95 % interval]. The control runs the untracked"
    yield "code again: what it shows is noise. Here every step is sampled; by default `track` samples every n-th step"
    yield "on layers that are too small, which divides the cost by the n of the last column."
    yield ""
    rows = []
    for result in results:
        by_name = {row["variant"]: row["ratio_to_fastlora"] for row in result["rows"]}
        mark = "" if result["binding"] else " (informative)"
        rows.append(
            [
                f"{result['shape']} {result['dtype']}{mark}",
                *(_percent(by_name[name]) for name in STATISTICS),
                str(result["every"]),
            ]
        )
    yield from _table(
        ["shape", *(labels[name].removeprefix("fastlora ").lstrip("+ ") for name in STATISTICS), "n"], rows
    )


def _steps(results: list[dict[str, Any]]) -> Iterator[str]:
    yield "## tracker.step() of a model"
    yield ""
    yield "Once per optimiser step, for all layers together; in the table above one layer bears its fixed part alone."
    yield ""
    rows = []
    for result in results:
        ms = result["ms"]
        rows.append([", ".join(result["statistics"]), str(result["matrices"]), _cell(ms), str(ms["rounds"])])
    yield from _table(["statistics", "matrices", "ms [p10, p90]", "rounds"], rows)


def _models(results: list[dict[str, Any]], labels: dict[str, str]) -> Iterator[str]:
    yield "## Whole training steps"
    yield ""
    yield "Forward, backward and AdamW of models with random weights, LoRA on q, k, v and a trained head; PEFT as"
    yield "`get_peft_model` makes it. Ratios within a round, as above; the control shows the noise."
    for result in results:
        rounds = result["rows"][0]["ms"]["rounds"]
        yield ""
        yield f"### {result['model']}, r = {result['rank']}, batch {list(result['batch'].values())[0]}, {rounds} rounds"
        yield ""
        rows = []
        for row in result["rows"]:
            ratio, ours = _cell(row["ratio_to_peft"]), _percent(row["ratio_to_fastlora"])
            rows.append([labels[row["variant"]], f"{row['ms']['median']:.1f}", ratio, ours])
        yield from _table(["variant", "ms", "ratio to PEFT [p10, p90]", "% over fastlora [95 %]"], rows)


def _lines(document: dict[str, Any]) -> Iterator[str]:
    labels, layers = document["labels"], _layers(document)
    yield "# Layer benchmarks"
    yield ""
    yield from _environment(document["environment"])
    yield ""
    yield "Forward and backward of the query, key and value projections: gradients of x and all adapters, B not zero."
    yield "Ratios are medians of (variant / PEFT with adapters in the base dtype) within a round: below 1 is faster."
    for result in layers:
        yield ""
        yield from _layer(result, labels)
    passed = [result for result in layers if result["gate"] == "passed"]
    if passed:
        yield ""
        yield from _statistics(passed, labels)
    models = [result for result in document["results"] if result["kind"] == "model"]
    if models:
        yield ""
        yield from _models(models, labels)
    steps = [result for result in document["results"] if result["kind"] == "step"]
    if steps:
        yield ""
        yield from _steps(steps)


def markdown(document: dict[str, Any]) -> str:
    """The report of one run as Markdown."""
    return "\n".join(_lines(document)) + "\n"


def write(document: dict[str, Any], folder: Path) -> list[Path]:
    """Write ``layer.json`` and ``layer.md`` into a folder; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    data, table = folder / "layer.json", folder / "layer.md"
    data.write_text(json.dumps(document, indent=1) + "\n")
    table.write_text(markdown(document))
    return [data, table]


def plot(document: dict[str, Any], path: Path) -> bool:
    """Bars of the ratios to PEFT with tenths as whiskers; False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = [result for result in _layers(document) if result["gate"] == "passed"]
    columns = max(min(len(results), 4), 1)
    lines = max(-(-len(results) // columns), 1)
    figure, axes = plt.subplots(lines, columns, figsize=(3.2 * columns, 3.2 * lines), sharex=True, squeeze=False)
    for axis in axes.flat[len(results) :]:
        axis.set_visible(False)
    for axis, result in zip(axes.flat, results, strict=False):
        shown = [row for row in reversed(result["rows"]) if not row["variant"].endswith("_step")]
        ratios = [row["ratio_to_peft"] for row in shown]
        below = [r["median"] - r["p10"] for r in ratios]
        above = [r["p90"] - r["median"] for r in ratios]
        colours = ["#999999" if row["variant"] in PEERS else "#1f77b4" for row in shown]
        axis.barh([row["variant"] for row in shown], [r["median"] for r in ratios], xerr=[below, above], color=colours)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_title(f"{result['shape']} {result['dtype']}" + ("" if result["binding"] else " (emulated)"))
        axis.set_xlabel("time / PEFT")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path)
    parser.add_argument("--out", type=Path, help="folder for layer.md and layer.png (default: beside the JSON)")
    arguments = parser.parse_args()
    document = json.loads(arguments.json.read_text())
    folder = arguments.out or arguments.json.parent
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "layer.md").write_text(markdown(document))
    if not plot(document, folder / "layer.png"):
        sys.stderr.write("no plot: matplotlib is not installed\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
