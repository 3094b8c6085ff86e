"""The only block sizes and the only choice of strategy: what a GPU has measured, and where none has, an argued entry.

Registers and shared memory in the reasons are those of ``benchmarks/results/triton_compile_sm90.md``, which
``python -m fastlora.kernels.compile_report`` writes; a multiprocessor of sm_90 has 65,536 registers and 227 KiB. Where
no reason says otherwise, a neighbour with fewer warps or a deeper step spills at some rank that the report compiles.
``python -m device.sweep --write`` (in ``benchmarks``) times every entry and its neighbours and fills ``MEASURED``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

# Multiprocessors of an H100 or H200. A constant, so that sums are split alike, and results agree, on every GPU.
PROGRAMS = 132
# Programs along the second and the third axis of a grid: CUDA's limit.
GRID_LIMIT = 65535
# Elements a program of a reduction owns.
REDUCE_BLOCK = 1024
# Counters of 128 signs that a program draws: 32 KiB of fp32; 36 layers of width 768 with k = 8 fill a chip of 132.
SIGNS_BLOCK = 64


class Limits(NamedTuple):
    """A device's compute capability, the bytes of shared memory a program may ask for, its multiprocessors."""

    capability: tuple[int, int] = (9, 0)
    shared: int = 227 << 10
    multiprocessors: int = PROGRAMS


@functools.lru_cache(maxsize=64)
def limits(device: torch.device) -> Limits:
    """Those of a GPU; those of an H200 for tensors that are on none."""
    if device.type in ("cpu", "meta"):
        return Limits()
    found = torch.cuda.get_device_properties(device)
    return Limits((found.major, found.minor), found.shared_memory_per_block_optin, found.multi_processor_count)


