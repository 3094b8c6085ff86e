"""The command line: ``fastlora COMMAND``."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

OK, CLAIM_FAILED, UNUSABLE = 0, 1, 2


@dataclass(frozen=True)
class Command:
    """A sub-command: one line of help, its arguments, and what it does with them (returns the exit code)."""

    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    refusals: tuple[type[Exception], ...] = ()  # errors of the library that are the user's, said in a line


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return value


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("fastlora-demo"), help="folder for the results (%(default)s)")
    parser.add_argument("--seeds", type=_positive, default=3, help="repetitions (%(default)s)")
    parser.add_argument("--fast", action="store_true", help="one seed and few steps: does everything run?")
    # On tensors this small a second thread gains nothing, and on a busy machine waiting for it costs 20 times the step.
    parser.add_argument("--threads", type=_positive, default=1, help="threads of torch (%(default)s)")
    parser.add_argument(
        "--min-gain", type=float, default=None, metavar="POINTS",
        help="points by which adapters must beat head only in every seed, or the exit status is 1",
    )  # fmt: skip


def _demo(arguments: argparse.Namespace) -> int:
    from ..demo import MissingExtra, Settings, require

    try:
        require("rich", "timm", "sklearn", "matplotlib")
    except MissingExtra as error:
        sys.stderr.write(f"fastlora: {error}\n")
        return UNUSABLE
    settings = Settings(seeds=tuple(range(arguments.seeds)), threads=arguments.threads)
    if arguments.fast:
        settings = settings.fast()
    if arguments.min_gain is not None:
        settings = replace(settings, min_gain=arguments.min_gain / 100)
    return _run_demo(settings, arguments.out)


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("fastlora-bench"), help="folder for the report (%(default)s)")
    parser.add_argument("--short", action="store_true", help="a minute: few rounds of the smallest cases")
    parser.add_argument("--rounds", type=_positive, help="rounds of every benchmark")
    parser.add_argument("-k", metavar="EXPRESSION", dest="chosen", help="only the benchmarks that match, as in pytest")


def _bench(arguments: argparse.Namespace) -> int:
    from .bench import MissingBenchmarks, run

    try:
        return run(arguments.out, arguments.short, arguments.rounds, arguments.chosen)
    except MissingBenchmarks as error:
        sys.stderr.write(f"fastlora: {error}\n")
        return UNUSABLE


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("-v", "--verbose", action="count", default=argparse.SUPPRESS, help="all of it")
    parser.add_argument(
        "--model", metavar="MODULE:NAME", help="a model, or a function that makes one: can it be adapted?"
    )


def _doctor(arguments: argparse.Namespace) -> int:
    from . import doctor

    try:
        model = None if arguments.model is None else doctor.found_model(arguments.model)
    except ValueError as error:
        sys.stderr.write(f"fastlora: {error}\n")
        return UNUSABLE
    found = doctor.report(model)
    text = json.dumps(found, indent=2) if arguments.json else "\n".join(doctor.lines(found, arguments.verbose > 0))
    sys.stdout.write(text + "\n")
    return OK if found["passed"] else CLAIM_FAILED


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=Path, help="folder of PEFT's files, also in the Hub's cache")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the rank map, too (needs matplotlib)")


def _inspect(arguments: argparse.Namespace) -> int:
    from .inspect_adapter import describe, draw
    from .merge_folder import snapshot

    folder = snapshot(arguments.adapter)
    sys.stdout.write(describe(folder) + "\n")
    if arguments.plot is not None:
        draw(folder, arguments.plot)
    return OK


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", type=Path, metavar="BASE", help="folder of a model of transformers")
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="folder of PEFT's files, ours or foreign")
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder for the merged model")


def _merge(arguments: argparse.Namespace) -> int:
    from .merge_folder import merge_folder

    count = merge_folder(arguments.base, arguments.adapter, arguments.out)
    sys.stdout.write(f"merged {count} matrices into {arguments.out}\n")
    return OK


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="folder of PEFT's files, ours or foreign")
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder for PEFT's two files")
    parser.add_argument(
        "--layout", choices=("loralib", "torchtune"), help="ADAPTER is a safetensors file of this library"
    )
    parser.add_argument("--alpha", type=float, help="lora_alpha of that training, which its file does not hold")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), help="that of the tensors (as they are)")


def _convert(arguments: argparse.Namespace) -> int:
    from .convert_files import convert_files

    count = convert_files(arguments.adapter, arguments.out, arguments.layout, arguments.alpha, arguments.dtype)
    sys.stdout.write(f"wrote {count} tensors into {arguments.out}\n")
    return OK


def _run_demo(settings, out: Path) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    from ..demo import rich_tables, run

    console = Console()
    width = console.width if console.is_terminal else None
    if width is None:
        console = Console(width=10_000, soft_wrap=True)  # a file or a pipe has no width of its own
    columns = "{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    try:
        with Progress(*columns, console=console) as progress:
            results = run(settings, out, progress)
    except OSError as error:
        sys.stderr.write(f"fastlora: cannot write to {out}: {error}\n")
        return UNUSABLE
    for table in rich_tables(results, width):
        console.print(table)
    console.print(results["rule"], style="dim", highlight=False)
    for sentence in results["findings"]:
        console.print(f"  {sentence}", highlight=False)
    seconds = f"{results['wall_seconds']:.0f} s"
    console.print(f"{seconds}. Report: {out / 'index.html'}, adapter: {out / 'adapter'}", highlight=False)
    for failure in results["failed"]:
        console.print(f"FAILED {failure}", style="bold red", highlight=False)
    return CLAIM_FAILED if results["failed"] else OK


_FILES = (ImportError, OSError, ValueError)

# A further sub-command is one entry here.
COMMANDS: dict[str, Command] = {
    "bench": Command("measure this machine with the benchmarks of a checkout", _bench_arguments, _bench),
    "doctor": Command("versions, devices, and a self-test of every operator and backend", _doctor_arguments, _doctor),
    "merge": Command("write a base of transformers with an adapter in its weights", _merge_arguments, _merge, _FILES),
    "convert": Command("write an adapter as plain files of PEFT", _convert_arguments, _convert, _FILES),
    "inspect": Command("ranks and rank map of an adapter's files", _inspect_arguments, _inspect, _FILES),
    "demo": Command("adapt a small vision transformer to new digits in five ways and report", _demo_arguments, _demo),
}


def _parser() -> argparse.ArgumentParser:
    from .. import __version__

    parser = argparse.ArgumentParser(prog="fastlora", description="Fused LoRA with statistics of the frozen weights.")
    parser.add_argument("--version", action="version", version=f"fastlora {__version__}")
    parser.add_argument("-v", "--verbose", action="count", default=0, help="log more (twice: everything)")
    parser.suggest_on_error = True  # from Python 3.14
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.arguments(commands.add_parser(name, help=command.help, description=command.help))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns 0, 1 when a claim of the command failed, 2 when it could not run."""
    arguments = _parser().parse_args(argv)
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(arguments.verbose, 2)]
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    command = COMMANDS[arguments.command]
    try:
        return command.run(arguments)
    except command.refusals as error:
        sys.stderr.write(f"fastlora: {error}\n")
        return UNUSABLE


if __name__ == "__main__":
    sys.exit(main())
