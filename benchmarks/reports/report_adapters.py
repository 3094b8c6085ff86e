"""The sections of the report on many adapters in one batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..harness.tables import cell, table

Results = list[dict[str, Any]]


def _verdict(value: float, limit: float) -> str:
    return "met" if value <= limit else "missed"


def _batch(result: dict[str, Any], labels: dict[str, str]) -> Iterator[str]:
    outputs, case = "/".join(map(str, result["outputs"])), result["case"]
    yield (
        f"### {result['model']}: M = {result['rows_of_x']}, {result['width']} -> {outputs}, {result['present']} of "
        f"{result['adapters']} adapters in the batch, mean rank of a row {result['mean_rank']:.1f} ({case})"
    )
    yield ""
    rows = []
    for row in result["rows"]:
        part, error = row.get("part_ms"), result["errors"].get(row["variant"])
        rows.append([labels[row["variant"]], f"{row['ms']['median']:.2f}", cell(row["ratio_to_one"]),
                     f"{part['median']:.2f}" if part else "", cell(row.get("part_to_loop")),
                     "" if error is None else f"{error:.0e}", str(row["ms"]["rounds"])])  # fmt: skip
    header = ["variant", "ms", "ratio to one adapter [p10, p90]", "adapters' part, ms", "part / loop's [p10, p90]",
              "error", "rounds"]  # fmt: skip
    yield from table(header, rows)


def _batches(results: Results, labels: dict[str, str]) -> Iterator[str]:
    named = {**labels, "fastlora": "fastlora, one adapter of rank 15", "control": "the same again (control)"}
    yield "## Many adapters in one batch"
    yield ""
    yield "Forward and backward of the query, key and value projections inside `fastlora.use_adapters(model, ids)`,"
    yield "whose sorting of the rows is in the time although a model's layers share it; the loop is told its rows"
    yield "beforehand."
    yield "The adapters' part is what a variant takes over the frozen layers in the same round."
    for result in results:
        yield ""
        yield from _batch(result, named)


def _apart(results: Results, labels: dict[str, str]) -> Iterator[str]:
    yield "## Adapters together against each alone"
    yield ""
    yield "All adapters in one batch (one id a token) against a run of each on its own rows, taken out beforehand."
    yield ""
    rows = []
    for result in results:
        times = {row["variant"]: row for row in result["rows"]}
        apart, whole = times["separate"], times["fastlora"]
        rows.append([result["case"], str(result["present"]), f"{result['mean_rank']:.1f}",
                     f"{times['bare']['ms']['median']:.2f}", f"{whole['ms']['median']:.2f}",
                     f"{apart['ms']['median']:.2f}", cell(apart["ratio_to_one"])])  # fmt: skip
    header = ["adapters, ids", "present", "mean rank", "frozen, ms", "together, ms", "apart, ms",
              "apart / together [p10, p90]"]  # fmt: skip
    yield from table(header, rows)


def _segments(results: Results, labels: dict[str, str]) -> Iterator[str]:
    yield "## Building the rows' order"
    yield ""
    rows = []
    for result in results:
        ms, limit = result["ms"], result["limit_ms"]
        rows.append([result["ids"], str(result["tokens"]), str(result["adapters"]), cell(ms), f"{limit:.1f}",
                     _verdict(ms["median"], limit), str(result["bytes"]), str(ms["rounds"])])  # fmt: skip
    header = ["ids", "tokens", "adapters", "ms [p10, p90]", "target, ms", "verdict", "bytes kept", "rounds"]
    yield from table(header, rows, (0, 5))


def _layout(results: Results, labels: dict[str, str]) -> Iterator[str]:
    yield "## The layout of a layer's adapters"
    yield ""
    yield "Kept from batch to batch; a change packs one adapter again."
    yield ""
    rows = []
    for result in results:
        rows.append([result["what"], str(result["adapters"]), str(result["projections"]), cell(result["ms"]),
                     str(result["bytes"]), str(result["factor_bytes"]), str(result["ms"]["rounds"])])  # fmt: skip
    header = ["what", "adapters", "projections", "ms [p10, p90]", "bytes of the layout", "bytes of A and B", "rounds"]
    yield from table(header, rows)


def _penalty(results: Results, labels: dict[str, str]) -> Iterator[str]:
    named = {
        "penalty": "`tracker.apply_penalty`, one native launch",
        "penalty_formula": "the same by the formula in PyTorch",
    }
    for result in results:
        block = next(row for row in result["rows"] if row["variant"] == "fastlora")
        yield f"## Gradient of the penalty of {result['matrices']} matrices"
        yield ""
        yield "RoBERTa-base, every linear of twelve blocks at rank 8, batch 32 x 64. The step is estimated: 12 times"
        yield f"forward and backward of one block, measured in the same rounds ({block['ms']['median']:.0f} ms)."
        yield ""
        rows = []
        for row in result["rows"]:
            if row["variant"] in named:
                limit, share = result["limit_percent"], row["percent"]
                rows.append([named[row["variant"]], f"{row['ms']['median']:.2f}", cell(share), f"{limit:.1f}",
                             _verdict(share["median"], limit), str(row["ms"]["rounds"])])  # fmt: skip
        header = ["what", "ms", "% of the step [p10, p90]", "target, %", "verdict", "rounds"]
        yield from table(header, rows, (0, 4))


SECTIONS = (
    ("adapters", _batches),
    ("apart", _apart),
    ("segments", _segments),
    ("layout", _layout),
    ("penalty", _penalty),
)
