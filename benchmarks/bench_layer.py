"""One adapted attention input layer, forward and backward, against its peers."""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from dataclasses import asdict
from typing import Any

import pytest
import torch

from .harness import gate
from .harness.peers import frozen, ours, peft, variants
from .harness.shapes import ANCHORS, DTYPES, SHAPES, Problem, Shape, bf16_matmul, targets, too_large

needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="peft is not installed: nothing to compare with"
)
THREADS, THREAD_ROUNDS = 2, 15
COMPILED = ("S1", "S2", "S3")  # fp32 only: compiling costs far more than measuring


def described(shape: Shape, dtype: str) -> dict[str, Any]:
    """A result before anything was measured."""
    return {"kind": "layer", "shape": shape.name, "model": shape.model, "rows_of_x": shape.rows, "width": shape.width,
            "outputs": shape.outputs, "rank": shape.rank, "fused": shape.fused, "dtype": dtype, "binding": True,
            "targets": [], "gate": "failed", "saved_bytes": {},
            "calls_per_round": shape.calls}  # fmt: skip


@needs_peft
@pytest.mark.benchmark(group="layer", timer=time.thread_time)
@pytest.mark.parametrize("name", ANCHORS)
def test_anchor(name, interleaved, record, request):
    """The shapes of the GPU's roofline, where the CPU can take them."""
    shape = ANCHORS[name]
    if too_large(shape) and not request.config.getoption("--fastlora-large"):
        pytest.skip(f"{name}, {shape.model}: sized for a GPU (benchmarks/device.sh); --fastlora-large runs it here")
    torch.manual_seed(0)
    problem, result = Problem(shape, torch.float32), described(shape, "fp32")
    built = [frozen(problem), peft(problem), ours(problem), ours(problem, "probes", ("grad_sq",)),
             ours(problem, "control")]  # fmt: skip
    try:
        result |= {"errors": {variant.name: max(gate.check(variant).values()) for variant in built}, "gate": "passed"}
    except AssertionError as error:
        record({**result, "reason": str(error)})
        raise
    found = interleaved(built, shape.rounds, shape.calls)
    if found:
        record({**result, "rows": found})


@needs_peft
@pytest.mark.benchmark(group="layer", timer=time.thread_time)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_layer(name, dtype, benchmark, interleaved, record):
    """Paired ratios of one shape and dtype. Nothing is timed, and no ratio printed, unless every variant is correct."""
    shape = SHAPES[name]
    torch.manual_seed(0)
    problem = Problem(shape, DTYPES[dtype])
    binding = dtype != "bf16" or bf16_matmul() is not None
    result = {**described(shape, dtype), "binding": binding,
              "targets": [asdict(target) for target in targets(name, dtype)]}  # fmt: skip
    compiler = shutil.which("c++") or shutil.which("g++")
    compiled = not benchmark.disabled and dtype == "fp32" and name in COMPILED and compiler is not None
    built = variants(problem, compiled)
    try:
        result["errors"] = {variant.name: max(gate.check(variant).values()) for variant in built}
        result["gate"] = "passed"
    except AssertionError as error:
        record({**result, "reason": str(error)})
        raise
    result["saved_bytes"] = {v.name: v.saved_bytes() for v in built if not v.name.endswith("_compiled")}
    rounds = shape.rounds if binding else shape.emulated_rounds
    found = interleaved(built, rounds, shape.calls)
    torch.compiler.reset()
    if found:
        record({**result, "calls_per_round": shape.calls, "rows": found})


@needs_peft
@pytest.mark.skipif((os.cpu_count() or 1) < THREADS, reason=f"fewer than {THREADS} cores")
@pytest.mark.benchmark(group="threads", timer=time.perf_counter)
@pytest.mark.parametrize("name", COMPILED)
def test_two_threads(name, interleaved, record):
    """Wall-clock time with two threads, in fp32: what a user waits for, and what other processes disturb most."""
    torch.manual_seed(0)
    problem = Problem(SHAPES[name], torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        built = [frozen(problem), peft(problem), ours(problem), ours(problem, "probes", ("grad_sq",))]
        for variant in built:
            gate.check(variant)
        found = interleaved(built, THREAD_ROUNDS, 1, clock=time.perf_counter)
    finally:
        torch.set_num_threads(before)
    if found:
        record({"kind": "threads", "shape": name, "threads": THREADS, "rows": found})
