"""Time and memory over rows, width, rank, adapters and layers, with the fitted powers.

``python -m benchmarks.bench_growth AXIS SIZES`` prints the peaks of resident memory, in a process without other memory.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from .harness import memory
from .harness.interleave import Interleaved, spread
from .harness.many import Mixed, draw_factors
from .harness.peers import Variant, ours
from .harness.shapes import Problem, Shape

ROUNDS, WARMUP = 9, 2


class Axis(NamedTuple):
    """What grows, from where to where, and how its variant is built."""

    sizes: tuple[int, ...]
    build: Callable[[int], Any]
    case: str
    expected: str


def _problem(rows: int = 512, width: int = 384, rank: int = 8) -> Problem:
    torch.manual_seed(0)
    shape = Shape("growth", "q, k, v", 4, rows // 4, width, (width,) * 3, rank, fused=False)
    return Problem(shape, torch.float32)


class _Stack:
    """Layers after each other, each with its own q, k and v."""

    name, every, tracker = "fastlora", 1, None

    def __init__(self, layers: int):
        problem = _problem(rows=256, width=256)
        self.layers: list[Variant] = [ours(problem) for _ in range(layers)]

    def forget(self) -> None:
        """Nothing is kept between calls."""

    def call(self) -> None:
        for layer in self.layers:
            layer.call()


def kept_bytes(call: Callable[[], None], parameters: list[Tensor]) -> int:
    """What autograd keeps from a forward to its backward besides parameters; x counts."""
    own, kept = {p.untyped_storage().data_ptr() for p in parameters}, {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(kept.values())


def _parts(variant: Any) -> list[Any]:
    return variant.layers if isinstance(variant, _Stack) else [variant]


def _kept(variant: Any) -> int:
    return sum(kept_bytes(part.call, list(part.model.parameters())) for part in _parts(variant))


def peaks(axis: str, sizes: list[int]) -> list[int]:
    """Bytes that one forward and backward adds at most, gradients included, parameters and x not."""
    torch.set_num_threads(1)
    found = []
    for n in sizes:
        variant = AXES[axis].build(n)
        for _ in range(WARMUP):
            variant.call()
        for part in _parts(variant):
            memory.rest(part)
        found.append(memory.resident_peak(variant.call))
    return found


def _adapters(count: int) -> Mixed:
    problem = _problem()
    ids = torch.arange(problem.shape.rows) % count
    return Mixed(problem, draw_factors(problem, [8] * count), ids, "fastlora")


AXES = {
    "rows M": Axis((128, 256, 512, 1024, 2048, 4096), lambda n: ours(_problem(rows=n)), "384 -> 3x384, r = 8", "1"),
    "width K = N": Axis((128, 192, 256, 384, 512, 768, 1024), lambda n: ours(_problem(width=n)), "M = 512, r = 8",
                        "1.9 (K² beside r·K)"),
    "rank r": Axis((4, 8, 16, 32, 64, 128), lambda n: ours(_problem(rank=n)), "M = 512, 384 -> 3x384",
                   "0.2 (K² beside r·K)"),
    "adapters": Axis((1, 2, 4, 8, 16, 32, 64), _adapters, "M = 512 rows in all, 384 -> 3x384, r = 8 each", "0"),
    "layers": Axis((1, 2, 4, 8, 16), _Stack, "M = 256, 256 -> 3x256, r = 8", "1"),
}  # fmt: skip


def fit(sizes: list[int], values: list[float]) -> dict[str, float]:
    """``c n^p`` by least squares on logarithms, p with its 95 % interval."""
    x, y = [math.log(n) for n in sizes], [math.log(v) for v in values]
    slope, intercept = statistics.linear_regression(x, y)
    residual = sum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    free, moment = len(x) - 2, sum((a - statistics.fmean(x)) ** 2 for a in x)
    reach = STUDENT[free] * math.sqrt(residual / free / moment)
    return {"p": slope, "low": slope - reach, "high": slope + reach, "c": math.exp(intercept)}


# 97.5 % points of Student's t by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447}


@pytest.mark.benchmark(group="growth", timer=time.thread_time)
@pytest.mark.parametrize("axis", AXES)
def test_growth(axis, benchmark, record, request):
    """Sizes take turns within a round, so that a slow spell of the machine hits all of them."""
    given = AXES[axis]
    sizes = given.sizes[:2] if benchmark.disabled else given.sizes
    built = [given.build(n) for n in sizes]
    for n, variant in zip(sizes, built, strict=True):
        variant.name = str(n)
    turns = Interleaved(built, str(sizes[-1]), 1)
    rounds = request.config.getoption("--fastlora-rounds") or ROUNDS
    benchmark.pedantic(turns.run, setup=turns.before, teardown=turns.after, rounds=rounds, warmup_rounds=WARMUP)
    kept = [_kept(variant) for variant in built]
    assert kept == sorted(kept)
    # Blocks of a page or more go back to the system when they are freed, so that resident memory is what is in use.
    supported = memory.supported() is None
    peak = memory.in_child("benchmarks.bench_growth", axis, *map(str, sizes), large=4096) if supported else []
    assert all(top > 0 for top in peak)
    if benchmark.disabled:
        return
    times = [[t for i, t in turns.times[str(n)].items() if i >= WARMUP] for n in sizes]
    ms = [spread([1e3 * t for t in each]) for each in times]
    record({"kind": "growth", "axis": axis, "case": given.case, "sizes": list(sizes), "ms": ms, "bytes": kept,
            "peaks": peak, "time": fit(sizes, [m["median"] for m in ms]), "kept": fit(sizes, kept),
            "peak": fit(sizes, peak) if peak else None, "expected": given.expected})  # fmt: skip


if __name__ == "__main__":
    from fastlora import testing

    testing.enable_torchvision()
    sys.stdout.write(json.dumps(peaks(sys.argv[1], [int(n) for n in sys.argv[2:]])) + "\n")
