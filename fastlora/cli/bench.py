"""``fastlora bench``: the benchmarks of a checkout, with a table that fills while they run.

They are not part of an installed package: they compare with PEFT, timm and transformers, and are run where the code is
worked on. The command is a view of ``pytest --benchmark-only``, which measures and writes the report.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .._utils.installed import extra

SHORT = "S4 or recorded or test_error"  # the smallest layer, statistics on the smallest model, their error
SHORT_ROUNDS = 5
OK, FAILED = 0, 1


class MissingBenchmarks(Exception):
    """There is no checkout, or no pytest, to run the benchmarks with."""


def checkout() -> Path:
    """The folder that holds the package and the benchmarks beside it."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "conftest.py").is_file():
        raise MissingBenchmarks(
            f"bench: no benchmarks beside {Path(__file__).parents[1]}; they are not installed with the package: run "
            "the command from a checkout of the repository (pip install -e .)"
        )
    for name in ("pytest", "pytest_benchmark"):
        if importlib.util.find_spec(name) is None:
            raise MissingBenchmarks(f"bench: needs {name.replace('_', '-')}: {extra('test')}")
    return root


def command(root: Path, out: Path, short: bool, rounds: int | None, chosen: str | None) -> list[str]:
    """What is run; the options are those of ``benchmarks/conftest.py``."""
    chosen = chosen or (SHORT if short else None)
    rounds = rounds or (SHORT_ROUNDS if short else None)
    return [sys.executable, "-m", "pytest", str(root / "benchmarks"), "--benchmark-only", "-q",
            f"--rootdir={root}", f"--fastlora-results={out.resolve()}", "--fastlora-name=bench",
            *([f"--fastlora-rounds={rounds}"] if rounds else []), *(["-k", chosen] if chosen else [])]  # fmt: skip


def run(out: Path, short: bool, rounds: int | None, chosen: str | None) -> int:
    """Run the benchmarks and write Markdown, JSON and pictures to ``out``; 1 when a number was wrong."""
    root = checkout()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        stream, log = Path(folder) / "results", out / "bench.log"
        stream.touch()
        environment = {**os.environ, "FASTLORA_BENCH_STREAM": str(stream), "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
        with log.open("w") as output, _view() as show, stream.open() as lines:
            job = subprocess.Popen(command(root, out, short, rounds, chosen), cwd=root, env=environment, stdout=output,
                                   stderr=subprocess.STDOUT)  # fmt: skip
            try:
                _follow(job, lines, show)
            except BaseException:
                job.terminate()
                raise
            finally:
                job.wait()
    if job.returncode != 0:
        sys.stderr.write(f"fastlora: the benchmarks failed, see {log}; no time of theirs is given\n")
        return FAILED
    sys.stdout.write((out / "bench.md").read_text() if not sys.stdout.isatty() else f"report: {out / 'bench.md'}\n")
    return OK


def _follow(job: subprocess.Popen, lines: Any, show: Any) -> None:
    """Show results as they come, until the job has ended and all were read."""
    while True:
        ended = job.poll() is not None
        for line in lines:
            for row in table_rows(json.loads(line)):
                show(*row)
        if ended:
            return
        time.sleep(0.2)


def table_rows(message: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """(case, what, ms, ratio to PEFT) of one result; a wrong one has no time."""
    result, labels = message["result"], message["labels"]
    case = " ".join(str(result[key]) for key in ("kind", "shape", "model", "axis", "dtype") if key in result)
    if result.get("gate", "passed") != "passed":
        yield case, f"WRONG: {result['reason']}", "", ""
        return
    for row in result.get("rows", ()):
        if "ms" not in row:
            continue
        ratio = row.get("ratio_to_peft")
        ms, shown = f"{row['ms']['median']:.3f}", f"{ratio['median']:.2f}" if ratio else ""
        yield case, labels.get(row["variant"], row["variant"]), ms, shown


@contextmanager
def _view() -> Iterator[Any]:
    """A function that shows a row: in a live table in a terminal with rich, else as lines on stderr."""
    if not sys.stdout.isatty() or importlib.util.find_spec("rich") is None:
        yield lambda *row: sys.stderr.write("  ".join(filter(None, row)) + "\n") and None
        return
    from rich.live import Live
    from rich.table import Table

    table = Table("case", "what", title="fastlora bench: milliseconds, medians of rounds")
    table.add_column("ms", justify="right")
    table.add_column("of PEFT's", justify="right")
    with Live(table, refresh_per_second=4, vertical_overflow="visible"):
        yield table.add_row
