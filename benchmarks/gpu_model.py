"""Estimates, without a GPU, of a q, k, v group's kernels on an H200: bytes, waves, microseconds.

    python -m benchmarks.gpu_model [--out benchmarks/results]

Strategies and tiles are the shipped ones, programs a multiprocessor those of the compile report. "Ideal" has every
byte at the copy's speed, every operation at the matmul's and nothing else. "Estimate" adds what kernels are seen to
lose; its constants are assumptions, named below. None of it is a measurement.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from fastlora.kernels.tiling import PROGRAMS, TileConfig, choose_filling, choose_split, choose_strategy, choose_tiles

from .device.cases import CASES, PROBES, Case
from .harness import result_files

RESULTS = Path(__file__).parent / "results"
REPORT = RESULTS / "triton_compile_sm90.md"
# Speeds of a large copy and of a large matmul on an H200, as others publish them: bytes and operations a second. And
# of its L2, as matmuls of Triton imply that reach 600 TFLOP/s with tiles of 128 x 256: every program reads its operands
# from there, where the library shares them within a cluster.
COPY, MATMUL, L2 = 4.3e12, 790e12, 7.0e12
# Assumed: share of the copy's speed that a memory-bound kernel reaches, of the matmul's that a tile of ours reaches,
# microseconds of ramp and drain, between two kernels, and of a tile's prologue and epilogue where nothing hides it.
STREAM, TENSOR, RAMP, GAP, EXPOSED = 0.85, 0.92, 1.5, 1.0, 2.5
# Tiles among which cuBLAS chooses, with the share of the matmul's speed that each is assumed to reach.
LIBRARY_TILES = {(128, 256): 0.97, (256, 128): 0.97, (128, 192): 0.93, (128, 128): 0.93, (64, 256): 0.93,
                 (128, 64): 0.8, (64, 128): 0.8}  # fmt: skip
CPU, BF16 = torch.device("cpu"), torch.bfloat16
ROWS = (512, 2048, 8192, 32768)


class Kernel(NamedTuple):
    """One launch: bytes and operations it cannot avoid, its tile and programs, microseconds ideal and estimated."""

    name: str
    tile: str
    programs: int
    resident: int
    waves: float
    megabytes: float
    gigaflops: float
    ideal_us: float
    estimate_us: float


def resident_programs(report: Path = REPORT) -> dict[tuple[str, str], int]:
    """(operation, tile as the compile report writes it) -> programs that fit a multiprocessor, the fewest in bf16."""
    found: dict[tuple[str, str], int] = {}
    for line in report.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 11 and cells[2] == "bf16" and "r = " not in cells[1]:
            key = cells[0], cells[3]
            found[key] = min(found.get(key, 99), int(cells[7]))
    return found


def written(tile: TileConfig) -> str:
    """A tile as the compile report writes it."""
    return f"{tile.rows}x{tile.columns}x{tile.depth}, {tile.warps}w, {tile.stages}s"


class Model:
    """Kernels of one case in bf16."""

    def __init__(self, case: Case, resident: dict[tuple[str, str], int]):
        self.case, self.resident = case, resident
        self.M, self.K, self.N = case.rows, case.width, case.total
        self.R = 3 * case.rank
        self.weights = [case.total] if case.fused else list(case.outputs)

    def stream(self, name: str, elements: int, tile: TileConfig | None = None, programs: int = 0) -> Kernel:
        """A kernel bound by memory that reads and writes so many bf16 elements."""
        size = 2 * elements
        each = self.resident.get((name, written(tile)), 1) if tile else 0
        waves = programs / (PROGRAMS * each) if tile else 0.0
        # Multiprocessors without a program leave a part of the bandwidth unused.
        idle = max(1.0, PROGRAMS / programs) if programs else 1.0
        estimate = size / (STREAM * COPY) * 1e6 * idle + RAMP + GAP
        shown = written(tile) if tile else "-"
        return Kernel(name, shown, programs, each, waves, size / 1e6, 0.0, size / COPY * 1e6, estimate)

    def tiled(self, name: str, tile: TileConfig, rows: int, columns: list[int], depth: int, size: int) -> Kernel:
        """One of our matmuls."""
        programs = math.ceil(rows / tile.rows) * sum(math.ceil(n / tile.columns) for n in columns)
        each = self.resident[name, written(tile)]
        operations = 2.0 * rows * sum(columns) * depth
        one = 2.0 * tile.rows * tile.columns * depth / (MATMUL * TENSOR / PROGRAMS) * 1e6
        cache = 2.0 * programs * (tile.rows + tile.columns) * depth / L2 * 1e6
        waves = programs / (PROGRAMS * each)
        full, rest = divmod(programs, PROGRAMS * each)
        # Programs that share a multiprocessor share its tensor cores and hide each other's prologue and epilogue.
        last = 0.0 if rest == 0 else one * math.ceil(rest / PROGRAMS) + EXPOSED
        estimate = max(full * (one * each + EXPOSED / each) + last, cache) + GAP
        ideal = max(operations / MATMUL, size / COPY) * 1e6
        return Kernel(name, written(tile), programs, each, waves, size / 1e6, operations / 1e9, ideal, estimate)

    def library(self, name: str, rows: int, columns: int, depth: int) -> Kernel:
        """A matmul of the library."""
        operations, size = 2.0 * rows * columns * depth, 2 * (rows * depth + depth * columns + rows * columns)
        times = []
        for (height, width), share in LIBRARY_TILES.items():
            tiles = math.ceil(rows / height) * math.ceil(columns / width)
            one = 2.0 * height * width * depth / (MATMUL * share / PROGRAMS) * 1e6
            times.append((math.ceil(tiles / PROGRAMS) * one + 2.0 + GAP, tiles, f"{height}x{width}"))
        estimate, tiles, tile = min(times)
        ideal = max(operations / MATMUL, size / COPY) * 1e6
        return Kernel(name, tile, tiles, 1, tiles / PROGRAMS, size / 1e6, operations / 1e9, ideal, estimate)

    def frozen(self) -> list[Kernel]:
        """The layers without adapters, dx through each."""
        found = [self.library("cuBLAS y", self.M, n, self.K) for n in self.weights]
        found += [self.library("cuBLAS dx", self.M, self.K, n) for n in self.weights]
        return found + [self.stream("dx added", 3 * self.M * self.K) for _ in self.weights[1:]]

    def peft(self) -> list[Kernel]:
        """PEFT with bf16 adapters: a product with A and with B, a scale and a sum a layer, and their gradients."""
        M, K, found = self.M, self.K, self.frozen()
        for n in self.weights:
            passes = (M * K, M * n, 2 * M * n, 3 * M * n, 2 * M * n, M * n, M * n, M * K, M * K, 3 * M * K)
            found += [self.stream("pass", elements) for elements in passes]
        return found

    def fastlora(self) -> Iterator[Kernel]:
        """The shipped sequence with its probes, in the order of its launches."""
        M, K, N, R, widths = self.M, self.K, self.N, self.R, list(self.case.outputs)
        tile = choose_tiles("shrink", M, 0, K, R + PROBES, BF16, CPU)
        split = choose_split(math.ceil(M / tile.rows), math.ceil(K / tile.depth))
        yield self.stream("shrink", M * K + M * (R + PROBES), tile, math.ceil(M / tile.rows) * split)
        if choose_strategy("forward", M, N, K, R, BF16, CPU) == "fused":
            tile = choose_tiles("linear", M, N, K, self.case.rank, BF16, CPU)
            yield self.tiled("linear", tile, M, widths, K, 2 * (M * K + N * K + M * N))
        else:
            yield from (self.library("cuBLAS y", M, n, K) for n in self.weights)
            yield self.expand(M, widths, 2 * M * N)
        tile = choose_tiles("shrink_backward", M, 0, max(widths), R, BF16, CPU)
        programs = math.ceil(M / tile.rows) * len(widths)
        yield self.stream("shrink_backward", M * N + M * R, tile, programs)
        tile = choose_tiles("wgrad", M, N, 0, R, BF16, CPU)
        programs = math.ceil(K / tile.columns) + sum(math.ceil(n / tile.columns) for n in widths)
        programs *= choose_split(programs, math.ceil(M / tile.depth), 2)
        yield self.stream("wgrad", M * (N + K), tile, programs)
        yield self.stream("reduce", 4 * (R * K + N * (self.case.rank + PROBES)))
        if choose_strategy("backward", M, N, K, R, BF16, CPU) == "fused":
            tile = choose_tiles("linear_backward", M, N, K, R, BF16, CPU)
            yield self.tiled("linear_backward", tile, M, [K], N, 2 * (M * N + N * K + M * K))
        else:
            yield from (self.library("cuBLAS dx", M, K, n) for n in self.weights)
            yield from (self.stream("dx added", M * K) for _ in self.weights[1:])
            yield self.expand(M, [K], 2 * M * K)

    def expand(self, rows: int, columns: list[int], elements: int) -> Kernel:
        tile = choose_tiles("expand", rows, sum(columns), self.K, self.case.rank, BF16, CPU)
        programs = math.ceil(rows / tile.rows) * sum(math.ceil(n / tile.columns) for n in columns)
        return self.stream("expand", elements, tile, programs)

    def gradstat(self) -> list[Kernel]:
        """The exact statistic of all outputs in its one launch, and the weight gradient that it is held against."""
        N, K = self.N, self.K

        def programs(tile: TileConfig) -> int:
            return math.ceil(N / tile.rows) * math.ceil(K / tile.columns)

        tile = choose_filling("gradstat", programs, N, K, BF16, CPU)
        ours = self.tiled("gradstat", tile, N, [K], self.M, 2 * self.M * (N + K))
        return [ours, self.library("cuBLAS dW", N, K, self.M)]


def totals(kernels: list[Kernel]) -> tuple[float, float]:
    """(ideal, estimate) microseconds."""
    return sum(k.ideal_us for k in kernels), sum(k.estimate_us for k in kernels)


def row(case: Case, resident: dict[tuple[str, str], int]) -> dict:
    """A case with its kernels and its ratios, ideal and estimated."""
    model = Model(case, resident)
    kernels, frozen, peft = list(model.fastlora()), model.frozen(), model.peft()
    exact, matmul = model.gradstat()
    ratios = {
        "over frozen": [a / b for a, b in zip(totals(kernels), totals(frozen), strict=True)],
        "over PEFT bf16": [a / b for a, b in zip(totals(kernels), totals(peft), strict=True)],
        "gradstat over matmul": [exact.ideal_us / matmul.ideal_us, exact.estimate_us / matmul.estimate_us],
    }
    return {"case": case.name, "M": case.rows, "ratios": ratios, "kernels": [k._asdict() for k in [*kernels, exact]]}


def cases() -> list[Case]:
    """The benchmark's, and each at other numbers of rows."""
    others = [case for case in CASES.values() for _ in ROWS]
    scaled = [
        Case(f"{case.name} M={M}", M, case.width, case.outputs, case.rank, case.fused)
        for case, M in zip(others, ROWS * len(CASES), strict=True)
    ]
    return [*CASES.values(), *scaled]


