"""One adapted attention input layer, forward and backward, against its peers."""

from __future__ import annotations

import importlib.util
import time

import pytest
import torch

from fastlora.probes import sampling_interval

from . import gate
from .peers import variants
from .shapes import DTYPES, SHAPES, TARGETS, Problem, bf16_matmul


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed: nothing to compare with")
@pytest.mark.benchmark(group="layer", timer=time.thread_time)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_layer(name, dtype, interleaved, record):
    """Paired ratios of one shape and dtype. Nothing is timed, and no ratio printed, unless every variant is correct."""
    shape = SHAPES[name]
    torch.manual_seed(0)
    problem = Problem(shape, DTYPES[dtype])
    binding = dtype != "bf16" or bf16_matmul() is not None
    result = {"kind": "layer", "shape": name, "model": shape.model, "rows_of_x": shape.rows, "width": shape.width,
              "outputs": shape.outputs, "rank": shape.rank, "fused": shape.fused, "dtype": dtype, "binding": binding,
              "target": TARGETS.get((name, dtype)), "gate": "failed",
              "every": sampling_interval(shape.rows, shape.width, sum(shape.outputs), 4)}  # fmt: skip
    built = variants(problem)
    try:
        result["errors"] = {variant.name: max(gate.check(variant).values()) for variant in built}
        result["gate"] = "passed"
    except AssertionError as error:
        record({**result, "reason": str(error)})
        raise
    rounds = shape.rounds if binding else shape.emulated_rounds
    found = interleaved(built, rounds, shape.calls)
    if found:
        record({**result, "calls_per_round": shape.calls, "rows": found})
