"""What the roles find in every family of models, and whether the numbers are right.

    OMP_NUM_THREADS=1 python -m benchmarks.families --json benchmarks/results/families.json

Each family in a process of its own. Goes on where the file ends (``--again`` does rows over); ``--docs FILE`` writes
the table.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import logging
import os
import resource
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastlora import testing

from ..harness import result_files
from ..harness.machine import versions
from . import checks, docs, structure, ways
from .models import Family, families

LIBRARIES = ("torch", "transformers", "timm", "open_clip_torch", "torchvision")  # diffusers is an extra
SECONDS = 240
COLUMNS = ("slices", "gradients", "statistics", "peft", "checkpointing", "compile")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows so far, and where new ones go")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="families, or libraries")
    parser.add_argument("--again", action="store_true", help="rows that are there, too")
    parser.add_argument("--compile", action="store_true", help="compile each, too, which takes most of the time")
    parser.add_argument("--jobs", type=int, default=1, help="families at a time (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="CPU time of a row (default: %(default)s)")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="write the rows as a table of the documentation")
    given = parser.parse_args(argv)
    rows = result_files.read(given.json)["rows"] if given.json is not None and given.json.exists() else {}
    wanted = {
        key: family for family in families() for key in [f"{family.library}/{family.name}"]
        if (given.only is None or {family.name, family.library, key} & set(given.only))
        and (given.again or key not in rows)
    }  # fmt: skip
    if wanted:
        _prepare()
    examine = functools.partial(examined, compiled=given.compile, seconds=given.seconds)
    for key, row in _in_children(wanted, examine, given.seconds, given.jobs):
        sys.stdout.write(f"{key}: {docs.one_line(row)}\n")
        sys.stdout.flush()
        rows[key] = row
        if given.json is not None:
            part = given.json.with_suffix(".part")
            result_files.write(part, {"of": versions(LIBRARIES), "rows": dict(sorted(rows.items()))})
            part.replace(given.json)
    if given.docs is not None:
        given.docs.write_text(docs.page(rows), encoding="utf-8")
    return 0


def _prepare() -> None:
    """What every family needs is imported once: the children are forks."""
    torch.set_num_threads(1)
    testing.enable_torchvision()
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    for name in ("peft", "timm", "open_clip", "transformers.models.auto.modeling_auto", "torch._dynamo", "diffusers"):
        with contextlib.suppress(ImportError):
            __import__(name)
    gc.freeze()


def _in_children(
    wanted: dict[str, Family], examine: Callable[[Family], dict[str, Any]], seconds: int, jobs: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows as they are ready, each made in a fork, so that neither a crash nor a hang takes the others with it."""
    waiting, running = dict(wanted), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            key = next(iter(waiting))
            family = waiting.pop(key)
            source, sink = os.pipe()
            if (child := os.fork()) == 0:
                try:
                    resource.setrlimit(resource.RLIMIT_CPU, (seconds + 60, seconds + 60))
                    with open(sink, "w", encoding="utf-8") as file:
                        file.write(json.dumps(examine(family)))
                finally:
                    os._exit(0)
            os.close(sink)
            running[source] = key, child, []
        for source in select.select([*running], [], [])[0]:
            key, child, parts = running[source]
            part = os.read(source, 1 << 16)
            parts.append(part)
            if part:
                continue
            del running[source]
            os.close(source)
            status = os.waitpid(child, 0)[1]
            text = b"".join(parts)
            yield key, json.loads(text) if text else _empty(f"its process ended with status {status}")


def _empty(reason: str = "") -> dict[str, Any]:
    columns = dict.fromkeys(COLUMNS, checks.NONE)
    return {"roles": {}, **columns, "left": [], "attention": "", "reason": reason, "seconds": 0.0}


@contextlib.contextmanager
def _limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"stopped after {seconds} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def examined(family: Family, compiled: bool = True, seconds: int = SECONDS) -> dict[str, Any]:
    """The row of a family: how many matrices each role takes, a verdict a column, and a reason where there is none."""
    row = _empty()
    started = time.process_time()
    with checks.reasons(row, "reason"):
        try:
            with _limit(seconds), family.within():
                _fill(row, _built(family), family, compiled)
        except TimeoutError as error:
            row["reason"] = str(error)
    if not row["roles"] and row["reason"] and family.whole is not None:
        _count_whole(row, family)
    row["seconds"] = round(time.process_time() - started, 1)
    return row


def _count_whole(row: dict[str, Any], family: Family) -> None:
    """The roles of the library's default size, in a row of no small model."""
    try:
        whole = family.whole()
    except ImportError:
        return
    except Exception as error:  # noqa: BLE001 - whatever the library raises is the reason
        row["reason"] = f"{family.library} does not build its default size: {checks.short(str(error))}"
        return
    row["roles"] = structure.role_counts(whole)
    row["structure"] = True
    if not row["roles"] and structure.why_no_attention(whole) == structure.NO_ATTENTION:
        row["reason"] = structure.NO_ATTENTION


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
    row["roles"], row["left"] = structure.role_counts(base), structure.left_over(base)
    refused = {name: why for role in row["roles"] for name, why in checks.refusals(base, role).items()}
    if refused:
        name, why = next(iter(refused.items()))
        row["reason"] = f"{name} is left out (exclude_modules): {why}"[:200]
    for role in [*row["roles"]]:
        if not set(checks.role_targets(base, role)) - set(refused):
            del row["roles"][role]
    if not {"qkv", "mixer"} & set(row["roles"]) and not row["reason"]:
        row["reason"] = structure.why_no_attention(base)
    row["reason"] = row["reason"] or structure.experts_left(base)
    with checks.reasons(row, "slices"):
        unknown = structure.unknown_layouts(base)
        row["slices"] = f"not known: {unknown[0]}" if unknown else checks.check_slices(base, family.run)
    inner, row["attention"] = structure.contained(base, row["roles"]), structure.attention_code(base)
    for role in row["roles"]:
        for column, check in (
            ("gradients", checks.check_numbers), ("peft", checks.check_files),
            ("checkpointing", ways.check_checkpointing), ("compile", ways.check_compile if compiled else None),
        ):  # fmt: skip
            again = role in inner and column in ("checkpointing", "compile")
            if check is None or again or row[column] not in (checks.OK, checks.NONE):
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
