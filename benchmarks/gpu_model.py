"""Estimates, without a GPU, of a q, k, v group's kernels on an H200: bytes, waves, microseconds.

    python -m benchmarks.gpu_model [--out benchmarks/results]

Strategies and tiles are the shipped ones, programs a multiprocessor those of the compile report. "Ideal" has every
byte at the copy's speed, every operation at the matmul's and nothing else. "Estimate" adds what kernels are seen to
lose; its constants are assumptions, named below. None of it is a measurement.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from fastlora.kernels.tiling import (
    PROGRAMS,
    TileConfig,
    choose_filling,
    choose_parts,
    choose_split,
    choose_strategy,
    choose_tiles,
)

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
# Modelled alone: small factors appended once a step to a second copy of every weight.
UNSHIPPED = "augmented, W kept"
# Where outputs are wider than the input, or narrower.
MLP = [
    Case("llama3_8b_gate_up", 8192, 4096, (14336, 14336)),
    Case("llama3_8b_down", 8192, 14336, (4096,)),
]  # fmt: skip


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
        if len(cells) == 11 and cells[2] == "bf16" and not re.search("r = |unaligned", cells[1]):
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
        self.R = len(case.outputs) * case.rank
        self.weights = [case.total] if case.fused else list(case.outputs)

    def stream(self, name: str, elements: int, tile: TileConfig | None = None, programs: int = 0) -> Kernel:
        """A kernel bound by memory that reads and writes so many bf16 elements."""
        size = 2 * elements
        each = self.resident.get((name, written(tile)), 1) if tile else 0
        waves = programs / (PROGRAMS * each) if tile else 0.0
        # Multiprocessors without a program leave a part of the bandwidth unused: in the last wave, or the only one.
        last = programs % (PROGRAMS * each) if each else 0
        idle = 1 + max(0, PROGRAMS - last) / programs if last else 1.0
        estimate = size / (STREAM * COPY) * 1e6 * idle + RAMP + GAP
        shown = written(tile) if tile else "-"
        return Kernel(name, shown, programs, each, waves, size / 1e6, 0.0, size / COPY * 1e6, estimate)

    def tiled(
        self, name: str, tile: TileConfig, rows: int, columns: list[int], depth: int, size: int, ranks: int = 0
    ) -> Kernel:
        """One of our matmuls; beside each tile's columns it sums ``ranks``, whose factors are fp32."""
        programs = math.ceil(rows / tile.rows) * sum(math.ceil(n / tile.columns) for n in columns)
        each = self.resident[name, written(tile)]
        operations, beside = 2.0 * rows * (sum(columns) + ranks) * depth, 16 * math.ceil(ranks / 16)
        one = 2.0 * tile.rows * (tile.columns + beside) * depth / (MATMUL * TENSOR / PROGRAMS) * 1e6
        cache = 2.0 * programs * (tile.rows + tile.columns + 2 * ranks) * depth / L2 * 1e6
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
        for strategies in (self.forward(), self.backward()):
            yield from next(kernels for kernels, chosen in strategies.values() if chosen)

    def choose(self, direction: str, R: int) -> str:
        """The shipped strategy."""
        N, K = self.N, 0 if direction == "expand_backward" else self.K
        return choose_strategy(direction, self.M, N, K, R, BF16, CPU, len(self.weights))

    def forward(self) -> dict[str, tuple[list[Kernel], bool]]:
        """Strategy -> the kernels of h and y, and whether it is the shipped one."""
        M, K, N, R, each = self.M, self.K, self.N, self.R, self.case.rank + PROBES
        widths, size, h = list(self.case.outputs), 2 * (M * K + N * K + M * N), M * (R + PROBES)
        tile = choose_tiles("shrink", M, 0, K, R + PROBES, BF16, CPU)
        split = choose_split(math.ceil(M / tile.rows), math.ceil(K / tile.depth))
        programs, made = math.ceil(M / tile.rows) * split, h if split == 1 else 2 * split * h
        shrink = [self.stream("shrink", M * K + made, tile, programs)]
        shrink += [self.stream("reduce", made + h)] if split > 1 else []
        found = {
            "library": [*(self.library("cuBLAS y", M, n, K) for n in self.weights), self.expand(M, widths, 2 * M * N)]
        }
        found["augmented"] = self.augmented(
            "y", [(M, K)], [(n, K) for n in self.weights], [(M, n, K) for n in self.weights]
        )
        found[UNSHIPPED] = [*self.augmented("x", [(M, K)], [], [(M, n, K) for n in self.weights])]
        found[UNSHIPPED] += [self.stream("B appended", 2 * n * R) for n in self.weights]
        tile = choose_tiles("linear", M, N, K, self.case.rank, BF16, CPU)
        found["fused"] = [self.tiled("linear", tile, M, widths, K, size)]
        shipped, beside = self.choose("forward", R), self.choose("shrink_linear", each) == "fused"
        strategies = {name: (shrink + kernels, name == shipped and not beside) for name, kernels in found.items()}
        tile = choose_tiles("shrink_linear", M, N, K, R + PROBES, BF16, CPU)
        together = [self.tiled("shrink_linear", tile, M, widths, K, size + 2 * h, each)]
        return strategies | {"h beside y": (together, beside)}

    def augmented(self, name: str, inputs: list, weights: list, products: list) -> list[Kernel]:
        """Copies of the inputs and weights with the small factors appended, B scaled first, and the products."""
        found = [self.stream("copied", 2 * rows * columns + rows * self.R) for rows, columns in [*inputs, *weights]]
        if name == "y":
            found += [self.stream("scaled", 0) for _ in range(len(weights) + 4 * len(self.case.outputs))]
        return found + [self.library(f"cuBLAS {name}", m, n, k + self.R) for m, n, k in products]

    def backward(self) -> dict[str, tuple[list[Kernel], bool]]:
        """Strategy -> the kernels of dh, dA, dB, Q and dx, and whether it is the shipped one."""
        M, K, N, R = self.M, self.K, self.N, self.R
        size = 2 * (M * N + N * K + M * K)
        tile = choose_tiles("linear_backward", M, N, K, R, BF16, CPU)
        library = [*(self.library("cuBLAS dx", M, K, n) for n in self.weights)]
        library += [*(self.stream("dx added", M * K) for _ in self.weights[1:]), self.expand(M, [K], 2 * M * K)]
        dx = {
            "library": library,
            "augmented": self.augmented("dx", [(M, N)], [(N, K)], [(M, K, N)]),
            UNSHIPPED: [
                *self.augmented("dx", [(M, N)], [], [(M, K, N)]),
                self.stream("A appended", 2 * R * K),
            ],
            "fused": [self.tiled("linear_backward", tile, M, [K], N, size)],
        }
        factors = {"dy twice": self.separate(), "dy once": self.one_pass()}
        once = self.choose("expand_backward", R + PROBES) == "fused"
        shipped, beside = self.choose("backward", R), self.choose("shrink_linear_backward", self.case.rank) == "fused"
        strategies = {
            f"{how}, {name}": ([*first, *last], not beside and name == shipped and (how == "dy once") == once)
            for how, first in factors.items()
            for name, last in dx.items()
        }
        tile = choose_tiles("shrink_linear_backward", M, N, K, R, BF16, CPU)
        together = [self.tiled("shrink_linear_backward", tile, M, [K], N, size + 2 * M * R, self.case.rank)]
        rest = [kernel for kernel in self.separate() if kernel.name == "wgrad"] + self.separate()[-1:]
        return strategies | {"dh beside dx": (together + rest, beside)}

    def one_pass(self) -> list[Kernel]:
        """dh, dA, dB and Q, of which all but dA come out of one pass over dy."""
        M, K, N, R, widths = self.M, self.K, self.N, self.R, self.case.outputs
        kept = N * (self.case.rank + PROBES)
        tile = choose_tiles("expand_backward", M, N, 0, R + PROBES, BF16, CPU)
        rows, span = choose_parts(M, widths, tile)
        parts, cuts = math.ceil(M / rows), math.ceil(max(widths) / span)
        programs = parts * sum(math.ceil(n / span) for n in widths)
        dh = M * R if cuts == 1 else 2 * cuts * M * R
        found = [self.stream("expand_backward", M * N + M * (R + PROBES) + dh + 2 * parts * kept, tile, programs)]
        found += [self.stream("reduce", dh + M * R)] if cuts > 1 else []
        found.append(self.stream("reduce", 2 * (parts + 1) * kept))
        return found + self.wgrad([K], M * (K + R), R * K)

    def separate(self) -> list[Kernel]:
        """dh from one pass over dy, dA, dB and Q from another."""
        M, K, N, R, widths = self.M, self.K, self.N, self.R, self.case.outputs
        tile = choose_tiles("shrink_backward", M, 0, max(widths), R, BF16, CPU)
        split = choose_split(math.ceil(M / tile.rows) * len(widths), math.ceil(min(widths) / tile.depth))
        programs, dh = math.ceil(M / tile.rows) * len(widths) * split, M * R if split == 1 else 2 * split * M * R
        found = [self.stream("shrink_backward", M * N + dh, tile, programs)]
        found += [self.stream("reduce", dh + M * R)] if split > 1 else []
        kept = R * K + N * (self.case.rank + PROBES)
        return found + self.wgrad([K, *widths], M * (N + K + 2 * R + PROBES), kept)

    def wgrad(self, columns: list[int], elements: int, kept: int) -> list[Kernel]:
        tile = choose_tiles("wgrad", self.M, 0, 0, self.R, BF16, CPU)
        programs, steps = sum(math.ceil(n / tile.columns) for n in columns), math.ceil(self.M / tile.depth)
        split = choose_split(programs, steps, 2)
        summed = self.stream("wgrad", elements + 2 * split * kept, tile, programs * split)
        return [summed, self.stream("reduce", 2 * (split + 1) * kept)]

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
    strategies = [
        {
            "part": part,
            "strategy": name,
            "shipped": shipped,
            "launches": len(some),
            "megabytes": sum(k.megabytes for k in some),
        }
        | dict(zip(("ideal_us", "estimate_us"), totals(some), strict=True))
        for part, found in (("forward", model.forward()), ("backward", model.backward()))
        for name, (some, shipped) in found.items()
    ]
    kernels = [k._asdict() for k in [*kernels, exact]]
    return {"case": case.name, "M": case.rows, "ratios": ratios, "kernels": kernels, "strategies": strategies}