def markdown(rows: list[dict]) -> str:
    """Estimates as tables."""
    lines = [
        "# Estimates, not measurements: what arithmetic and the compiler say of an H200",
        "",
        f"{COPY / 1e12} TB/s, {MATMUL / 1e12:.0f} TFLOP/s, L2 {L2 / 1e12} TB/s, bf16, r = 8, k = {PROBES}.",
        "The assumptions are in `benchmarks/gpu_model.py`.",
        "Written by `python -m benchmarks.gpu_model --out benchmarks/results`.",
        "",
        "| case | M | over frozen, ideal | estimate | over PEFT bf16, ideal | estimate | gradstat over matmul |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        frozen, peft, exact = r["ratios"].values()
        shown = " | ".join(f"{value:.2f}" for value in (*frozen, *peft, exact[1]))
        lines.append(f"| {r['case']} | {r['M']} | {shown} |")
    head = "| kernel | tile | programs | resident | waves | MB | GFLOP | ideal us | estimate us |"
    for r in rows[: len(CASES)]:
        lines += ["", f"## {r['case']}", "", head, "|---" * 9 + "|"]
        for k in r["kernels"]:
            numbers = f"{k['waves']:.2f} | {k['megabytes']:.1f} | {k['gigaflops']:.1f} | {k['ideal_us']:.1f}"
            lines.append(f"| {k['name']} | {k['tile']} | {k['programs']} | {k['resident']} | {numbers} "
                         f"| {k['estimate_us']:.1f} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the tables; with --out write ``gpu_model.json`` and ``gpu_model.md``."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, help="folder of the results")
    given = parser.parse_args()
    resident = resident_programs()
    rows = [row(case, resident) for case in cases()]
    print(markdown(rows))
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        result_files.write(given.out / "gpu_model.json", rows)
        (given.out / "gpu_model.md").write_text(markdown(rows))


if __name__ == "__main__":
    main()
