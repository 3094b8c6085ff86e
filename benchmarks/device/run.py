"""``python -m device.run --output FOLDER``: every case, variant, pass and mode; JSON, a table, a plot."""

from __future__ import annotations

import argparse
import gc
import re
import subprocess
import time
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from harness import result_files

from fastlora.testing import enable_torchvision

from . import measure
from .cases import BUILDERS, CASES, TINY, Case, build
from .models import MODEL_VARIANTS, ModelCase, TrainingStep, model_cases
from .plot import draw
from .table import table

PASSES = ("forward", "backward", "both")


def _versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "triton", "peft", "fastlora-kernels"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "checkout"
    return found


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _row(
    case: str, variant: str, passes: str, mode: str, times: dict, work: tuple, ceilings: tuple, peak: float
) -> dict[str, Any]:
    operations, least = work
    seconds = times["median_ms"] * 1e-3
    ideal = max(operations / ceilings[1], least / ceilings[0])
    return {
        "case": case, "variant": variant, "pass": passes, "mode": mode, **times,
        "gbps": least / seconds / 1e9, "tflops": operations / seconds / 1e12, "roofline": ideal / seconds,
        "peak_mib": peak,
    }  # fmt: skip


def _calls(step: measure.Step, name: str) -> dict[str, tuple[Any, int]]:
    """Pass -> (call, steps it makes)."""
    if name == "fastlora_exact50":
        return {"both": (step.fifty, 50)}
    if name in ("gradstat", "wgrad_library"):
        return {"forward": (step.forward, step.sets)}
    calls = (step.forward, step.backward, step.both)
    return {passes: (call, step.sets) for passes, call in zip(PASSES, calls, strict=True)}