def cases() -> list[Case]:
    """The benchmark's, and each at other numbers of rows."""
    others = [case for case in CASES.values() for _ in ROWS]
    scaled = [
        Case(f"{case.name} M={M}", M, case.width, case.outputs, case.rank, case.fused)
        for case, M in zip(others, ROWS * len(CASES), strict=True)
    ]
    return [*CASES.values(), *scaled, *MLP]


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
    lines += [
        "",
        "## Strategies",
        "",
        "Estimates in us of h and y (forward) and of dh, dA, dB, Q and dx (backward).",
        'The shipped choice is **bold**, the least estimate has a star. "W kept" is not shipped and has none: the',
        "factors are appended once a step to a second copy of every weight.",
        "",
    ]
    for part in ("forward", "backward"):
        names = [s["strategy"] for s in rows[0]["strategies"] if s["part"] == part]
        lines += [f"| {part} | M | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
        for r in rows:
            some = [s for s in r["strategies"] if s["part"] == part]
            least = min(s["estimate_us"] for s in some if not s["strategy"].endswith(UNSHIPPED))
            cells = []
            for s in some:
                cell = (
                    f"{s['estimate_us']:.1f}"
                    + ("*" if s["estimate_us"] == least else "")
                    + f" ({s['megabytes']:.0f} MB)"
                )
                cells.append(f"**{cell}**" if s["shipped"] else cell)
            lines.append(f"| {r['case']} | {r['M']} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


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
