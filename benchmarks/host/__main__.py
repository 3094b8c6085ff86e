"""What a layer costs the host: CPU time of forward and backward on a GPU whose kernels take none, and on small layers.

    OMP_NUM_THREADS=1 python -m benchmarks.host --json benchmarks/results/host.json

Builds the null GPU at the first run (twenty seconds). Prints a table for each case and a verdict for each target.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastlora import testing

from ..harness import result_files
from ..harness.peers import LABELS
from ..harness.tables import table
from .cases import ADAPTERS, CASES, DROPOUT
from .measure import BASES, environment, measure
from .null_gpu import load, null_gpu
from .verdict import Verdict, verdicts

ROUNDS = 41
NAMES = LABELS | {
    "four_adapters": f"fastlora, {ADAPTERS} adapters in one batch",
    "autocast": "fastlora under autocast",
    "peft_autocast": "PEFT under autocast",
    "dropout": f"fastlora, dropout p = {DROPOUT}",
    "peft_dropout": f"PEFT, dropout p = {DROPOUT}",
}
COUNTED = ("launches", "gemms", "kernels", "allocations")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the rows go (default: nowhere)")
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, metavar="N", help="rounds of a case (default: %(default)s)"
    )
    parser.add_argument("--case", nargs="+", choices=tuple(CASES), default=tuple(CASES), help="default: all")
    given = parser.parse_args(argv)
    if given.rounds < 1:
        parser.error(f"--rounds: expected a positive integer, got {given.rounds}")
    torch.set_num_threads(1)
    testing.enable_torchvision()
    rows = []
    for name, found in _measured(given.case, given.rounds):
        rows += found
        sys.stdout.write("\n".join(["", f"## {name}: {CASES[name].title}", "", *_table(found), ""]))
        sys.stdout.flush()
    judged = verdicts(rows)
    sys.stdout.write("\n".join(["", "## Targets", "", *_verdicts(judged), ""]))
    if given.json is not None:
        result_files.write(given.json, _document(environment(given.rounds), rows, judged))
    return 0


def _measured(cases: Sequence[str], rounds: int) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Cases of the CPU first, outside of the null GPU, which has to be loaded before the first backward."""
    if any(CASES[name].null for name in cases):
        load()
    for name in cases:
        if not CASES[name].null:
            yield name, measure(name, rounds, None)
    if any(CASES[name].null for name in cases):
        with null_gpu() as gpu:
            for name in cases:
                if CASES[name].null:
                    yield name, measure(name, rounds, gpu)


def _quartiles(found: Mapping[str, float] | None, digits: int) -> str:
    if found is None:
        return ""
    return f"{found['median']:.{digits}f} [{found['p25']:.{digits}f}, {found['p75']:.{digits}f}]"


def _table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """µs and ratios as median [quartiles], and what one call did."""
    bases = [base for base in BASES if f"over_{base}" in rows[0]]
    counted = COUNTED if any(row["counts"] for row in rows) else ()
    header = ["variant", "µs", *(f"over {NAMES[base]}" for base in bases), *counted]
    yield from table(
        header,
        [
            [
                NAMES.get(row["variant"], row["variant"]),
                _quartiles(row["us"], 0),
                *(_quartiles(row[f"over_{base}"], 2) for base in bases),
                *(str(row["counts"][name]) if row["counts"] else "" for name in counted),
            ]
            for row in rows
        ],
    )


def _verdicts(judged: Sequence[Verdict]) -> Iterator[str]:
    header = ["target", "case", "at most", "found", ""]
    rows = [
        [v.target.text, v.case, f"{v.target.limit:g}", _quartiles(v.found, 2), "met" if v.met else "**not met**"]
        for v in judged
    ]
    yield from table(header, rows, words=(0, 1, 4))


def _document(where: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], judged: Sequence[Verdict]) -> dict[str, Any]:
    """What a result file holds."""
    targets = [{**v.target._asdict(), "cases": [v.case], "median": v.found["median"], "met": v.met} for v in judged]
    return {"environment": where, "rows": rows, "targets": targets}


if __name__ == "__main__":
    sys.exit(main())
