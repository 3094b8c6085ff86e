"""Tables and a plot from a result file: ``python -m benchmarks.reports.report benchmarks/results/layer.json``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..harness import result_files
from ..harness.plot import failed, plot
from ..harness.tables import cell, table
from . import report_adapters, report_statistics

NOT_MEASURED = "informative: this CPU has neither avx512_bf16 nor AMX, bf16 is emulated"
# Rows whose ratio to untracked fastlora is the cost of statistics.
STATISTICS = ("control", "probes", "act_var", "probes_step", "act_var_step", "exact_step")
MEASURES = {
    "ratio_to_peft": "time of PEFT",
    "ratio_to_frozen": "time of the frozen layers",
    "ratio_to_fastlora": "time without statistics",
    "ratio_to_one": "time of one adapter",
    "part_to_loop": "adapters' part of the loop",
}


def _layers(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [result for result in document["results"] if result["kind"] == "layer"]


def _environment(environment: dict[str, Any]) -> Iterator[str]:
    load = ", ".join(f"{value:.1f}" for value in environment["load_average"])
    yield f"{environment['cpu']}, {environment['cores']} cores visible, {environment['threads']} thread used."
    yield (
        f"{environment['clock']}, variants interleaved in alternating order, {environment['warmup_rounds']} warm-up "
        f"rounds discarded, garbage collector off while timing. Load average at the end: {load}."
    )
    native = environment["native_isa"] or "not built, so the pure-Python backend was measured"
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


def _row(result: dict[str, Any], variant: str) -> dict[str, Any] | None:
    return next((row for row in result["rows"] if row["variant"] == variant), None)


def _verdict(ratio: dict[str, float], limit: float, binding: bool) -> str:
    verdict = "met" if ratio["median"] <= limit else "missed"
    noise = " (within noise)" if ratio["median_low"] <= limit <= ratio["median_high"] else ""
    return verdict + noise + ("" if binding else ", not binding here")


def _targets(results: list[dict[str, Any]], labels: dict[str, str]) -> Iterator[str]:
    yield "## Targets"
    yield ""
    yield "Medians [their 95 % bootstrap intervals]; a verdict is by the median, and within noise where the target lies"
    yield "inside the interval. The frozen layers are what must be computed in any case: a target below their own ratio"
    yield "to PEFT (last column) needs a faster matmul than this machine's; the ratio to them shows what adapters cost."
    yield ""
    rows = []
    for result in results:
        case = f"{result['shape']} {result['dtype']}" if result["kind"] == "layer" else result["model"]
        for target in result.get("targets", ()):
            row = _row(result, target["variant"])
            if row is None or target["measure"] not in row:
                continue
            ratio, floor = row[target["measure"]], _row(result, "frozen")
            measured = f"{ratio['median']:.3f} [{ratio['median_low']:.3f}, {ratio['median_high']:.3f}]"
            shown = f"{floor['ratio_to_peft']['median']:.3f}" if floor and target["measure"] == "ratio_to_peft" else ""
            verdict = _verdict(ratio, target["limit"], result.get("binding", True))
            what, limit = labels[target["variant"]], f"{target['limit']:.2f}"
            rows.append([case, what, MEASURES[target["measure"]], limit, measured, verdict, shown])
    yield from table(
        ["case", "what", "of the", "target", "measured [95 %]", "verdict", "frozen / PEFT"], rows, (0, 1, 2, 5)
    )


def _mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.1f}"


def _layer(result: dict[str, Any], labels: dict[str, str]) -> Iterator[str]:
    yield f"### {_title(result)}"
    yield ""
    note = "" if result["binding"] else f" ({NOT_MEASURED})"
    yield (
        f"{result['calls_per_round']} calls a round{note}. Saved: MiB that autograd keeps for backward, x included. "
        f"Error: the largest against float64."
    )
    yield ""
    rows = []
    for row in result["rows"]:
        name, saved = row["variant"], result["saved_bytes"].get(row["variant"])
        error = result["errors"].get(name)
        rows.append([labels[name], f"{row['ms']['median']:.3f}", cell(row["ratio_to_peft"]),
                     cell(row["ratio_to_frozen"]), _mebibytes(saved), "" if error is None else f"{error:.0e}",
                     str(row["ms"]["rounds"])])  # fmt: skip
    header = ["variant", "ms", "ratio to PEFT [p10, p90]", "ratio to frozen [p10, p90]", "saved", "error", "rounds"]
    yield from table(header, rows)


def _percent(ratio: dict[str, float] | None) -> str:
    if ratio is None:
        return ""
    low, middle, high = (100 * (ratio[q] - 1) for q in ("median_low", "median", "median_high"))
    return f"{middle:+.2f} [{low:+.2f}, {high:+.2f}]"


def _statistics(results: list[dict[str, Any]], labels: dict[str, str]) -> Iterator[str]:
    yield "## What statistics add to the layer's training step"
    yield ""
    yield "Percent over untracked fastlora: median of paired ratios [its 95 % interval]; the naive way over PEFT, on"
    yield "which it is built. The control runs the untracked code again: what it shows is noise. Here every step is"
    yield "sampled; by default `track` measures the cost in a training step, and samples every n-th where it is over"
    yield "1 %."
    yield ""
    rows = []
    for result in results:
        ours = [_row(result, name) for name in STATISTICS]
        naive = _row(result, "naive")
        mark = "" if result["binding"] else " (informative)"
        rows.append(
            [
                f"{result['shape']} {result['dtype']}{mark}",
                *(_percent(row and row["ratio_to_fastlora"]) for row in ours),
                _percent(naive and naive["ratio_to_peft"]),
            ]
        )
    names = (labels[name].removeprefix("fastlora ").lstrip("+ ") for name in (*STATISTICS, "naive"))
    yield from table(["shape", *names], rows)


def _threads(results: list[dict[str, Any]], labels: dict[str, str]) -> Iterator[str]:
    yield f"## Wall-clock time with {results[0]['threads']} threads"
    yield ""
    yield "fp32. Informative: other processes take cores away from a program that waits for both of its own."
    yield ""
    rows = []
    for result in results:
        for row in result["rows"]:
            name, ms, rounds = labels[row["variant"]], f"{row['ms']['median']:.1f}", str(row["ms"]["rounds"])
            rows.append([result["shape"], name, ms, cell(row["ratio_to_peft"]), cell(row["ratio_to_frozen"]), rounds])
    header = ["shape", "variant", "ms", "ratio to PEFT [p10, p90]", "ratio to frozen [p10, p90]", "rounds"]
    yield from table(header, rows, (0, 1))


def _memory(results: list[dict[str, Any]], labels: dict[str, str]) -> Iterator[str]:
    yield "## Peak memory of a step"
    for result in results:
        outputs = "/".join(map(str, result["outputs"]))
        yield ""
        yield (
            f"{result['model']}: M = {result['rows_of_x']}, {result['width']} -> {outputs}, r = {result['rank']}, "
            f"fp32. MiB of resident memory that one step adds at most, each row in its own process; the largest [N, K] "
            f"gradient alone is {_mebibytes(result['gradient'])}. Saved: what autograd keeps for backward, x included."
        )
        yield ""
        rows = [[labels[row["variant"]], _mebibytes(row["peak"]), _mebibytes(row["saved"])] for row in result["rows"]]
        yield from table(["variant", "peak", "saved"], rows)


def _lora_ga(results: list[dict[str, Any]], labels: dict[str, str]) -> Iterator[str]:
    for result in results:
        yield "## Peak memory of a LoRA-GA start"
        yield ""
        yield f"{result['model']}, r = {result['rank']}, fp32. MiB of resident memory that the start adds at most, each"
        gradients = _mebibytes(result["gradients"])
        yield f"row in its own process; the gradients of the weights, which PEFT keeps, are {gradients}."
        yield ""
        yield from table(["variant", "peak"], [[r["label"], _mebibytes(r["peak"])] for r in result["rows"]])


def _steps(results: list[dict[str, Any]], labels: dict[str, str]) -> Iterator[str]:
    yield "## tracker.step() of a model"
    yield ""
    yield "Once per optimiser step, for all layers together; in the tables above one layer bears its fixed part alone."
    yield ""
    rows = []
    for result in results:
        ms = result["ms"]
        rows.append([", ".join(result["statistics"]), str(result["matrices"]), cell(ms), str(ms["rounds"])])
    yield from table(["statistics", "matrices", "ms [p10, p90]", "rounds"], rows)


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
            ratio, ours = cell(row["ratio_to_peft"]), _percent(row["ratio_to_fastlora"])
            rows.append([labels[row["variant"]], f"{row['ms']['median']:.1f}", ratio, ours])
        yield from table(["variant", "ms", "ratio to PEFT [p10, p90]", "% over fastlora [95 %]"], rows)


def _merges(results: list[dict[str, Any]], labels: dict[str, str]) -> Iterator[str]:
    for result in results:
        yield "## merge"
        yield ""
        weights = f"{result['weights'] / 1e6:.1f} M weights"
        yield f"W + s B A of {result['matrices']} matrices with {weights}, r = {result['rank']}, looked through for"
        yield "what is not finite; taking it back is not timed."
        yield ""
        rows = [[r["label"], cell(r["ms"], 1), cell(r["ratio_to_fp32"]), str(r["ms"]["rounds"])]
                for r in result["rows"]]  # fmt: skip
        yield from table(["variant", "ms [p10, p90]", "ratio to fp32 [p10, p90]", "rounds"], rows)


def _experts(results: list[dict[str, Any]], labels: dict[str, str]) -> Iterator[str]:
    for result in results:
        yield "## experts"
        yield ""
        experts = f"{result['experts']} experts, {result['active']} of them a token"
        yield f"A step of {result['model']}: {result['layers']} layers, {experts}, {result['tokens']} tokens,"
        yield f"r = {result['rank']} for each expert's two matrices, fp32."
        yield ""
        rows = [[r["label"], cell(r["ms"], 1), cell(r["ratio_to_frozen"]), str(r["ms"]["rounds"])]
                for r in result["rows"]]  # fmt: skip
        yield from table(["variant", "ms [p10, p90]", "ratio to frozen [p10, p90]", "rounds"], rows)


def _dora(results: list[dict[str, Any]], labels: dict[str, str]) -> Iterator[str]:
    for result in results:
        yield f"## DoRA: {result['model']}, {result['tokens']} rows"
        yield ""
        yield f"Forward and backward with r = {result['rank']}, fp32: gradients of x, the factors and the lengths."
        yield ""
        rows = [[r["label"], cell(r["ms"], 1), cell(r["ratio_to_fastlora"]), cell(r["ratio_to_peft_lora"]),
                 str(r["ms"]["rounds"])] for r in result["rows"]]  # fmt: skip
        header = ["variant", "ms [p10, p90]", "ratio to fastlora [p10, p90]", "ratio to PEFT [p10, p90]", "rounds"]
        yield from table(header, rows)


def _red(results: list[dict[str, Any]]) -> Iterator[str]:
    yield "## The correctness gate is red: no time is given"
    yield ""
    for result in results:
        yield f"- {result.get('shape', result['kind'])} {result.get('dtype', '')}: {result['reason']}"


def _claim(models: list[dict[str, Any]]) -> Iterator[str]:
    """The verdict on what statistics cost: the claim is at most 1 % of a whole training step."""
    limit = next(t["limit"] for t in models[0]["targets"] if t["variant"] == "model_probes")
    for result in models:
        cost = _row(result, "model_probes")["ratio_to_fastlora"]
        control = _row(result, "control")["ratio_to_fastlora"]
        decided = "met" if cost["median_high"] <= limit else "missed" if cost["median_low"] > limit else "undecided"
        yield (
            f"**{result['model']}: statistics cost {_percent(cost)} % of a training step** (at most "
            f"{100 * (limit - 1):.1f}: {decided}; the same code again {_percent(control)} %, {cost['rounds']} rounds)."
        )


def _lines(document: dict[str, Any]) -> Iterator[str]:
    labels, layers = document["labels"], _layers(document)
    yield f"# {document.get('title', 'Layer benchmarks')}"
    yield ""
    yield from _environment(document["environment"])
    red = failed(document)
    if red:
        yield ""
        yield from _red(red)
        return
    models = [result for result in document["results"] if result["kind"] == "model"]
    if models:
        yield ""
        yield from _claim(models)
    aimed = [result for result in document["results"] if result.get("targets")]
    if aimed:
        yield ""
        yield from _targets(aimed, labels)
    if layers:
        yield ""
        yield "## Layers"
        yield ""
        yield "Forward and backward of the query, key and value projections: gradients of x and all adapters, B not"
        yield "zero. Ratios are medians of (variant / PEFT with adapters in the base dtype), and of (variant / the same"
        yield "layers frozen and without adapters), within a round: below 1 is faster."
    for result in layers:
        yield ""
        yield from _layer(result, labels)
    if layers:
        yield ""
        yield from _statistics(layers, labels)
    sections = (("threads", _threads), ("memory", _memory), ("model", _models), ("step", _steps), ("merge", _merges),
                ("experts", _experts), ("dora", _dora), ("lora_ga", _lora_ga))  # fmt: skip
    for kind, section in (*sections, *report_adapters.SECTIONS, *report_statistics.SECTIONS):
        found = [result for result in document["results"] if result["kind"] == kind]
        if found:
            yield ""
            yield from section(found, labels)


def markdown(document: dict[str, Any]) -> str:
    """The report of one run as Markdown."""
    return "\n".join(_lines(document)) + "\n"


def write(document: dict[str, Any], folder: Path, name: str = "layer") -> list[Path]:
    """Write ``name.json`` and ``name.md`` into a folder and the pictures that can be drawn; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.json"
    result_files.write(data, document)
    return [data, *render(document, folder, name)]


def render(document: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """The report of a document as Markdown and pictures."""
    text = folder / f"{name}.md"
    text.write_text(markdown(document))
    pictures = {folder / f"{name}.png": plot}
    pictures |= {folder / f"{name}_{kind}.png": draw for kind, draw in report_statistics.PLOTS.items()}
    return [text, *(path for path, draw in pictures.items() if draw(document, path))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path)
    parser.add_argument("--out", type=Path, help="folder for the Markdown and the pictures (default: beside the JSON)")
    arguments = parser.parse_args()
    folder = arguments.out or arguments.json.parent
    folder.mkdir(parents=True, exist_ok=True)
    made = render(result_files.read(arguments.json), folder, arguments.json.stem)
    if len(made) == 1:
        sys.stderr.write("no plot: matplotlib is not installed, or nothing to draw\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
