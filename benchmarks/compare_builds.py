"""Times the two fused native passes of two builds of the library, in two processes that take turns.

    OMP_NUM_THREADS=1 python benchmarks/compare_builds.py OLD.so NEW.so --rounds 61 --dtype float32 --probes 0

One line per shape and direction: median milliseconds of each build, and the median of the ratios taken within a round
with its tenths. CPU time of the calling thread, or wall time with more than one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

# name -> rows, in_features, out_features of q, k and v, rank, whether qkv is one matrix, calls per round
SHAPES = {
    "S1": (1576, 768, (768, 768, 768), 8, True, 1),
    "S2": (2048, 768, (768, 768, 768), 8, False, 1),
    "S3": (512, 2048, (2048, 512, 512), 16, False, 1),
    "S4": (64, 384, (384, 384, 384), 4, True, 40),
}


def passes(name: str, dtype: str, probes: int):
    """The forward and the backward of one group as functions without arguments."""
    import torch

    ops = torch.ops.fastlora
    rows, depth, widths, rank, fused, _ = SHAPES[name]
    kind = getattr(torch, dtype)
    outputs = [sum(widths)] if fused else list(widths)
    x, dx = torch.randn(rows, depth).to(kind), torch.randn(rows, depth).to(kind)
    y, dy = ([torch.randn(rows, n).to(kind) for n in outputs] for _ in range(2))
    A, B = [torch.randn(rank, depth) * 0.01 for _ in widths], [torch.randn(n, rank) * 0.01 for n in widths]
    P = torch.randn(probes, depth).sign().to(kind) if probes else None
    h = torch.randn(rows, 3 * rank + probes).to(kind)
    columns = [0, widths[0], widths[0] + widths[1]] if fused else [0, 0, 0]
    where = ([0, 0, 0] if fused else [0, 1, 2], columns, [2.0] * 3)
    forward = lambda: ops.lora_forward_.default(y, x, A, P, B, *where, False)  # noqa: E731
    backward = lambda: ops.lora_backward_.default(dx, dy, x, h, A, B, *where, probes, True, True)  # noqa: E731
    return forward, backward


def work(arguments: argparse.Namespace) -> None:
    """Reads names of shapes, answers each with the milliseconds of its two passes."""
    import torch

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    torch.ops.load_library(os.environ["FASTLORA_LIBRARY"])
    clock = time.perf_counter if arguments.threads > 1 else time.thread_time
    cold, made = torch.randn(1 << 22), {}
    for line in sys.stdin:
        name = line.strip()
        if name not in made:
            made[name] = passes(name, arguments.dtype, arguments.probes)
        answer, calls = [], SHAPES[name][-1]
        for call in made[name]:
            if calls == 1:
                cold.add_(1.0)  # 16 MiB between two passes, as the matmul of a real step would be
            start = clock()
            for _ in range(calls):
                call()
            answer.append((clock() - start) / calls * 1e3)
        print(json.dumps(answer), flush=True)


class Build:
    """A process that has loaded one build."""

    def __init__(self, library: str, options: list[str]) -> None:
        command = [sys.executable, __file__, *options, "--worker", library, library]
        environment = {**os.environ, "FASTLORA_LIBRARY": os.path.abspath(library)}
        self.process = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def time(self, name: str) -> list[float]:
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"the process with {self.process.args[-1]} ended; its error is above")
        return json.loads(answer)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def compare(builds: list[Build], name: str, rounds: int) -> None:
    for _ in range(3):
        for build in builds:
            build.time(name)
    times: list[list[list[float]]] = [[], []]
    for turn in range(rounds):
        for which in (0, 1) if turn % 2 == 0 else (1, 0):
            times[which].append(builds[which].time(name))
    for position, what in enumerate(("forward", "backward")):
        old, new = ([answer[position] for answer in side] for side in times)
        ratios = [b / a for a, b in zip(old, new, strict=True)]
        print(
            f"{name} {what:8} old {statistics.median(old):.3f} ms, new {statistics.median(new):.3f} ms, ratio "
            f"{statistics.median(ratios):.3f} [{quantile(ratios, 0.1):.3f}, {quantile(ratios, 0.9):.3f}]",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--rounds", type=int, default=61)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--probes", type=int, default=0)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
        return
    options = ["--threads", str(arguments.threads), "--dtype", arguments.dtype, "--probes", str(arguments.probes)]
    builds = [Build(arguments.old, options), Build(arguments.new, options)]
    for name in arguments.shapes:
        compare(builds, name, arguments.rounds)
    for build in builds:
        build.close()


if __name__ == "__main__":
    main()
