"""Host time of variants that take turns, and what each of them made happen on the null GPU."""

from __future__ import annotations

import functools
import gc
import importlib
import os
import pkgutil
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import fastlora
from fastlora.ops.matmul import ENGINES

from ..harness.interleave import Interleaved, paired, settle, spread
from ..harness.machine import cpu_name
from ..harness.shapes import bf16_matmul
from .cases import CASES, Case
from .null_gpu import Counts, NullGpu
from .records import Event, Kind, launches

WARMUP = 2  # rounds that are run and thrown away
WARM_CALLS = 3  # of each turn
BASES = ("frozen", "peft", "fastlora")
OURS = ("fastlora", "control", "probes", "act_var", "four_adapters", "autocast", "dropout")


class _Warm(Interleaved):
    """Each turn begins with calls that are not timed: what ran before has other code and data in the caches."""

    def _measure(self, variant: Any) -> None:
        for _ in range(WARM_CALLS):
            variant.forget()
            variant.call()
        super()._measure(variant)


def measure(name: str, rounds: int, gpu: NullGpu | None) -> list[dict[str, Any]]:
    """One row a variant of a case: microseconds of CPU time a call, ratios within the round, counts of one call."""
    case = CASES[name]
    with mock.patch.object(ENGINES, "override", case.engine or ENGINES.override):
        return _measured(name, case, rounds, gpu)


def _measured(name: str, case: Case, rounds: int, gpu: NullGpu | None) -> list[dict[str, Any]]:
    with torch.device("cpu" if gpu is None else gpu.device):
        variants = case.build()
    for variant in variants:
        for _ in range(2):  # what is learned, compiled or planned at the first call
            variant.forget()
            variant.call()
        settle(variant)
    counted = {} if gpu is None else {variant.name: _counted(gpu, variant) for variant in variants}
    times = _times(case, variants, rounds * case.longer)
    for variant in variants:
        getattr(variant, "close", lambda: None)()
    ratios = {base: paired(times, base) for base in BASES if base in times}
    return [
        {
            "case": name,
            "variant": variant,
            "us": spread([1e6 * t for t in own.values()]),
            **{f"over_{base}": found[variant] for base, found in ratios.items()},
            "counts": counted[variant]._asdict() if variant in counted else None,
        }
        for variant, own in times.items()
    ]


def _times(case: Case, variants: list, rounds: int) -> dict[str, dict[int, float]]:
    # All threads: a backward on a device runs in a thread of autograd's.
    turns = _Warm(variants, case.target, case.calls, time.process_time)
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        for _ in range(WARMUP + rounds):
            turns.before()
            turns.run()
            turns.after()
    finally:
        gc.enable()
        gc.unfreeze()
    return {name: {i: t for i, t in own.items() if i >= WARMUP} for name, own in turns.times.items()}


def _counted(gpu: NullGpu, variant: Any) -> Counts:
    """What one call makes happen; ``RuntimeError`` where that is not what is to be timed."""
    variant.forget()
    trace = gpu.trace(variant.call)
    started = [launch.function for launch in launches(trace)]
    variant.forget()
    counts = gpu.count(variant.call)
    wrong = [
        f"{getattr(counts, name)} {name}" for name in ("fallbacks", "to_host", "to_device") if getattr(counts, name)
    ]
    strangers = sorted(set(started) - _kernels())
    if strangers:
        wrong.append(f"kernels that are not fastlora's: {strangers}")
    if variant.name in OURS and not started:
        wrong.append("no kernel of fastlora was launched")
    if variant.name not in OURS and not variant.name.endswith("_step") and (started or not counts.gemms):
        wrong.append(f"{counts.launches} launches and {counts.gemms} products by the library")
    if counts.fallbacks:
        names = {r.name for r in trace if isinstance(r, Event) and r.kind is Kind.FALLBACK}
        wrong.append(f"the null GPU has no kernel for {sorted(names)}")
    if wrong:
        raise RuntimeError(f"{variant.name}: not what is to be timed: {'; '.join(wrong)}")
    return counts


@functools.cache
def _kernels() -> frozenset[str]:
    """Names of the Triton functions of ``fastlora.kernels``."""
    from triton.runtime.jit import JITFunction

    package = importlib.import_module("fastlora.kernels")
    modules = [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    return frozenset(name for module in modules for name, f in vars(module).items() if type(f) is JITFunction)


def environment(rounds: int) -> dict[str, Any]:
    """What the figures depend on."""
    command = ["git", "describe", "--always", "--dirty"]
    source = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()),
        "clock": "CPU time of all threads (time.process_time)",
        "rounds": rounds,
        "warmup_rounds": WARMUP,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "peft": version("peft"),
        "bf16_matmul": bf16_matmul(),
        "fastlora": fastlora.__version__,
        "source": source.stdout.strip() or None,
    }
