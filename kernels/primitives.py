"""What the kernels share: the records they take, launching, tile lookup, the matmul loop, dropout bits.

Kernels take NamedTuples of pointers and numbers, and a part that works on what is None is not compiled. (Triton 3.6
cannot compare a tuple that holds None with None: such a one is never optional.) For a group of projections the fields
are tuples with an entry for each: ``tl.static_range`` unrolls over them and ``tl.where`` chooses, so no weight is
concatenated and no table of addresses is built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from contextvars import copy_context
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


def hide_from_specialization(values: Sequence[int]) -> tuple[int, ...]:
    """Integers that Triton does not specialize on: odd and above 1. ``reveal`` undoes it inside a kernel.

    ``do_not_specialize`` does not reach into tuples, where an integer 1 becomes a constexpr and a multiple of 16 a
    kernel of its own. Ranks and offsets travel like this, so that an allocation of other ranks compiles nothing.
    """
    return tuple(2 * value + 3 for value in values)


def multiples_of_8(*values: Sequence[int]) -> bool:
    """Whether all are multiples of 8, the width of a 16-byte load of a 16-bit type."""
    return all(value % 8 == 0 for some in values for value in some)


class Matrix(NamedTuple):
    """A matrix, or for a group tuples of several: where it begins, elements from row to row, columns; columns touch.

    Where the columns are ranks, ``stride`` and ``columns`` are hidden from specialization.
    """

    data: Any
    stride: Any
    columns: Any


class RankColumns(NamedTuple):
    """Where each projection's ranks stand in h: first column and how many, hidden from specialization."""

    offsets: tuple
    ranks: tuple


class Runs(NamedTuple):
    """Columns of y and dy that are a projection's, where projections interleave: ``lengths`` of them are together, and
    ``gaps`` columns of others lie between.
    """

    lengths: tuple
    gaps: tuple

    def of(self, chosen: Sequence[int]) -> Runs:
        """Those of some of the projections."""
        return Runs(*(tuple(values[i] for i in chosen) for values in self))


class Factors(NamedTuple):
    """Low-rank factors: tensors, strides of their rows, their columns of h, scales, and the columns of y or dy that
    meet their rows (None: each projection's are together).

    With ``Segments`` the packed factors of all adapters are the only entry.
    """

    data: tuple
    strides: tuple
    columns: RankColumns
    scales: tuple | None = None
    runs: Runs | None = None


class Segments(NamedTuple):
    """What the kernels read of a batch whose rows belong to several adapters, all on their device.

    tiles [tiles, 2]: adapter (-1: none) and first position of each; ranges [adapters, 2]: positions of its rows; order:
    row at each position (empty: the position itself); table: where each adapter's factors lie; scales fp32.
    """

    tiles: Tensor
    ranges: Tensor
    order: Tensor
    table: Tensor
    scales: Tensor


class SeedDropout(NamedTuple):
    """Dropout with one seed for all rows: the smallest word kept, hidden from specialization; what keeps the mean."""

    seed: Tensor
    threshold: int
    scale: float


class KeyDropout(NamedTuple):
    """Dropout with a key for each row: keys [M, 2] (seed, counter); thresholds and scales (fp32) by adapter.

    table [adapters * projections, 3]: unused, rank, first column in h.
    """

    keys: Tensor
    thresholds: Tensor
    scales: Tensor
    table: Tensor


class Options(NamedTuple):
    """What a product is compiled for beside its tile.

    precision: of ``tl.dot`` for fp32; even_k: the sum is whole steps; even_r: ranks and strides over them are multiples
    of 8; aligned: rows of the factors start on 16 bytes; masked: projections with a dropout mask each, streams: the
    number by which ``keep_mask`` knows each of them; gather: the order of ``Segments`` is read.
    """

    precision: str
    even_k: bool = True
    even_r: bool = False
    aligned: bool = False
    masked: int = 0
    streams: tuple = ()
    gather: bool = False


class Rows(NamedTuple):
    """Rows of a tile: their numbers, and which exist."""

    numbers: tl.tensor
    exist: tl.tensor


