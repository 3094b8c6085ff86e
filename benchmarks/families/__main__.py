"""What the roles find in every family of models, and whether the numbers are right.

    OMP_NUM_THREADS=1 python -m benchmarks.families --json benchmarks/results/families.json

Goes on where the file ends (``--again`` does rows over); ``--compile`` adds a column. ``--docs FILE`` writes the table.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastlora import testing

from ..harness import result_files
from . import checks, docs
from .models import Family, families

SECONDS = 30
COLUMNS = ("slices", "gradients", "statistics", "peft", "checkpointing", "compile")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows so far, and where new ones go")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="families, or libraries")
    parser.add_argument("--again", action="store_true", help="rows that are there, too")
    parser.add_argument("--compile", action="store_true", help="compile each, which takes a minute a family")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="limit of a row (default: %(default)s)")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="write the rows as a table of the documentation")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    testing.enable_torchvision()
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    rows = _read(given.json)
    for family in families():
        key = f"{family.library}/{family.name}"
        chosen = given.only is None or {family.name, family.library, key} & set(given.only)
        if not chosen or (key in rows and not given.again):
            continue
        row = examined(family, given.compile, given.seconds)
        sys.stdout.write(f"{key}: {docs.one_line(row)}\n")
        sys.stdout.flush()
        rows = {**_read(given.json), key: row} if given.json is not None else {**rows, key: row}
        _write(given.json, rows)
    if given.docs is not None:
        given.docs.write_text(docs.page(rows), encoding="utf-8")
    return 0


def _read(path: Path | None) -> dict[str, dict[str, Any]]:
    return result_files.read(path)["rows"] if path is not None and path.exists() else {}


def _write(path: Path | None, rows: dict[str, dict[str, Any]]) -> None:
    if path is None:
        return
    part = path.with_suffix(f".{os.getpid()}")
    result_files.write(part, {"rows": dict(sorted(rows.items()))})
    part.replace(path)


@contextlib.contextmanager
def _limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"stopped after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def examined(family: Family, compiled: bool = False, seconds: int = SECONDS) -> dict[str, Any]:
    """The row of a family: how many matrices each role takes, a verdict a column, and a reason where there is none."""
    row: dict[str, Any] = {"roles": {}, **dict.fromkeys(COLUMNS, checks.NONE), "left": [], "reason": ""}
    started = time.monotonic()
    with checks.reasons(row, "reason"):
        try:
            with _limit(seconds):
                base = _built(family)
                _fill(row, base, family, compiled)
        except TimeoutError as error:
            row["reason"] = str(error)
    row["seconds"] = round(time.monotonic() - started, 1)
    return row


def _built(family: Family) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = family.make().double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.add_(torch.randn(parameter.shape, dtype=parameter.dtype), alpha=0.05)
    return model.requires_grad_(True)


def _fill(row: dict[str, Any], base: nn.Module, family: Family, compiled: bool) -> None:
    with torch.no_grad():
        first, second = family.run(base), family.run(base)
    checks.same(first, second, "two passes of the base model differ")
    if not checks.floats(first) or not checks.floats(first)[0].isfinite().all():
        raise ValueError("its small random model has no finite output")
    row["roles"], row["left"] = checks.role_counts(base), checks.left_over(base)
    refused = {name: why for role in row["roles"] for name, why in checks.refusals(base, role).items()}
    if refused:
        name, why = next(iter(refused.items()))
        row["reason"] = f"{name} is left out (exclude_modules): {why}"[:200]
    for role in [*row["roles"]]:
        if not set(checks.role_targets(base, role)) - set(refused):
            del row["roles"][role]
    if not {"qkv", "mixer"} & set(row["roles"]) and not row["reason"]:
        row["reason"] = checks.why_no_attention(base)
    with checks.reasons(row, "slices"):
        unknown = checks.unknown_layouts(base)
        row["slices"] = f"not known: {unknown[0]}" if unknown else checks.check_slices(base, family.run)
    for role in row["roles"]:
        for column, check in (
            ("gradients", checks.check_numbers), ("peft", checks.check_files),
            ("checkpointing", checks.check_checkpointing), ("compile", checks.check_compile if compiled else None),
        ):  # fmt: skip
            if check is None or row[column] not in (checks.OK, checks.NONE):
                continue
            with checks.reasons(row, column):
                found = check(base, family.run, role)
                if column == "gradients":
                    found, statistics = found
                    row["statistics"] = _worse(row["statistics"], statistics)
                row[column] = _worse(row[column], found)


def _worse(before: str, found: str) -> str:
    """A reason before ``ok``, ``ok`` before nothing."""
    return max(before, found, key=lambda verdict: (verdict not in (checks.OK, checks.NONE), verdict == checks.OK))


if __name__ == "__main__":
    sys.exit(main())
