"""Options, the interleaving fixture, and the report of the benchmarks."""

from __future__ import annotations

import gc
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlora
from fastlora import testing
from fastlora.ops import native

from .harness.interleave import Interleaved, Times, rows
from .harness.machine import cpu_name
from .harness.peers import LABELS, Variant
from .harness.shapes import bf16_matmul
from .reports import report

WARMUP = 2  # rounds that are run and thrown away
_RESULTS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastlora")
    group.addoption("--fastlora-results", type=Path, metavar="PATH",
                    help="folder for layer.json, layer.md, layer.png (default: nothing is written)")  # fmt: skip
    group.addoption("--fastlora-name", default="layer", metavar="NAME", help="their name (default: %(default)s)")
    group.addoption("--fastlora-data", type=Path, metavar="PATH",
                    help="folder with SST-2 (default: sentences made up for the purpose)")  # fmt: skip
    group.addoption("--fastlora-large", action="store_true", help="layers sized for a GPU too: seconds a call")
    group.addoption("--fastlora-rounds", type=int, metavar="N", help="rounds of every layer benchmark")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RESULTS] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("benchmark_only") or config.getoption("benchmark_disable"):
        return
    skip = pytest.mark.skip(reason="benchmarks run with --benchmark-only (only their checks with --benchmark-disable)")
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    testing.enable_torchvision()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def interleaved(benchmark, request) -> Callable[..., list[dict[str, Any]]]:
    """``measure(variants, rounds, calls)``: rows of interleaved times; the benchmark's own entry is fastlora's."""

    def measure(
        variants: list[Variant],
        rounds: int,
        calls: int,
        clock: Callable[[], float] = time.thread_time,
        summarise: Callable[[Times], list[dict[str, Any]]] = rows,
    ) -> list[dict[str, Any]]:
        rounds = request.config.getoption("--fastlora-rounds") or rounds
        turns = Interleaved(variants, "fastlora", calls, clock)
        gc.collect()
        gc.freeze()
        gc.disable()
        try:
            benchmark.pedantic(turns.run, setup=turns.before, teardown=turns.after, rounds=rounds, warmup_rounds=WARMUP)
        finally:
            gc.enable()
            gc.unfreeze()
        if benchmark.disabled:
            return []
        kept = {
            name: {i: t for i, t in own.items() if WARMUP <= i < WARMUP + rounds} for name, own in turns.times.items()
        }
        found = summarise({name: own for name, own in kept.items() if own})
        threads = torch.get_num_threads()
        benchmark.extra_info.update(
            clock=f"time.{clock.__name__}", threads=threads, warmup_rounds=WARMUP, calls_per_round=calls
        )
        benchmark.extra_info["rows"] = found
        return found

    return measure


@pytest.fixture
def record(request) -> Callable[[dict[str, Any]], None]:
    """Puts one result into the report of the session."""

    def keep(result: dict[str, Any]) -> None:
        request.config.stash[_RESULTS].append(result)
        stream = os.environ.get("FASTLORA_BENCH_STREAM")
        if stream:  # `fastlora bench` shows results as they come
            with open(stream, "a") as file:
                file.write(json.dumps({"labels": LABELS, "result": result}) + "\n")

    return keep


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": 1,
        "clock": "CPU time of one thread (time.thread_time)",
        "warmup_rounds": WARMUP,
        "load_average": list(os.getloadavg()),
        "bf16_matmul": bf16_matmul(),
        "native_isa": native.isa() if native.available() else None,
        "torch_cpu": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peft": version("peft"),
        "fastlora": fastlora.__version__,
        "source": _source(),
    }


def _source() -> str | None:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _document(config: pytest.Config) -> dict[str, Any] | None:
    results = config.stash[_RESULTS]
    if not results:
        return None
    name = config.getoption("--fastlora-name")
    title = "Layer benchmarks" if name == "layer" else f"Benchmarks: {name}"
    return {"title": title, "environment": environment(), "labels": LABELS, "results": results}


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    document = _document(config)
    if document is None:
        return
    terminalreporter.section("fastlora")
    terminalreporter.write_line(report.markdown(document))
    folder = config.getoption("--fastlora-results")
    if folder is not None:
        for path in report.write(document, folder, config.getoption("--fastlora-name")):
            terminalreporter.write_line(f"wrote {path}")