def _measure(case: Case, name: str, device: str, dtype: torch.dtype, ceilings: tuple, repeats: int) -> list[dict]:
    """All rows of one variant of one case."""
    step = measure.Step(build(case, name, device, dtype), device, dtype)
    rows = []
    for passes, (call, per_call) in _calls(step, name).items():
        few = max(3, repeats // 10) if name == "fastlora_exact50" else repeats
        work = case.work("forward" if name in ("gradstat", "wgrad_library") else passes,
                         name.startswith(("fastlora", "peft", "torch")))  # fmt: skip
        if passes == "backward":
            step.prepare_backward()
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        times = measure.time_calls(call, per_call, device, few)
        peak = (torch.cuda.max_memory_allocated() - step.spare_bytes()) / 2**20 if device != "cpu" else 0.0
        rows.append(_row(case.name, name, passes, "eager", times, work, ceilings, peak))
        if device == "cpu":
            continue
        if passes == "backward":
            # The forward must have run on the stream on which its backward is captured.
            replay = measure.captured(lambda: (step.prepare_backward(), step.backward()))
            forward = measure.captured(step.prepare_backward)
            whole = measure.time_calls(replay, per_call, device, few)
            part = measure.time_calls(forward, per_call, device, few)
            times = {key: whole[key] - part[key] for key in whole}
        else:
            times = measure.time_calls(measure.captured(call), per_call, device, few)
        rows.append(_row(case.name, name, passes, "graph", times, work, ceilings, peak))
    return rows


def _measure_model(case: ModelCase, name: str, device: str, dtype: torch.dtype, ceilings: tuple, repeats: int):
    """The rows of a whole training step, optimiser and all: eager, then as a graph if it can be captured."""
    step, few = TrainingStep(case, name, device, dtype), max(3, repeats // 3)
    work = case.work(step.parameters)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    times = measure.time_calls(step, 1, device, few)
    peak = torch.cuda.max_memory_allocated() / 2**20 if device != "cpu" else 0.0
    rows = [_row(case.name, name, "both", "eager", times, work, ceilings, peak)]
    if device != "cpu":
        try:
            times = measure.time_calls(measure.captured(step), 1, device, few)
            rows.append(_row(case.name, name, "both", "graph", times, work, ceilings, peak))
        except Exception:  # the eager row stands; what could not be captured is in the log
            traceback.print_exc()
    return rows


def _jobs(cases: list[Case | ModelCase], variants: list[str]) -> list[tuple[Case | ModelCase, str]]:
    """What is measured, in order: what matters most comes first, should the time run out."""
    layers = [c for c in cases if isinstance(c, Case)]
    models = [c for c in cases if isinstance(c, ModelCase)]
    # The variants that targets are about.
    early, first = list(BUILDERS)[:6], MODEL_VARIANTS[:4]
    some = [name for name in BUILDERS if name in variants]
    whole = [name for name in MODEL_VARIANTS if name in variants]
    return [
        *((case, name) for name in some if name in early for case in layers),
        *((case, name) for name in whole if name in first for case in models),
        *((case, name) for name in some if name not in early for case in layers),
        *((case, name) for name in whole if name not in first for case in models),
    ]


def run(
    cases: list[Case | ModelCase],
    variants: list[str],
    device: str,
    seconds: float,
    repeats: int,
    keep: Callable[[dict[str, Any], str], None],
) -> None:
    """Measure until the time is up, handing ``keep`` the result so far and its Markdown after every variant."""
    dtype, missing = torch.bfloat16, []
    limit = time.monotonic() + seconds
    ceilings = measure.ceilings(device, dtype)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device != "cpu" else "cpu",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "versions": _versions(),
        "commit": _output("git", "rev-parse", "HEAD"),
        "rows": [],
    }
    for case, name in _jobs(cases, variants):
        if time.monotonic() > limit:
            missing.append(f"{case.name} {name}: out of time")
            continue
        one = _measure if isinstance(case, Case) else _measure_model
        try:
            result["rows"] += one(case, name, device, dtype, ceilings, repeats)
        except Exception as problem:  # one broken variant must not lose the others' rows
            traceback.print_exc()
            missing.append(f"{case.name} {name}: {type(problem).__name__}: {problem}"[:300])
        gc.collect()
        if device != "cpu":
            # A workspace for every stream that a variant captured on would count in the next one's peak.
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()
        keep(result, table(result, ceilings, missing))
    keep(result, table(result, ceilings, missing))


def main() -> None:
    """Measure, write ``device_<gpu>.json``, ``.md`` and ``.png``, print the table last."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--output", type=Path, default=Path("."))
    parser.add_argument("--name", default="", help="what the names of the files end in")
    parser.add_argument("--seconds", type=float, default=240.0, help="start nothing new after this long")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--cases", nargs="*", default=[*CASES, *model_cases(True)])
    parser.add_argument("--variants", nargs="*", default=list(BUILDERS))
    parser.add_argument("--dry-run", nargs="?", const="cpu", choices=("cpu", "null"), help=measure.DRY_RUN)
    given = parser.parse_args()
    enable_torchvision()
    known = {**(TINY if given.dry_run else CASES), **model_cases(bool(given.dry_run))}
    last: dict[str, Any] = {}

    def keep(result: dict[str, Any], markdown: str) -> None:
        name = re.sub(r"[^a-z0-9]+", "_", result["device"].lower().removeprefix("nvidia ")).strip("_")
        target = given.output / "_".join(filter(None, ("device", name, given.name)))
        result_files.write(target.with_suffix(".json"), result)
        target.with_suffix(".md").write_text(markdown)
        last.update(result=result, markdown=markdown, plot=target.with_suffix(".png"))

    given.output.mkdir(parents=True, exist_ok=True)
    with measure.device_of(given.dry_run) as device:
        run([known[name] for name in given.cases], given.variants, device, given.seconds, given.repeats, keep)
    draw(last["result"], last["plot"])
    print(last["markdown"])
    if not last["result"]["rows"]:
        raise SystemExit("nothing was measured")


if __name__ == "__main__":
    main()