class TileConfig(NamedTuple):
    """Tile of the output (rows x columns), step along the sum, warps, pipeline stages, row tiles in a band.

    shrink takes its columns from the ranks, and so does wgrad its rows: there ``columns`` is a width of x or dy.
    ``tma``: operands come through TMA descriptors into a fixed number of programs, where rows are 16-byte aligned.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    band: int = 8
    tma: bool = False

    def shared(self, itemsize: int) -> int:
        """Bytes of the stages of both operands; what else a kernel keeps is in the compile report."""
        return self.stages * self.depth * (self.rows + self.columns) * itemsize

    def fits(self, itemsize: int, device: Limits) -> bool:
        """Whether a device can run it. What is wider than 128 needs wgmma: elsewhere its sums spill."""
        wide = self.tma or max(self.rows, self.columns) > 128
        return self.shared(itemsize) <= device.shared and (device.capability == (9, 0) or not wide)


class Entry(NamedTuple):
    """A tile, the most rows of a problem that it is meant for (0: any), and why."""

    tile: TileConfig
    most_rows: int
    reason: str


_FFMA = "exact fp32 has no tensor cores: small tiles keep operands and sums in registers"
_FEW = "a narrow matrix has too few of the larger tiles for the chip"
_PHILOX = "bound by Philox: few counters a thread and mask, or its words spill"

# Operation and precision -> entries, from the fewest rows to any.
_TABLE: dict[tuple[str, str], tuple[Entry, ...]] = {
    ("shrink", "half"): (
        Entry(TileConfig(32, 0, 64, 8, 4), 4096, "memory bound: 128 programs at M = 4096 without a split"),
        Entry(TileConfig(64, 0, 64, 4, 4), 0, "memory bound: 3 resident with 3 stages of 8 KiB of x in flight each"),
    ),
    ("shrink", "fp32"): (Entry(TileConfig(32, 0, 64, 4, 3), 0, _FFMA),),
    ("shrink_backward", "half"): (
        Entry(TileConfig(32, 0, 64, 8, 4), 4096, "as shrink"),
        Entry(TileConfig(64, 0, 64, 4, 4), 0, "as shrink"),
    ),
    ("shrink_backward", "fp32"): (Entry(TileConfig(32, 0, 64, 4, 3), 0, _FFMA),),
    ("expand_backward", "half"): (
        Entry(TileConfig(256, 0, 64, 8, 2), 0, "few partial sums: a row of them for 256 rows of dy; 2 resident"),
        Entry(TileConfig(64, 0, 64, 4, 3), 0, "without wgmma"),
    ),
    ("expand_backward", "fp32"): (Entry(TileConfig(32, 0, 16, 4, 3), 0, _FFMA),),
    ("shrink_dropout", "half"): (Entry(TileConfig(32, 0, 32, 4, 2), 0, _PHILOX),),
    ("shrink_dropout", "fp32"): (Entry(TileConfig(16, 0, 32, 4, 2), 0, _PHILOX),),
    # Columns are ranks here; one entry, since how a row is summed may not depend on the other rows of its batch.
    ("grouped_shrink", "half"): (Entry(TileConfig(32, 32, 64, 4, 4), 0, "as shrink; padding at most 31 ranks"),),
    ("grouped_shrink_dropout", "half"): (Entry(TileConfig(32, 32, 32, 4, 3), 0, _PHILOX),),
    ("grouped_shrink_dropout", "fp32"): (Entry(TileConfig(16, 32, 32, 4, 2), 0, _PHILOX),),
    ("grouped_shrink", "fp32"): (Entry(TileConfig(32, 32, 32, 4, 3), 0, _FFMA),),
    ("linear", "half"): (
        Entry(TileConfig(64, 128, 64, 4, 4), 1024, "few rows: twice the programs of the next, one warpgroup each"),
        Entry(TileConfig(128, 128, 64, 8, 3), 8192, "64 sums a thread; 2 resident, which hide each other's ends"),
        Entry(
            TileConfig(128, 256, 64, 8, 4, tma=True),
            0,
            "many tiles a program: pays for its descriptors, and copies need no addresses, so that a fourth stage fits",
        ),
    ),
    ("shrink_linear", "half"): (
        Entry(TileConfig(64, 128, 64, 4, 3), 1024, "as linear; a stage less, for that of A beside it"),
        Entry(TileConfig(128, 128, 64, 8, 3), 8192, "as linear"),
        Entry(TileConfig(128, 256, 64, 8, 3), 0, "few tiles repeat the sum of h"),
    ),
    ("shrink_linear_backward", "half"): (
        Entry(TileConfig(64, 128, 64, 4, 3), 1024, "as shrink_linear"),
        Entry(TileConfig(128, 128, 64, 8, 3), 0, "as shrink_linear"),
    ),
    ("shrink_linear_backward", "fp32"): (Entry(TileConfig(32, 64, 16, 4, 3), 0, _FFMA),),
    ("shrink_linear", "fp32"): (Entry(TileConfig(64, 64, 16, 8, 3), 0, _FFMA),),
    ("linear_moments", "half"): (
        Entry(TileConfig(64, 128, 64, 4, 4), 1024, "as linear"),
        Entry(TileConfig(128, 128, 64, 8, 3), 8192, "as linear"),
        Entry(
            TileConfig(128, 256, 64, 8, 3), 0, "the persistent schedule spills with the moments of 128 sums a thread"
        ),
    ),
    ("linear_moments", "fp32"): (Entry(TileConfig(64, 64, 16, 8, 3), 0, _FFMA),),
    ("linear", "fp32"): (Entry(TileConfig(64, 64, 16, 8, 3), 0, _FFMA),),
    ("linear_backward", "half"): (
        Entry(TileConfig(64, 128, 64, 4, 4), 1024, "as linear"),
        Entry(TileConfig(128, 128, 64, 8, 3), 8192, "as linear; the loop restarts for each of three sources"),
        Entry(TileConfig(128, 256, 64, 8, 4, tma=True), 0, "as linear, but for its fixed number of programs"),
    ),
    ("linear_backward", "fp32"): (Entry(TileConfig(64, 64, 16, 4, 3), 0, _FFMA),),
    ("linear_backward_dropout", "half"): (Entry(TileConfig(64, 128, 64, 8, 3), 0, _PHILOX),),
    ("linear_backward_dropout", "fp32"): (Entry(TileConfig(32, 64, 16, 4, 3), 0, _PHILOX),),
    ("expand", "half"): (
        Entry(TileConfig(64, 64, 64, 4, 1), 0, "memory bound, one step deep: whole 128-byte lines, many resident"),
    ),
    ("expand", "fp32"): (Entry(TileConfig(32, 64, 16, 8, 1), 0, _FFMA),),
    ("expand_dropout", "half"): (Entry(TileConfig(32, 64, 64, 4, 1), 0, _PHILOX),),
    ("expand_dropout", "fp32"): (Entry(TileConfig(32, 64, 16, 4, 1), 0, _PHILOX),),
    ("wgrad", "half"): (
        Entry(
            TileConfig(64, 128, 64, 8, 4), 0, "memory bound: 2 resident with 3 stages of 16 KiB of x or dy in flight"
        ),
    ),
    ("wgrad", "fp32"): (Entry(TileConfig(64, 64, 16, 4, 3), 0, _FFMA),),
    ("wgrad_dropout", "half"): (Entry(TileConfig(64, 64, 32, 4, 3), 0, _PHILOX),),
    ("wgrad_dropout", "fp32"): (Entry(TileConfig(64, 32, 16, 4, 2), 0, _PHILOX),),
    # By ``choose_filling``: the first that fills half of the device.
    ("gradstat", "half"): (
        Entry(TileConfig(128, 256, 64, 8, 3), 0, "the largest tile, as for a weight gradient"),
        Entry(TileConfig(128, 128, 64, 8, 3), 0, "2 resident"),
        Entry(TileConfig(64, 128, 64, 4, 3), 0, _FEW),
        Entry(TileConfig(64, 64, 64, 4, 4), 0, _FEW),
    ),
    ("gradstat", "fp32"): (Entry(TileConfig(64, 64, 16, 4, 3), 0, _FFMA),),
    ("gradstat_diagonal", "half"): (
        Entry(TileConfig(128, 128, 64, 8, 3), 0, "two sums an entry: half of gradstat's largest tile"),
        Entry(TileConfig(64, 128, 64, 8, 3), 0, _FEW),
        Entry(TileConfig(64, 64, 64, 4, 4), 0, _FEW),
    ),
    ("gradstat_diagonal", "fp32"): (Entry(TileConfig(64, 64, 16, 4, 3), 0, _FFMA),),
    ("covariance", "half"): (
        Entry(TileConfig(128, 128, 64, 8, 3), 0, "square, as a tile is stored twice"),
        Entry(TileConfig(64, 64, 64, 4, 4), 0, _FEW),
    ),
    ("covariance", "fp32"): (Entry(TileConfig(64, 64, 16, 4, 3), 0, _FFMA),),
}


# Operations whose rows are all aligned to 16 bytes: others have another strategy.
_ALIGNED = frozenset({"linear", "linear_moments", "linear_backward", "linear_backward_dropout", "shrink_linear",
                      "shrink_linear_backward", "expand_backward"})  # fmt: skip
# Rows and columns of tiles beside whose sums the addresses of other rows spill.
_ALIGNED_TILES = frozenset({("gradstat", 128, 256), ("gradstat", 64, 128), ("gradstat_diagonal", 128, 128),
                            ("covariance", 128, 128)})  # fmt: skip


def takes_unaligned(operation: str, tile: TileConfig) -> bool:
    """Whether rows that are not aligned to 16 bytes reach a tile."""
    return operation not in _ALIGNED and (operation, tile.rows, tile.columns) not in _ALIGNED_TILES


class Measurement(NamedTuple):
    """The fastest tile, or strategy, of a sweep at one size, and its milliseconds on a GPU."""

    M: int
    N: int
    K: int
    R: int
    choice: TileConfig | str
    milliseconds: float
    device: str

    def distance(self, *size: int) -> float:
        """The dimension that differs most, in powers of two; one that does not count is 0."""
        pairs = zip(self[:4], size, strict=True)
        return max((abs(math.log2(mine / other)) for mine, other in pairs if mine > 0 and other > 0), default=0.0)


# Operation, or "forward" and "backward" for the strategies, and precision -> measurements.
# begin measured
MEASURED: dict[tuple[str, str], tuple[Measurement, ...]] = {}
# end measured


# A measurement speaks for sizes that differ from its own by at most this factor in every dimension.
_NEAR = 2


def _measured(of: type, operation: str, kind: str, *size: int) -> Any:
    """The tile or strategy of the nearest measurement of one, if one is near."""
    of_it = [m for m in MEASURED.get((operation, kind), ()) if isinstance(m.choice, of)]
    found = [m for m in of_it if m.distance(*size) <= math.log2(_NEAR)]
    return min(found, key=lambda m: m.distance(*size)).choice if found else None


def _fitting(operation: str, dtype: torch.dtype, device: Limits) -> list[Entry]:
    kind = "fp32" if dtype == torch.float32 else "half"
    return [entry for entry in _TABLE[operation, kind] if entry.tile.fits(dtype.itemsize, device)]


def choose_tiles(
    operation: str, M: int, N: int, K: int, R: int, dtype: torch.dtype, device: torch.device
) -> TileConfig:
    """The tile for an operation at a size: M rows, N outputs, K inputs, R ranks.

    A near measurement decides, else the argued table; either counts only where the device can run it.
    ``ValueError`` if there is no tile so small.
    """
    kind, own = "fp32" if dtype == torch.float32 else "half", limits(device)
    measured = _measured(TileConfig, operation, kind, M, N, K, R)
    if measured is not None and measured.fits(dtype.itemsize, own):
        return measured
    fitting = _fitting(operation, dtype, own)
    if not fitting:
        raise ValueError(f"device: expected more shared memory for {operation} in {dtype}, {device} has {own.shared}")
    return next((e.tile for e in fitting if e.most_rows == 0 or e.most_rows >= M), fitting[-1].tile)


def choose_filling(
    operation: str,
    programs: Callable[[TileConfig], int],
    N: int,
    K: int,
    dtype: torch.dtype,
    device: torch.device,
    aligned: bool = True,
) -> TileConfig:
    """The largest tile that gives half of the multiprocessors a program, else the smallest; a near measurement decides.

    ``programs`` says how many a tile makes. Half, since a smaller tile reads its operands more often from the L2. The
    tiles of ``takes_unaligned`` alone are for rows that are not ``aligned`` to 16 bytes.
    """
    kind, own = "fp32" if dtype == torch.float32 else "half", limits(device)
    measured = _measured(TileConfig, operation, kind, 0, N, K, 0) if aligned else None
    if measured is not None and measured.fits(dtype.itemsize, own):
        return measured
    tiles = [entry.tile for entry in _fitting(operation, dtype, own)]
    tiles = [tile for tile in tiles if aligned or takes_unaligned(operation, tile)] or tiles
    return next((tile for tile in tiles if 2 * programs(tile) >= own.multiprocessors), tiles[-1])


def committed() -> list[tuple[str, str, Entry]]:
    """Every entry of the table and every measured tile: (operation, precision, entry)."""
    argued = [(operation, kind, entry) for (operation, kind), entries in _TABLE.items() for entry in entries]
    tiles = {
        (operation, kind, m.choice): f"{m.milliseconds:.4f} ms on {m.device}"
        for (operation, kind), found in MEASURED.items()
        for m in found
        if isinstance(m.choice, TileConfig)
    }
    return argued + [(operation, kind, Entry(tile, 0, reason)) for (operation, kind, tile), reason in tiles.items()]


def choose_split(programs: int, steps: int, waves: int = 1) -> int:
    """Into how many parts of four steps or more a sum is cut to have ``waves`` programs a multiprocessor.

    A split costs one more launch and a pass over the partial sums: shrink splits only when the chip would be half idle.
    """
    return max(1, min(waves * PROGRAMS // max(programs, 1), steps // 4))


def choose_parts(M: int, widths: Sequence[int], tile: TileConfig) -> tuple[int, int]:
    """Rows and columns of dy that a program of ``expand_backward`` takes, at most a tile's rows and whole steps.

    Columns are cut where widths differ or whole ones are too few programs. More than a wave of two programs a
    multiprocessor is cut into whole ones: a last wave of few programs would leave most of the memory's speed unused.
    """
    parts = -(-M // tile.rows)
    span = min(min(widths), -(-sum(widths) // -(-PROGRAMS // parts)))
    span = -(-span // tile.depth) * tile.depth
    units = sum(-(-width // span) for width in widths)
    waves = -(-parts * units // (2 * PROGRAMS))
    if waves > 1:
        parts = max(parts, waves * 2 * PROGRAMS // units)
    return -(-M // parts), span


def choose_strategy(
    direction: str, M: int, N: int, K: int, R: int, dtype: torch.dtype, device: torch.device, weights: int = 1
) -> str:
    """How ``linear`` ("forward" or "backward") runs: "fused", "library" (cuBLAS, then expand) or "augmented".

    Fusing saves a read and a write of the output. From the roofline, at width 768 the fused matmul pays from 0.69 of
    cuBLAS's speed in the forward and 0.88 in the backward, at 4096 from 0.92 and 0.95. Kernels of this kind are
    commonly seen at 0.7 to 0.85 of it by pointers, 0.85 to 0.95 persistent with TMA: so fused up to 1024 columns, the
    library's matmul above. In exact fp32 the library's tuned kernels win. "augmented" copies the input and W at every
    call where the library's way reads and writes the output once more: by the estimates that pays for outputs that are
    much wider than the input and have more rows than it has columns. The library rewrites dx for each of several
    ``weights``: above 8192 rows, where the tile with TMA is taken, one kernel pays by the estimates up to N = 3 K.

    How ``expand_backward`` runs: "fused" or "separate". By ``benchmarks/results/gpu_model.md`` one pass over dy pays
    for its larger partial sums and one or two launches more from 16 to 32 MB of dy.

    How ``shrink_linear`` runs, R being the ranks and probes of a projection: "fused" or "separate". 16 columns more a
    tile cost an eighth of the matmul, the second kernel 4 to 6 us: by the estimates that pays up to 6 * 2^30 products.
    Above 8192 rows the tile with TMA, which has no room for them, is kept. ``shrink_linear_backward``, R being the
    ranks of a projection, takes as much longer and saves a pass over dy: that pays wherever dx is "fused".
    """
    own = limits(device)
    measured = _measured(str, direction, "fp32" if dtype == torch.float32 else "half", M, N, K, R)
    modelled = dtype != torch.float32 and own.capability == (9, 0) and own.shared >= Limits().shared
    # What one kernel keeps beside a tile may not fit another device.
    if measured is not None and (modelled or direction in ("forward", "backward") or measured == "separate"):
        return measured
    if direction == "expand_backward":
        return "fused" if modelled and M * N >= 1 << 24 else "separate"
    if direction.startswith("shrink_linear"):
        small = K <= 1024 and M <= 8192 and R <= 16
        few = direction == "shrink_linear_backward" or M * N * K <= 6 << 30
        return "fused" if modelled and small and few else "separate"
    operation = "linear" if direction == "forward" else "linear_backward"
    if dtype == torch.float32 or not _fitting(operation, dtype, own):
        return "library"
    if K <= 1024 and (direction == "forward" or M <= 8192 or (modelled and weights > 1 and N <= 3 * K)):
        return "fused"
    # What is saved, in elements that are read or written twice; a weight's B is laid out by a dozen launches.
    saved, least = (M * (N - K), 1 << 26) if direction == "forward" else (M * (K - N), 1 << 24)
    return "augmented" if modelled and saved - N * K >= least else "library"
