"""The operations over rows of several adapters: packed factors and tables for the kernels of the other files.

Everything here is adapter-major: entry ``g * n + i`` of a list is adapter g's factor of projection i. Work is each
adapter's own rows times its own ranks; a row's result does not depend on the rest of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import linear, linear_backward, shrink, wgrad
from .constants import device_constant
from .primitives import KeyDropout, Runs, Segments, multiples_of_8, unit_last
from .reduce import reduce_partials
from .tiling import GRID_LIMIT, TileConfig, choose_split, choose_tiles


class LoraRanks(NamedTuple):
    """Ranks [adapters][projections] and probe columns [adapters]; hashable, so that tables are kept by it."""

    by_adapter: tuple[tuple[int, ...], ...]
    probes: tuple[int, ...]

    @property
    def widths(self) -> list[int]:
        """Columns of h that each adapter uses."""
        return [sum(own) + k for own, k in zip(self.by_adapter, self.probes, strict=True)]

    @property
    def adapters(self) -> int:
        """How many there are."""
        return len(self.by_adapter)

    @property
    def even(self) -> bool:
        """Whether all are multiples of 8."""
        return multiples_of_8(*self.by_adapter, self.probes)

    def offsets(self, g: int) -> list[int]:
        """First column in h of each projection of adapter g."""
        return [sum(self.by_adapter[g][:i]) for i in range(len(self.by_adapter[g]))]


class RowBatch(NamedTuple):
    """Where the rows of each adapter stand: order int64 [M] or [0], ranges int64 [adapters, 2], on the device.

    ``schedule(ranges, rows, block)`` -> [tiles, 2]: adapter (-1: none) and first position of each tile of at most
    ``block`` rows, in the adapters' order.
    """

    order: Tensor
    ranges: Tensor
    schedule: Callable[[Tensor, int, int], Tensor]


class Dropout(NamedTuple):
    """Keys int64 [M, 2] of the rows; of each adapter the smallest word kept, and what keeps the mean, 1 / (1 - p).

    ``streams`` tell the masks of the projections apart, 0, 1, ... without.
    """

    keys: Tensor
    thresholds: tuple[int, ...]
    keep_scales: tuple[float, ...]
    streams: tuple[int, ...] = ()


def pack(factors: Sequence[Tensor]) -> Tensor:
    """Factors one after another, [elements]: one launch."""
    if len({f.shape[1] for f in factors}) > 1:
        factors = [f.reshape(-1) for f in factors]
    return torch.cat(factors).view(-1)


@device_constant
def _table(kind: str, ranks: LoraRanks, widths: tuple[int, ...], live: tuple[int, ...], device: torch.device) -> Tensor:
    # Ranks change seldom: kept, so that a step copies nothing to the device.
    if kind.startswith("wgrad"):
        rows = _wgrad_rows(ranks, widths, live, kind)
    else:
        rows = (_shrink_rows if kind == "shrink" else _pair_rows)(ranks, widths, live)
    return torch.tensor(rows, dtype=torch.int64, device=device)


@device_constant
def _thresholds(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


@device_constant
def _scales(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def _shrink_rows(ranks: LoraRanks, widths: tuple[int, ...], live: tuple[int, ...]) -> list[list[int]]:
    """Of each adapter: its first row of the packed factors, its rows, its first column in h."""
    rows, first = [], 0
    for width in ranks.widths:
        rows.append([first, width, 0])
        first += width
    return rows


def _pair_rows(ranks: LoraRanks, widths: tuple[int, ...], live: tuple[int, ...]) -> list[list[int]]:
    """Of each adapter and live projection: first element of B in the packed B, rank, first column in h."""
    rows, first = [], 0
    for g, some in enumerate(ranks.by_adapter):
        offsets = ranks.offsets(g)
        for i, (rank, width) in enumerate(zip(some, widths, strict=True)):
            if i in live:
                rows.append([first, rank, offsets[i]])
            first += rank * width
    return rows


def _wgrad_rows(ranks: LoraRanks, widths: tuple[int, ...], live: tuple[int, ...], kind: str) -> list[list[int]]:
    """Of each adapter and product (x, if ``widths`` leads with K, then the live dy): what ``wgrad_kernel`` reads.

    kind: "wgrad", or "wgrad x" and "wgrad dy" for a launch with the one or the others alone.

    First rank column, ranks, probes, region, strides of a column and a rank there, region of the probes, first probe
    column. Regions: all dA as [ranks, K], all dB as [N, rank], all Q as [N, probes].
    """
    depth, *outer = widths
    at_B = depth * sum(map(sum, ranks.by_adapter))
    at_Q = at_B + sum(rank * outer[i] for some in ranks.by_adapter for i, rank in enumerate(some) if i in live)
    rows, at_A = [], 0
    for g, (some, probes) in enumerate(zip(ranks.by_adapter, ranks.probes, strict=True)):
        total, offsets = sum(some), ranks.offsets(g)
        if depth and kind != "wgrad dy":
            rows.append([0, total, 0, at_A, 1, depth, 0, 0])
        at_A += total * depth
        for i in live:
            if kind != "wgrad x":
                rows.append([offsets[i], some[i], probes, at_B, some[i], 1, at_Q, total])
            at_B, at_Q = at_B + some[i] * outer[i], at_Q + probes * outer[i]
    return rows


def _segments(
    kind: str,
    batch: RowBatch,
    tiles: Tensor,
    ranks: LoraRanks,
    widths: Sequence[int] = (),
    live: Sequence[int] = (),
    scales: Sequence[float] | None = None,
) -> Segments:
    if ranks.adapters > GRID_LIMIT:
        raise ValueError(f"adapters: {ranks.adapters} in one batch; the Triton backend takes at most {GRID_LIMIT}")
    device = batch.ranges.device
    table, scales = _table(kind, ranks, tuple(widths), tuple(live), device), scales or [1.0] * ranks.adapters
    return Segments(tiles, batch.ranges, batch.order, table, _scales(tuple(scales), device))


def _dropout(drop: Dropout | None, ranks: LoraRanks) -> tuple[KeyDropout | None, Sequence[int]]:
    """The kernels' operand, and the streams of the projections' masks."""
    if drop is None:
        return None, ()
    device, n = drop.keys.device, len(ranks.by_adapter[0])
    table = _table("pairs", ranks, (0,) * n, tuple(range(n)), device)
    dropout = KeyDropout(drop.keys, _thresholds(drop.thresholds, device), _scales(drop.keep_scales, device), table)
    return dropout, drop.streams or range(n)


def grouped_shrink(
    x: Tensor,
    factors: Sequence[Tensor],
    batch: RowBatch,
    ranks: LoraRanks,
    tiles: TileConfig | None = None,
    drop: Dropout | None = None,
) -> Tensor:
    """``h[m] = x[m] F_g^T`` for the rows of every adapter g, the rest 0: x [M, K] -> h [M, max_g width_g].

    factors: by adapter its A_i [r_i, K] and, if it has probes, its P [k, K]; all of one dtype. With dropout every A_i
    sees its own mask of x, P none.
    """
    x = unit_last(x)
    M, K = x.shape
    h = torch.zeros(M, max(ranks.widths), dtype=x.dtype, device=x.device)
    if h.numel() and K:
        tiles = tiles or choose_tiles("grouped_shrink" + ("_dropout" if drop else ""), 0, 0, 0, 0, x.dtype, x.device)
        schedule = batch.schedule(batch.ranges, M, tiles.rows)
        segments, stacked = _segments("shrink", batch, schedule, ranks), pack(factors).view(-1, K)
        dropout, wide = _dropout(drop, ranks), max(ranks.widths)
        shrink.run([x], [stacked], h, [0], None, tiles, *dropout, segments, wide, ranks.even)
    return h


def grouped_expand_(
    y: Sequence[Tensor],
    h: Tensor,
    W: Sequence[Tensor],
    B: Sequence[Tensor],
    batch: RowBatch,
    ranks: LoraRanks,
    places: Sequence[tuple[int, int]],
    scales: Sequence[float],
    moments: bool = False,
    tiles: TileConfig | None = None,
    runs: Runs | None = None,
) -> list[Tensor]:
    """In place ``y[m] += s_gi h_gi[m] B_gi^T`` at projection i's place, for the rows of every adapter g.

    y_j [M, N_j], W_j [N_j, K]. Returns with ``moments`` the column sums of y_j and y_j^2 over each adapter's rows and
    their number, float64 [2, N_j + 1], entry ``g * len(y) + j``, views of one tensor for each output. ``runs``: of
    projections that interleave.
    """
    G, M, n = ranks.adapters, h.shape[0], len(places)
    make = torch.zeros if M == 0 else torch.empty
    sums = [make(G, 2, out.shape[1] + 1, dtype=torch.float64, device=h.device) for out in y] if moments else []
    if M:
        tiles = tiles or choose_tiles("expand", 0, 0, 0, 0, h.dtype, h.device)
        widths = [B[i].shape[0] for i in range(n)]
        schedule = batch.schedule(batch.ranges, M, tiles.rows)
        segments = _segments("pairs", batch, schedule, ranks, widths, range(n), scales)
        packed = pack(B).view(-1, 1)
        projections = []
        for (j, column), width in zip(places, widths, strict=True):
            w, out = W[j].narrow(0, column, width), y[j].narrow(1, column, width)
            own = sums[j][..., column:] if moments else None
            projections.append(linear.Projection(w, None, packed, out, own, 0, 1.0))
        linear.expand(h, h, projections, False, tiles, segments, ranks.even, runs)
    return [of_output[g] for g in range(G) for of_output in sums]


def grouped_shrink_backward(
    dy: Sequence[Tensor | None],
    B: Sequence[Tensor],
    batch: RowBatch,
    ranks: LoraRanks,
    scales: Sequence[float],
    tiles: TileConfig | None = None,
    runs: Runs | None = None,
) -> Tensor:
    """``dh[m, o_gi :] = s_gi dy_i[m] B_gi`` for the rows of every adapter: dy_i [M, N_i] -> dh [M, max_g R_g].

    At least one dy_i, the part of the gradient that is projection i's, is given. ``runs``: of projections that
    interleave, whose dy have a column stride of 1.
    """
    live = [i for i, part in enumerate(dy) if part is not None]
    wide = [unit_last(dy[i]) for i in live]
    n, M = len(dy), wide[0].shape[0]
    dh = torch.zeros(M, max(map(sum, ranks.by_adapter)), dtype=wide[0].dtype, device=wide[0].device)
    if dh.numel():
        tiles = tiles or choose_tiles("grouped_shrink", 0, 0, 0, 0, dh.dtype, dh.device)
        widths = [B[i].shape[0] for i in range(n)]
        some = [scales[g * n + i] for g in range(ranks.adapters) for i in live]
        schedule = batch.schedule(batch.ranges, M, tiles.rows)
        segments = _segments("pairs", batch, schedule, ranks, widths, live, some)
        packed, widest = [pack(B).view(-1, 1)] * len(live), max(map(max, ranks.by_adapter))
        options = tiles, None, (), segments, widest, ranks.even, runs and runs.of(live)
        shrink.run(wide, packed, dh, [0] * len(live), [1.0] * len(live), *options)
    return dh


def grouped_linear_backward_(
    dx: Tensor,
    dh: Tensor,
    A: Sequence[Tensor],
    batch: RowBatch,
    ranks: LoraRanks,
    tiles: TileConfig | None = None,
    drop: Dropout | None = None,
) -> Tensor:
    """In place ``dx[m] += dh[m] A_g`` for the rows of every adapter g: dx [M, K], dh [M, max_g R_g]; returns dx."""
    if dx.numel() and dh.numel():
        tiles = tiles or choose_tiles("expand" + ("_dropout" if drop else ""), 0, 0, 0, 0, dx.dtype, dx.device)
        without = ranks._replace(probes=(0,) * ranks.adapters)
        schedule = batch.schedule(batch.ranges, dx.shape[0], tiles.rows)
        segments, packed = _segments("shrink", batch, schedule, without), pack(A).view(-1, dx.shape[1])
        dropout = _dropout(drop, without)
        linear_backward.add_adapters_(dx, dh, [packed], [0], None, *dropout, tiles, segments, without.even)
    return dx


def grouped_wgrad(
    x: Tensor | None,
    dh: Tensor,
    dy: Sequence[Tensor | None],
    h: Tensor,
    widths: Sequence[int],
    batch: RowBatch,
    ranks: LoraRanks,
    scales: Sequence[float],
    dtype: torch.dtype = torch.float32,
    tiles: TileConfig | None = None,
    drop: Dropout | None = None,
    runs: Runs | None = None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """``dA = dh^T x``, ``dB = s dy_i^T h_i``, ``Q = dy_i^T h_P`` of every adapter over its own rows.

    x [M, K] (None: dA is not wanted), dy_i [M, widths_i] (None: zeros) -> dA [r, K], dB [N_i, r] in ``dtype`` and Q
    fp32 [N_i, k_g], each with one entry for every adapter and projection, views of one tensor each. ``runs`` as in
    ``grouped_shrink_backward``.
    """
    n, live = len(dy), [i for i, part in enumerate(dy) if part is not None]
    wide, K = [unit_last(dy[i]) for i in live], 0 if x is None else x.shape[1]
    pairs = [
        (rank, i, k) for some, k in zip(ranks.by_adapter, ranks.probes, strict=True) for i, rank in enumerate(some)
    ]
    sizes = [
        [rank * K for rank, _, _ in pairs],
        [rank * widths[i] if i in live else 0 for rank, i, _ in pairs],
        [k * widths[i] if i in live else 0 for _, i, k in pairs],
    ]
    total, M = sum(map(sum, sizes)), h.shape[0]
    make = torch.zeros if M == 0 else torch.empty
    flat = [
        make(sum(some), dtype=kind, device=h.device)
        for some, kind in zip(sizes, (dtype, dtype, torch.float32), strict=True)
    ]
    if M and total:
        inputs = [] if x is None else [wgrad.Product(unit_last(x), dh)]
        outer = [wgrad.Product(g, h, None, wgrad.run_of(runs, i)) for i, g in zip(live, wide, strict=True)]
        some = [scales[g * n + i] for g in range(ranks.adapters) for i in live]
        _wgrad_partials(inputs, outer, flat, batch, ranks, [K, *widths], live, some, tiles, drop)
    shapes = [
        [(rank, K) for rank, _, _ in pairs],
        [(widths[i], rank) for rank, i, _ in pairs],
        [(widths[i], k) for _, i, k in pairs],
    ]
    found = []
    for packed, some, shape in zip(flat, sizes, shapes, strict=True):
        views = packed.split(some)
        parts = zip(views, shape, some, strict=True)
        found.append([v.view(s) if size else packed.new_zeros(s) for v, s, size in parts])
    return found[0] if x is not None else [], found[1], found[2]


def _wgrad_partials(inputs, outer, flat, batch, ranks, widths, live, scales, tiles, drop) -> None:
    """Fill ``flat`` with all dA, dB and Q: x on its own if it is seen through dropout, else beside the dy."""
    first, total = (inputs or outer)[0].wide, sum(f.numel() for f in flat)
    M, dtype = first.shape[0], first.dtype
    unmasked = tiles or choose_tiles("wgrad", M, 0, widths[0], 0, dtype, first.device)
    masked = tiles or choose_tiles("wgrad_dropout", M, 0, widths[0], 0, dtype, first.device)
    programs = sum(triton.cdiv(p.wide.shape[1], unmasked.columns) for p in [*inputs, *outer])
    # A long run is cut, but partial sums never outweigh what is read, and parts times adapters fit the grid.
    read = sum(p.wide.numel() for p in [*inputs, *outer])
    most = min(read // total, GRID_LIMIT // ranks.adapters)
    parts = max(1, min(choose_split(programs, triton.cdiv(M, unmasked.depth), 2), most))
    partial = torch.empty(parts, total, dtype=torch.float32, device=flat[0].device)

    def launch(kind, products, each, tile, drop=None):
        if products:
            segments = _segments(kind, batch, batch.ranges, ranks, widths, live, each)
            dropout, streams = _dropout(drop, ranks)
            wgrad.run(products, partial, 0, tile, dropout, None, streams, segments, max(ranks.widths), ranks.even)

    if drop is None:
        n, ones = len(live), [1.0] * len(inputs)
        mixed = [s for g in range(ranks.adapters) for s in (*ones, *scales[g * n : g * n + n])]
        launch("wgrad", [*inputs, *outer], mixed, unmasked)
    else:
        launch("wgrad x", inputs, drop.keep_scales, masked, drop)
        launch("wgrad dy", outer, scales, unmasked)
    reduce_partials(partial, flat, [1.0] * 3)
