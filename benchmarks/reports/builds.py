"""What statistics cost in one layer, over many builds of it: two copies of one layer differ by where they lie.

    OMP_NUM_THREADS=1 python -m benchmarks.reports.builds --out benchmarks/results

Writes ``builds.json`` and ``builds.md``. Each build has its own tensors in an order by chance, and so have its turns: a
build's figure is the median over rounds of the time over the mean of two plain layers, which are the same code.
"""

from __future__ import annotations

import argparse
import collections
import gc
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ..harness import result_files
from ..harness.interleave import median_interval, settle
from ..harness.machine import cpu_name
from ..harness.peers import LABELS, TRACKED, Variant, ours
from ..harness.shapes import DTYPES, SHAPES, Problem
from ..harness.tables import table

LAYERS, BUILDS, ROUNDS, WARM = ("S1", "S2", "S3"), 48, 20, 6
PLAIN = ("fastlora", "control")


def built(problem: Problem, chance: random.Random) -> tuple[list[Variant], list[torch.Tensor]]:
    """Every variant, and memory between them, which has to be kept as long as they are."""
    makers = [lambda n=name: ours(problem, n, TRACKED.get(n, ())) for name in (*PLAIN, *TRACKED)]
    chance.shuffle(makers)
    variants, between = [], []
    for make in makers:
        variants.append(make())
        between.append(torch.empty(chance.randrange(1, 1 << 20)))
        settle(variants[-1])
    return variants, between


def turns(variants: list[Variant], chance: random.Random) -> dict[str, float]:
    """Of each variant, the median over rounds of its time over the mean of the plain ones."""
    found: dict[str, list[float]] = collections.defaultdict(list)
    for turn in range(WARM + ROUNDS):
        seconds: dict[str, float] = {}
        for variant in chance.sample(variants, len(variants)):
            variant.forget()
            start = time.thread_time()
            variant.call()
            seconds[variant.name] = time.thread_time() - start
            if variant.tracker is not None:
                start = time.thread_time()
                variant.tracker.step()
                seconds[variant.name + "_step"] = seconds[variant.name] + time.thread_time() - start
        base = statistics.mean(seconds[name] for name in PLAIN)
        for name, own in seconds.items() if turn >= WARM else ():
            found[name].append(own / base)
    return {name: statistics.median(ratios) for name, ratios in found.items()}


def measured(shape: str, dtype: str, builds: int) -> list[dict[str, Any]]:
    """A row a variant: percent of the plain layer's time, the median over builds with its 95 % interval."""
    chance, found = random.Random(0), collections.defaultdict(list)
    for build in range(builds):
        torch.manual_seed(build)
        variants, between = built(Problem(SHAPES[shape], DTYPES[dtype]), chance)
        gc.collect()
        gc.disable()
        for name, ratio in turns(variants, chance).items():
            found[name].append(100 * (ratio - 1))
        gc.enable()
        for variant in variants:
            if variant.tracker is not None:
                variant.tracker.close()
        del variants, between
    rows = []
    for name, own in found.items():
        low, high = median_interval(own)
        rows.append({"shape": shape, "dtype": dtype, "variant": name, "percent": statistics.median(own), "low": low,
                     "high": high, "mean": statistics.mean(own)})  # fmt: skip
    order = [*PLAIN, *[name + part for name in TRACKED for part in ("", "_step")]]
    return sorted(rows, key=lambda row: order.index(row["variant"]))


def markdown(found: dict[str, Any]) -> str:
    lines = ["# Statistics of one layer over builds of it", "",
             f"{found['hardware']}. `{found['command']}`", "",
             f"% of CPU time over the same layer without: median over {found['builds']} builds, its 95 % interval, "
             f"and the mean; {ROUNDS} rounds a build, in an order by chance.", ""]  # fmt: skip
    rows = [
        [row["shape"], row["dtype"], LABELS[row["variant"]], f"{row['percent']:+.2f}",
         f"{row['low']:+.2f} to {row['high']:+.2f}", f"{row['mean']:+.2f}"]
        for row in found["rows"]
    ]  # fmt: skip
    lines += table(["shape", "dtype", "variant", "median, %", "95 % interval", "mean, %"], rows, words=(0, 1, 2, 4))
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reports.builds", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for builds.json and builds.md")
    parser.add_argument("--builds", type=int, default=BUILDS, help="how many (default: %(default)s)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = {
        "hardware": f"{cpu_name()}, torch {torch.__version__}",
        "command": "OMP_NUM_THREADS=1 python -m benchmarks.reports.builds --out benchmarks/results",
        "builds": options.builds,
        "rows": [row for name in LAYERS for dtype in DTYPES for row in measured(name, dtype, options.builds)],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    result_files.write(options.out / "builds.json", found)
    (options.out / "builds.md").write_text(markdown(found), encoding="utf-8")
    sys.stdout.write(markdown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
