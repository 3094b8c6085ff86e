"""The only block sizes and the only choice of strategy. No GPU has measured them yet: each entry argues its reason.

The numbers in the reasons (registers a thread, shared memory) are those of ``benchmarks/results/triton_compile_sm90.md``,
which ``python -m fastlora.kernels.compile_report`` writes; a multiprocessor of sm_90 has 65,536 registers and 227 KiB.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

SHARED_LIMIT = 232448
# Two programs for each of the 132 multiprocessors of an H100 or H200. A constant, so that sums split alike everywhere.
PROGRAMS = 264
# Elements a program of a reduction owns.
REDUCE_BLOCK = 1024


class TileConfig(NamedTuple):
    """Tile of the output (rows x columns), step along the sum, warps, pipeline stages, row tiles in a band."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    band: int = 8


class Entry(NamedTuple):
    """A tile, the largest problem it is meant for (rows, 0: any), and why."""

    tile: TileConfig
    most_rows: int
    reason: str


# Verb and precision -> entries from the smallest M to any. `columns` of shrink and wgrad's `rows` come from the ranks.
_TABLE: dict[tuple[str, str], tuple[Entry, ...]] = {
    ("shrink", "half"): (
        Entry(TileConfig(32, 0, 64, 4, 4), 4096, "memory bound: 32 rows give 128 programs at M = 4096 before any split"),
        Entry(TileConfig(64, 0, 64, 4, 4), 0, "8 KiB of x a stage, 3 in flight, 3 resident: twice what hides HBM's latency"),
    ),
    ("shrink", "fp32"): (
        Entry(TileConfig(32, 0, 64, 4, 3), 0, "FFMA products: small tiles keep operands and sums in registers"),
    ),
    ("shrink_dropout", "half"): (
        Entry(TileConfig(32, 0, 32, 4, 3), 0, "bound by Philox: 2 counters a thread and mask; 4 spill at r = 64"),
    ),
    ("shrink_dropout", "fp32"): (
        Entry(TileConfig(16, 0, 32, 4, 2), 0, "as above beside FFMA operands"),
    ),
    ("linear", "half"): (
        Entry(TileConfig(64, 128, 64, 4, 4), 1024, "few rows: 64 x 128 doubles the programs, one warpgroup each"),
        Entry(TileConfig(128, 128, 64, 8, 4), 8192, "64 sums a thread: room for two resident programs to hide epilogues"),
        Entry(TileConfig(128, 256, 64, 8, 3), 0, "128 sums a thread; 85 FLOP a byte of shared memory, the most that fits"),
    ),
    ("linear", "fp32"): (
        Entry(TileConfig(64, 32, 16, 4, 3), 0, "FFMA products: 16 sums a thread; 32 spill beside the moments"),
    ),
    ("linear_backward", "half"): (
        Entry(TileConfig(64, 128, 64, 4, 4), 1024, "as linear"),
        Entry(TileConfig(128, 128, 64, 8, 4), 0, "as linear; N is summed over three sources, so the prologue repeats"),
    ),
    ("linear_backward", "fp32"): (
        Entry(TileConfig(64, 64, 16, 4, 3), 0, "as linear"),
    ),
    ("linear_backward_dropout", "half"): (
        Entry(TileConfig(64, 128, 64, 8, 3), 0, "one mask a projection before the loop: half a tile's Philox words a thread"),
    ),
    ("linear_backward_dropout", "fp32"): (
        Entry(TileConfig(32, 64, 16, 4, 3), 0, "as above beside FFMA operands"),
    ),
    ("expand", "half"): (
        Entry(TileConfig(64, 64, 64, 4, 1), 0, "memory bound and one step deep: whole 128-byte lines, few registers, many programs"),
    ),
    ("expand", "fp32"): (
        Entry(TileConfig(32, 64, 16, 4, 1), 0, "FFMA products over at most one rank block"),
    ),
    ("expand_dropout", "half"): (
        Entry(TileConfig(32, 64, 64, 4, 1), 0, "4 Philox counters a thread and mask"),
    ),
    ("expand_dropout", "fp32"): (
        Entry(TileConfig(32, 64, 16, 4, 1), 0, "as above beside FFMA operands"),
    ),
    ("wgrad", "half"): (
        Entry(TileConfig(64, 128, 64, 8, 4), 0, "`depth` rows a step: 16 KiB of x or dy a stage, 3 in flight; 4 warps spill at r = 64"),
    ),
    ("wgrad", "fp32"): (
        Entry(TileConfig(64, 64, 16, 4, 3), 0, "FFMA products: small tiles keep operands and sums in registers"),
    ),
    ("wgrad_dropout", "half"): (
        Entry(TileConfig(64, 64, 32, 4, 3), 0, "bound by Philox, as shrink_dropout"),
    ),
    ("wgrad_dropout", "fp32"): (
        Entry(TileConfig(64, 32, 16, 4, 2), 0, "as above beside FFMA operands"),
    ),
    ("gradstat", "half"): (
        Entry(TileConfig(128, 128, 64, 8, 3), 4096, "one run is a sample of a few hundred rows: many programs, short loops"),
        Entry(TileConfig(128, 256, 64, 8, 3), 0, "long runs: the largest tile, as a weight gradient wants"),
    ),
    ("gradstat", "fp32"): (
        Entry(TileConfig(64, 64, 16, 4, 3), 0, "FFMA products: 32 sums a thread"),
    ),
    ("covariance", "half"): (
        Entry(TileConfig(128, 128, 64, 8, 3), 0, "square tiles, as each is stored twice; 64 sums a thread"),
    ),
    ("covariance", "fp32"): (
        Entry(TileConfig(64, 64, 16, 4, 3), 0, "as gradstat"),
    ),
}  # fmt: skip


def choose_tiles(verb: str, M: int, N: int, K: int, R: int, dtype: torch.dtype) -> TileConfig:
    """The tile for a verb at a problem size; M rows (for gradstat: of the longest run), N outputs, K inputs, R ranks."""
    entries = _TABLE[verb, "fp32" if dtype == torch.float32 else "half"]
    return next(e.tile for e in entries if e.most_rows == 0 or e.most_rows >= M)


def committed() -> list[tuple[str, str, Entry]]:
    """Every entry of the table: (verb, precision, entry)."""
    return [(verb, kind, entry) for (verb, kind), entries in _TABLE.items() for entry in entries]


def choose_split(programs: int, steps: int) -> int:
    """Into how many parts a sum of ``steps`` is cut so that about ``PROGRAMS`` programs run, four steps at least each."""
    return max(1, min(PROGRAMS // max(programs, 1), steps // 4))


def choose_strategy(direction: str, M: int, N: int, K: int, R: int, dtype: torch.dtype) -> str:
    """How ``linear`` ("forward" or "backward") runs: "fused", "library" (cuBLAS, then expand) or "augmented".

    Fusing saves a read and a write of the output. From the roofline, at width 768 the fused matmul pays from 0.69 of
    cuBLAS's speed in the forward and 0.88 in the backward, at 4096 from 0.92 and 0.95. Kernels of this kind (pointers,
    no TMA) are commonly seen at 0.7 to 0.85, so: fused below 1024 columns, the library's matmul above. fp32 without tf32
    leaves the tensor cores, where the library's tuned kernels win. "augmented" copies W at every call: never the default.
    """
    if dtype == torch.float32:
        return "library"
    return "fused" if K <= 1024 and (direction == "forward" or M <= 8192) else "library"