class Keys(NamedTuple):
    """What dropout draws the bits of a tile's rows from, the smallest word it keeps, and what keeps the mean."""

    seed: tl.tensor
    counters: tl.tensor
    threshold: tl.tensor
    scale: tl.tensor


def matrix(tensor: Tensor) -> Matrix:
    """The operand for a matrix."""
    return Matrix(tensor, tensor.stride(0), tensor.shape[1])


def matrices(tensors: Sequence[Tensor]) -> Matrix:
    """The operand for the matrices of a group."""
    return Matrix(tuple(tensors), tuple(t.stride(0) for t in tensors), tuple(t.shape[1] for t in tensors))


def rank_matrix(tensor: Tensor) -> Matrix:
    """The operand for a matrix whose columns are ranks."""
    return Matrix(tensor, *hide_from_specialization([tensor.stride(0), tensor.shape[1]]))


def rank_columns(offsets: Sequence[int], ranks: Sequence[int]) -> RankColumns:
    """The operand for columns of h."""
    return RankColumns(hide_from_specialization(offsets), hide_from_specialization(ranks))


def seed_dropout(seed: Tensor | None, threshold: int, scale: float) -> SeedDropout | None:
    """The operand for dropout with one seed, None without a seed."""
    return None if seed is None else SeedDropout(seed, *hide_from_specialization([threshold]), scale)


