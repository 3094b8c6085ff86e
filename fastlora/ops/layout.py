"""Where things lie: projections in outputs, ranks in h, an adapter's rows in a batch."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import native, reference
from .reference import projections_of


class Layout(NamedTuple):
    """Where each projection of a group lies: ranks in h, columns in the outputs.

    Column n of projection i is column ``columns[i] + n // runs[i] * strides[i] + n % runs[i]`` of its output.
    """

    ranks: tuple[int, ...]
    offsets: tuple[int, ...]  # first column of projection i in h
    outputs: tuple[int, ...]  # index of the weight whose output holds projection i
    columns: tuple[int, ...]  # first column of projection i in that output
    widths: tuple[int, ...]
    runs: tuple[int, ...]  # columns of projection i that are together: all, unless projections interleave
    strides: tuple[int, ...]  # from one run to the next

    @property
    def places(self) -> tuple[int, ...]:
        """``columns``, and where projections interleave runs and strides behind: what the native passes take."""
        return self.columns if self.runs == self.widths else self.columns + self.runs + self.strides

    def columns_of(self, y: Tensor, i: int) -> Tensor:
        """The columns of projection i in its output [M, N]: a view where they are together."""
        first, width, run, stride = self.columns[i], self.widths[i], self.runs[i], self.strides[i]
        if run == width:
            return y.narrow(1, first, width)
        return y.unflatten(1, (-1, stride)).narrow(2, first, run).flatten(1)

    def runs_of(self, i: int) -> list[tuple[int, int, int]]:
        """(first of projection i's columns, where it lies in the output, how many) of what is together."""
        count = self.widths[i] // self.runs[i] if self.runs[i] else 1
        return [(n * self.runs[i], self.columns[i] + n * self.strides[i], self.runs[i]) for n in range(count)]

    @property
    def rank(self) -> int:
        return sum(self.ranks)

    @property
    def projections(self) -> int:
        return len(self.ranks)


def as_rows(tensor: Tensor) -> Tensor:
    """[*, K] as [M, K]."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def group_layout(W: Sequence[Tensor], B: Sequence[Tensor], blocks: Sequence[int] = ()) -> Layout:
    """Lay the projections over the concatenated rows of ``W``; a projection never straddles two weights.

    ``blocks``: the rows of weight j are that many equal blocks (1 without), each with its part of every projection.
    """
    return _layout_of(tuple([w.shape[0] for w in W]), tuple([b.shape for b in B]), tuple(blocks))


@functools.lru_cache(maxsize=4096)
def _layout_of(rows: tuple[int, ...], shapes: tuple[torch.Size, ...], blocks: tuple[int, ...]) -> Layout:
    widths, ranks = tuple(n for n, _ in shapes), tuple(r for _, r in shapes)
    offsets = [0, *itertools.accumulate(ranks)][:-1]
    outputs, columns, j, used = [], [], 0, 0
    for width in widths:
        while j < len(rows) and used == rows[j]:
            j, used = j + 1, 0
        if j == len(rows) or used + width > rows[j]:
            raise ValueError(f"lora_B: rows {list(widths)} do not tile weights with {list(rows)} rows")
        outputs.append(j)
        columns.append(used)
        used += width
    if sum(widths) != sum(rows):
        raise ValueError(f"lora_B: rows {list(widths)} do not tile weights with {list(rows)} rows")
    blocks = blocks or (1,) * len(rows)
    if len(blocks) != len(rows) or any(n < 1 or N % n for n, N in zip(blocks, rows, strict=False)):
        raise ValueError(f"blocks: expected a divisor of each of {list(rows)} rows, got {list(blocks)}")
    each = [blocks[j] for j in outputs]
    if any(width % n for width, n in zip(widths, each, strict=True)):
        raise ValueError(f"blocks: expected divisors of the projections' rows {list(widths)}, got {list(blocks)}")
    columns, runs = ([n // b for n, b in zip(of_all, each, strict=True)] for of_all in (columns, widths))
    strides = [rows[j] // blocks[j] for j in outputs]
    return Layout(ranks, tuple(offsets), tuple(outputs), tuple(columns), widths, tuple(runs), tuple(strides))


class GroupLayout:
    """Where the projections of a group lie, for one adapter or each of several: they differ in their ranks alone.

    ``starts``: of each adapter, one after another, the first columns of its projections in h and the end;
    ``blocks``: as in ``group_layout``.
    """

    def __init__(
        self, W: Sequence[Tensor], B: Sequence[Tensor], starts: Sequence[int] = (), blocks: Sequence[int] = ()
    ):
        self.projections, self.blocks = projections_of(W, B), tuple(blocks)
        self.starts = starts or column_starts([b.shape[1] for b in B], self.projections)
        self._rows, self._B = tuple([w.shape[0] for w in W]), B

    def of(self, g: int) -> Layout:
        """The layout of adapter g."""
        part = self._B[g * self.projections : (g + 1) * self.projections]
        return _layout_of(self._rows, tuple([b.shape for b in part]), self.blocks)

    def width(self, probes: Sequence[int]) -> int:
        """Columns of h: the largest rank of an adapter with its probe columns (none: ``probes`` is empty)."""
        totals = self.starts[self.projections :: self.projections + 1]
        return max((r + k for r, k in zip(totals, probes or [0] * len(totals), strict=True)), default=0)

    @property
    def ranks(self) -> tuple[tuple[int, ...], ...]:
        """Ranks of each adapter's projections."""
        n = self.projections + 1
        each = [self.starts[first : first + n] for first in range(0, len(self.starts), n)]
        return tuple([tuple([b - a for a, b in zip(own, own[1:], strict=False)]) for own in each])


def picks_columns(P: Tensor | None) -> bool:
    """Whether P are columns of x, int64 [projections, k], and not probe rows."""
    return P is not None and not P.is_floating_point()


class Rows(NamedTuple):
    """Rows of x by adapter: those of adapter g are ``order[ranges[g, 0]:ranges[g, 1]]``.

    order int64 [M], or [0] where every adapter's rows are one run and ``ranges`` [G, 2] indexes rows themselves; ids
    int64 [M] says the same row by row, -1 for the frozen layer alone. ``tiles`` int64 [T, 2]: the ``segment_tiles`` of
    each of ``SCHEDULED`` one after another, which a batch on a GPU makes once for all its layers; empty elsewhere.
    """

    ids: Tensor
    order: Tensor
    ranges: Tensor
    tiles: Tensor

    def schedule(self, block: int) -> Tensor:
        """(adapter, first position) of tiles of at most ``block`` rows, as ``fastlora.reference.segment_tiles``."""
        rows = self.ids.shape[0]
        if self.tiles.numel() and block in SCHEDULED:
            sizes = [-(-rows // own) + self.ranges.shape[0] for own in SCHEDULED]
            return self.tiles.split(sizes)[SCHEDULED.index(block)]
        return segment_tiles(self.ranges, rows, block)

    def each(self) -> Iterator[tuple[int, Tensor]]:
        """(adapter, its rows): indices for the adapters that have any, which takes ``ranges`` from the CPU.

        Elsewhere a mask of all rows for every adapter, since how many rows it has would have to be read back: this
        costs each adapter's rank for every row, which kernels over segments do not.
        """
        if not on_host(self.ranges.device):
            yield from ((g, self.ids == g) for g in range(self.ranges.shape[0]))
            return
        for g, (first, last) in enumerate(self.ranges.tolist()):
            if first == last:
                continue
            if self.order.numel():
                yield g, self.order[first:last]
            else:
                yield g, torch.arange(first, last, device=self.order.device)


class Dropout(NamedTuple):
    """Masks that are a function of a key, the projection's stream, the row and the column.

    ``key``: int64 scalar seed where one adapter has every row, else the rows' own keys [M, 2]; ``p`` by adapter;
    ``streams`` by projection, 0 or more.
    """

    key: Tensor
    p: Sequence[float]
    streams: Sequence[int]


class LoraCall(NamedTuple):
    """One call of an adapted group of linears, as every backend takes it.

    x [*, K]; W_j [N_j, K], bias_j [N_j] or None; A, B, scale by adapter, then projection; P (forward only) none, or
    probe rows [k, K] by adapter (one adapter: also int64 [projections, k], columns of x), ``probes`` their number k by
    adapter; ``rows`` None where one adapter has every row; ``drop`` None without dropout; ``moments`` asks for the
    column sums of y and y^2.
    """

    x: Tensor
    W: Sequence[Tensor]
    bias: Sequence[Tensor | None]
    A: Sequence[Tensor]
    B: Sequence[Tensor]
    P: Sequence[Tensor]
    probes: Sequence[int]
    scale: Sequence[float]
    layout: GroupLayout
    rows: Rows | None
    drop: Dropout | None
    engine: str
    moments: bool


class Need(NamedTuple):
    """Which gradients a backward is asked for."""

    dx: bool
    dA: bool
    dB: bool
    dZ: bool
    dW: bool
    dbias: bool


class Gradients(NamedTuple):
    """dx [M, K] or None; dA, dB, Q by adapter and projection, None where nothing contributes, empty if not needed."""

    dx: Tensor | None
    dA: Sequence[Tensor | None]
    dB: Sequence[Tensor | None]
    Q: Sequence[Tensor | None]


def on_host(device: torch.device) -> bool:
    """Whether reading a tensor's values waits for nothing."""
    return device.type == "cpu"


def moved(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on a device. Nothing waits for a copy to a GPU; the host, which reads at once, waits for one to it."""
    return tensor.to(device, dtype, non_blocking=not on_host(device))


def column_starts(ranks: Sequence[int], projections: int) -> list[int]:
    """Of each adapter, one after another: the first column of h of each of its projections, then its total rank."""
    starts: list[int] = []
    for first in range(0, len(ranks), projections):
        starts += [0, *itertools.accumulate(ranks[first : first + projections])]
    return starts


def build_segments(ids: Tensor, adapters: int) -> tuple[Tensor, Tensor]:
    """``(order, ranges)`` of rows sorted stably by id: see ``fastlora.reference.build_segments``."""
    if native.has_kernel("build_segments", ids.device):
        return torch.ops.fastlora.build_segments(ids, adapters)
    return reference.build_segments(ids, adapters)


SCHEDULED = (32, 64)  # rows of a tile: what the kernels over segments take without dropout


def segment_tiles(ranges: Tensor, rows: int, block: int) -> Tensor:
    """``fastlora.reference.segment_tiles``, by a kernel where there is one."""
    if native.has_kernel("segment_tiles", ranges.device):
        return torch.ops.fastlora.segment_tiles(ranges, rows, block)
    return reference.segment_tiles(ranges, rows, block)


class AdapterBatch:
    """The adapter of every sample or token of a batch, and its rows in a layer that sees them.

    ``ids`` int64 indexes ``names``, -1 meaning the frozen model alone: [S] (one a sample, dimension 0 of what a layer
    sees), or [S, T] or [M] (one a token). ``row_seeds``, of the same shape as ids [S], makes a row's dropout depend on
    its sample's seed, the layer and the place in the sample alone.
    """

    def __init__(self, names: Sequence[str], ids: Tensor, row_seeds: Tensor | None = None):
        self.names, self.ids, self.row_seeds = tuple(names), ids, row_seeds
        self._rows: dict[tuple[int, torch.device], Rows] = {}
        self._present: list[str] | None = None
        self._entries: dict[tuple[int, torch.device], Tensor] = {}

    def _times(self, x: Tensor) -> int:
        """Rows of a layer's input for each id."""
        rows, given = x.shape[:-1].numel(), self.ids.numel()
        if self.ids.dim() == 1 and x.dim() > 1 and x.shape[0] == given:
            return rows // max(given, 1)
        if rows == given:
            return 1
        raise ValueError(
            f"ids: {tuple(self.ids.shape)} given, but a layer sees an input of shape {tuple(x.shape)}; accepted: one a "
            f"sample ({x.shape[0]}, dimension 0) or one a token ({rows})"
        )

    def ids_of_rows(self, rows: int) -> Tensor:
        """The ids of rows that were flattened, those of a sample one after another."""
        given = self.ids.numel()
        if not given or rows % given:
            raise ValueError(f"ids: expected one a sample or one a token, got {given} for {rows} tokens")
        return self.ids.reshape(-1).repeat_interleave(rows // given)

    def rows(self, x: Tensor) -> Rows:
        """The rows of ``x`` [*, K] by adapter."""
        times = self._times(x)
        if torch.compiler.is_compiling():
            return self._build(times, x.device)
        key = (times, x.device)
        if key not in self._rows:
            with torch.inference_mode(False):  # a graph may save them later
                self._rows[key] = self._build(times, x.device)
        return self._rows[key]

    def _build(self, times: int, device: torch.device) -> Rows:
        ids = moved(self.ids.reshape(-1), device)
        ids = ids.repeat_interleave(times) if times > 1 else ids
        order, ranges = build_segments(ids, len(self.names))
        blocks = () if on_host(device) or torch.compiler.is_compiling() else SCHEDULED
        tiles = [segment_tiles(ranges, ids.shape[0], block) for block in blocks]
        return Rows(ids, order, ranges, torch.cat(tiles) if tiles else ranges.new_empty((0, 2)))

    def keys(self, x: Tensor, seed: Tensor, dropout_salt: int) -> Tensor:
        """Dropout keys of the rows of ``x``: from ``seed`` and the row, or from the row's own seed and the layer."""
        rows = x.shape[:-1].numel()
        if self.row_seeds is None:
            return reference.row_keys(seed, rows)
        times = self._times(x)
        seeds = moved(self.row_seeds.reshape(-1), x.device).repeat_interleave(times)
        place = torch.arange(times, device=x.device).repeat(seeds.shape[0] // max(times, 1))
        return torch.stack([seeds, place + (dropout_salt << 32)], dim=1)

    def present(self) -> list[str]:
        """The adapters that have an id (reads them back from a device)."""
        if self._present is None:
            found = torch.bincount(self.ids.reshape(-1) + 1, minlength=len(self.names) + 1)[1:].tolist()
            self._present = [name for name, count in zip(self.names, found, strict=True) if count]
        return self._present

    def samples(self, name: str) -> int | Tensor:
        """How many ids are an adapter's: a tensor where they are on a device, so that nothing waits for it."""
        count = (self.ids == self.names.index(name)).sum()
        return int(count) if count.device.type == "cpu" and not torch.compiler.is_compiling() else count

    def select(self, name: str, x: Tensor) -> tuple[Tensor, bool]:
        """Where an adapter is in ``x`` [*, K]: entries of dimension 0, or (True) of its flattened rows.

        Reads ids back from a device, once for all layers.
        """
        flat = not (self.ids.dim() == 1 and x.dim() > 1 and x.shape[0] == self.ids.numel())
        key = (self.names.index(name), x.device)
        if torch.compiler.is_compiling():
            return self._entries_of(*key), flat
        if key not in self._entries:
            self._entries[key] = self._entries_of(*key)
        return self._entries[key], flat

    def _entries_of(self, index: int, device: torch.device) -> Tensor:
        return moved((self.ids.reshape(-1) == index).nonzero()[:, 0], device)