def _workspace(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _start(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    if _uses_descriptors(options):
        # The kernel builds its descriptors in memory that Triton asks for; the caller's own allocator stays as it is.
        triton.set_allocator(_workspace)
    kernel[grid](*arguments, **options)


# Every launch goes through here, so that the compile report can compile without starting anything.
launcher: Callable[..., None] = _start


def _uses_descriptors(options: dict[str, Any]) -> bool:
    return "TILE" in options and options["TILE"].tma


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Start ``kernel`` over ``grid`` on the device of its first argument, with the warps and stages of its tile."""
    first = arguments[0]
    while isinstance(first, tuple):
        first = first[0]
    if "TILE" in options:
        options |= {"num_warps": options["TILE"].warps, "num_stages": options["TILE"].stages}
    there = torch.cuda.device(first.device) if first.is_cuda else nullcontext()
    with there:
        if _uses_descriptors(options):
            copy_context().run(launcher, kernel, grid, *arguments, **options)
        else:
            launcher(kernel, grid, *arguments, **options)


def precision(dtype: torch.dtype) -> str:
    """How ``tl.dot`` treats fp32 operands: as torch's own matmul is told to."""
    if dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # Where torch has both settings, the newer one follows the older; reading the older after the newer was set raises.
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if allowed else "ieee"


def unit_last(tensor: Tensor) -> Tensor:
    """The tensor with unit stride along its last dimension: itself, or a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def aligned(tensors: Sequence[Tensor]) -> bool:
    """Whether every row of every matrix starts on 16 bytes."""
    return all(t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 for t in tensors)


def block_rank(ranks: int) -> int:
    """Columns of a rank block: the power of two that holds ``ranks``, from a tensor core's 16 to 64."""
    return max(16, min(64, triton.next_power_of_2(ranks)))


@triton.jit
def reveal(value, EVEN: tl.constexpr = False):
    """The integer that ``hide_from_specialization`` hid; EVEN promises a multiple of 8, for wide loads."""
    number = (value - 3) >> 1
    if EVEN:
        number = tl.multiple_of(number, 8)
    return number


@triton.jit
def hidden_sum(value, other):
    """The sum of two hidden integers, hidden: revealed once it takes fewer registers than the sum of two revealed."""
    return value + other - 3


@triton.jit
def select(values, i_chosen):
    """``values[i_chosen]`` of a tuple of scalars or pointers of one type."""
    chosen = values[0]
    for i in tl.static_range(1, len(values)):
        chosen = tl.where(i_chosen == i, values[i], chosen)
    return chosen


@triton.jit
def select_matrix(group, i_chosen):
    """Matrix ``i_chosen`` of a group."""
    return Matrix(select(group.data, i_chosen), select(group.stride, i_chosen), select(group.columns, i_chosen))


@triton.jit
def spread(o_n, runs, i):
    """Where columns ``o_n`` of projection i lie, counted from its first."""
    if runs is None:
        return o_n
    else:
        return o_n + o_n // select(runs.lengths, i) * select(runs.gaps, i)


@triton.jit
def find_tile(i_tile, widths, BLOCK: tl.constexpr):
    """(entry, first column in it, first column of the entry among all) of a tile when each width is cut into blocks."""
    i_entry, i_first, o_entry = i_tile * 0, i_tile * 0, i_tile * 0
    i_next, o_next = tl.cdiv(widths[0], BLOCK), widths[0]
    for i in tl.static_range(1, len(widths)):
        reached = i_tile >= i_next
        i_entry = tl.where(reached, i, i_entry)
        i_first = tl.where(reached, i_next, i_first)
        o_entry = tl.where(reached, o_next, o_entry)
        i_next += tl.cdiv(widths[i], BLOCK)
        o_next += widths[i]
    return i_entry, (i_tile - i_first) * BLOCK, o_entry


@triton.jit
def swizzle(i_tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """(row tile, column tile), ordered in bands of GROUP row tiles so that neighbours share operands in L2."""
    band = GROUP * tiles_n
    i_first = (i_tile // band) * GROUP
    rows = tl.minimum(tiles_m - i_first, GROUP)
    return i_first + (i_tile % band) % rows, (i_tile % band) // rows


@triton.jit
def tile_rows(segments, adapter, i_tile, M, BLOCK: tl.constexpr, GATHER: tl.constexpr):
    """The rows of a tile: BLOCK in a row, or with ``segments`` those of one adapter."""
    if segments is None:
        o_row = i_tile * BLOCK + tl.arange(0, BLOCK)
        return Rows(o_row, o_row < M)
    else:
        o_position = tl.load(segments.tiles + 2 * i_tile + 1).to(tl.int64) + tl.arange(0, BLOCK)
        m_position = o_position < tl.load(segments.ranges + 2 * adapter + 1)
        if GATHER:
            o_position = tl.load(segments.order + o_position, mask=m_position, other=0)
        return Rows(o_position, m_position)


@triton.jit
def table_row(p_table, i_row, FIELDS: tl.constexpr, EVEN: tl.constexpr):
    """The first three of FIELDS integers of a table's row; EVEN promises that all are multiples of 8."""
    p_row = p_table + i_row * FIELDS
    first, second, third = tl.load(p_row), tl.load(p_row + 1), tl.load(p_row + 2)
    if EVEN:
        first, second, third = tl.multiple_of(first, 8), tl.multiple_of(second, 8), tl.multiple_of(third, 8)
    return first, second, third


@triton.jit
def store_moments(p_sum, stride, b_tile, m_row, m_column):
    """Sums of a tile's columns, and of their squares about the column's own mean: p_sum [columns], then ``stride`` on.

    b_tile [rows, columns] in fp32, m_row [rows, 1] says which rows exist.
    """
    rows = tl.maximum(tl.sum(tl.where(m_row, 1.0, 0.0), axis=0), 1.0)
    b_seen = tl.where(m_row, b_tile, 0.0)
    b_sum = tl.sum(b_seen, axis=0)
    b_shifted = tl.where(m_row, b_seen - (b_sum / rows)[None, :], 0.0)
    tl.store(p_sum, b_sum, mask=m_column)
    tl.store(p_sum + stride, tl.sum(b_shifted * b_shifted, axis=0), mask=m_column)


@triton.jit
def stacked_rows(factors, o_rank, ALIGNED: tl.constexpr):
    """Pointers to rows ``o_rank`` of factors stacked without gaps."""
    p_rows = factors.data[0] + (o_rank - reveal(factors.columns.offsets[0])).to(tl.int64) * factors.strides[0]
    for i in tl.static_range(1, len(factors.data)):
        o_own = o_rank - reveal(factors.columns.offsets[i])
        p_rows = tl.where(o_own >= 0, factors.data[i] + o_own.to(tl.int64) * factors.strides[i], p_rows)
    if ALIGNED:
        p_rows = tl.multiple_of(p_rows, 16)
    return p_rows


@triton.jit
def matmul_loop(b_acc, p_a, p_b, stride_b, m_a, m_b, K, TILE: tl.constexpr, OPTIONS: tl.constexpr):
    """``acc += a b^T`` over K: p_a [BM, 1], p_b [1, BN] at column 0; b's next column lies stride_b further."""
    BLOCK_K: tl.constexpr = TILE.depth
    o_k = tl.arange(0, BLOCK_K)
    for k in tl.range(0, K, BLOCK_K):
        m_k = k + o_k < K
        if OPTIONS.even_k:
            b_a = tl.load(p_a + (k + o_k)[None, :], mask=m_a, other=0.0)
            b_b = tl.load(p_b + (k + o_k)[:, None].to(tl.int64) * stride_b, mask=m_b, other=0.0)
        else:
            b_a = tl.load(p_a + (k + o_k)[None, :], mask=m_a & m_k[None, :], other=0.0)
            b_b = tl.load(p_b + (k + o_k)[:, None].to(tl.int64) * stride_b, mask=m_b & m_k[:, None], other=0.0)
        b_acc = tl.dot(b_a, b_b, b_acc, input_precision=OPTIONS.precision)
    return b_acc


@triton.jit
def row_keys(dropout, adapter, rows):
    """The keys of rows: one seed and p for all, or each row's key and its adapter's p."""
    if adapter is None:
        return Keys(tl.load(dropout.seed), rows.numbers, reveal(dropout.threshold), dropout.scale)
    else:
        p_key = dropout.keys + 2 * rows.numbers
        seeds, counters = tl.load(p_key, mask=rows.exist, other=0), tl.load(p_key + 1, mask=rows.exist, other=0)
        return Keys(seeds[:, None], counters, tl.load(dropout.thresholds + adapter), tl.load(dropout.scales + adapter))


@triton.jit
def masked_ranks(dropout, columns, adapter, PROJECTION: tl.constexpr, OPTIONS: tl.constexpr):
    """(first, end) of a projection's ranks among the stacked ones."""
    if adapter is None:
        first, rank = columns.offsets[PROJECTION], columns.ranks[PROJECTION]
        return reveal(first, OPTIONS.even_r), reveal(hidden_sum(first, rank), OPTIONS.even_r)
    else:
        _, rank, first = table_row(dropout.table, adapter * OPTIONS.masked + PROJECTION, 3, OPTIONS.even_r)
        return first, first + rank


@triton.jit
def keep_mask(seed, STREAM: tl.constexpr, o_row, o_first, threshold, COLUMNS: tl.constexpr):
    """Which of ``x[o_row, o_first : o_first + COLUMNS]`` dropout keeps; o_first is a multiple of 4.

    Word ``column % 4`` of ``philox(seed, (column // 4, row, row >> 32, stream))``, as ``reference.dropout``.
    """
    o_block = (o_first // 4 + tl.arange(0, COLUMNS // 4)).to(tl.uint32)
    c0 = tl.zeros((o_row.shape[0], COLUMNS // 4), tl.uint32) + o_block[None, :]
    row = o_row.to(tl.int64)[:, None]
    c1 = tl.zeros_like(c0) + (row & 0xFFFFFFFF).to(tl.uint32)
    c2 = tl.zeros_like(c0) + (row >> 32).to(tl.uint32)
    c3 = tl.full((o_row.shape[0], COLUMNS // 4), STREAM, tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3)
    least = threshold.to(tl.uint32)
    even = tl.interleave((w0 >= least).to(tl.int8), (w2 >= least).to(tl.int8))
    odd = tl.interleave((w1 >= least).to(tl.int8), (w3 >= least).to(tl.int8))
    return tl.interleave(even, odd) != 0
