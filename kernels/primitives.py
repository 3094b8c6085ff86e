"""What the kernels share: choosing among tuples, tile lookup, stacked factors, the matmul loop, dropout bits.

A group of projections reaches a kernel as tuples (pointers, widths, offsets); ``tl.static_range`` unrolls over them and
``tl.where`` chooses, so no weight is concatenated and no table of addresses is built.
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

from .tiling import TileConfig


class Segments(NamedTuple):
    """What the kernels read of a batch whose rows belong to several adapters, all on their device.

    tiles [tiles, 2]: adapter (-1: none) and first position of each; ranges [adapters, 2]: positions of its rows; order:
    row at each position (empty: the position itself); table: where each adapter's factors lie; scales fp32. ``even``:
    all numbers of the table are multiples of 8; ``widest``: most ranks of one of its rows. ``dropout``: none, or the
    table of pairs, keys [M, 2] (seed, counter), thresholds [adapters] and what keeps the mean, fp32 [adapters];
    ``masked``: projections, which have a mask each.
    """

    tiles: Tensor
    ranges: Tensor
    order: Tensor
    table: Tensor
    scales: Tensor
    even: bool
    widest: int
    dropout: tuple[Tensor, ...] = ()
    masked: int = 0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self[:5], *self.dropout)

    @property
    def gather(self) -> bool:
        return self.order.numel() > 0


def _workspace(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _start(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    if options.get("TMA"):
        # The kernel builds its descriptors in memory that Triton asks for; the caller's own allocator stays as it is.
        triton.set_allocator(_workspace)
    kernel[grid](*arguments, **options)


# Every launch goes through here, so that the compile report can compile without starting anything.
launcher: Callable[..., None] = _start


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Start ``kernel`` over ``grid`` on the device of its first argument."""
    first = arguments[0][0] if isinstance(arguments[0], tuple) else arguments[0]
    there = torch.cuda.device(first.device) if first.is_cuda else nullcontext()
    with there:
        if options.get("TMA"):
            copy_context().run(launcher, kernel, grid, *arguments, **options)
        else:
            launcher(kernel, grid, *arguments, **options)


def opaque(values: Sequence[int]) -> tuple[int, ...]:
    """Integers that Triton does not specialise on: odd and above 1. ``clear`` undoes it inside a kernel.

    Ranks and offsets travel like this, so that an allocation of other ranks compiles nothing.
    """
    return tuple(2 * value + 3 for value in values)


def even(*values: Sequence[int]) -> bool:
    """Whether all are multiples of 8, the width of a 16-byte load of a 16-bit type."""
    return all(value % 8 == 0 for some in values for value in some)


def precision(dtype: torch.dtype) -> str:
    """How ``tl.dot`` treats fp32 operands: as torch's own matmul is told to."""
    if dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # Where torch has both settings, the newer one follows the older; reading the older after the newer was set raises.
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if allowed else "ieee"


def compiled(tiles: TileConfig, dtype: torch.dtype) -> dict[str, Any]:
    """What every product is compiled with."""
    return {"PRECISION": precision(dtype), "num_warps": tiles.warps, "num_stages": tiles.stages}


def matmul_options(tiles: TileConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Blocks of a matmul with an adapter in its accumulator; ranks go by a tensor core's 16."""
    blocks = {"BLOCK_M": tiles.rows, "BLOCK_N": tiles.columns, "BLOCK_K": tiles.depth, "BLOCK_R": 16}
    return {"BAND": tiles.band, **blocks, **compiled(tiles, dtype)}


def unit_last(tensor: Tensor) -> Tensor:
    """The tensor with unit stride along its last dimension: itself, or a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def aligned(tensors: Sequence[Tensor]) -> bool:
    """Whether every row of every matrix starts on 16 bytes."""
    return all(t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 for t in tensors)


def block_rank(ranks: int, largest: int = 64) -> int:
    """Columns of a rank block: the power of two that holds ``ranks``, at least a tensor core's 16."""
    return max(16, min(largest, triton.next_power_of_2(ranks)))


@triton.jit
def clear(value, EVEN: tl.constexpr = False):
    """The integer that ``opaque`` hid; EVEN promises a multiple of 8, for wide loads."""
    number = (value - 3) >> 1
    if EVEN:
        number = tl.multiple_of(number, 8)
    return number


@triton.jit
def pick(values, i_chosen):
    """``values[i_chosen]`` of a tuple of scalars or pointers of one type."""
    chosen = values[0]
    for i in tl.static_range(1, len(values)):
        chosen = tl.where(i_chosen == i, values[i], chosen)
    return chosen


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
def own_rows(segments, i_tile, GATHER: tl.constexpr, BLOCK: tl.constexpr):
    """(row numbers [BLOCK], which exist) of a tile of one adapter's rows; segments = (tiles, ranges, order, ...)."""
    adapter = tl.load(segments[0] + 2 * i_tile).to(tl.int64)
    o_position = tl.load(segments[0] + 2 * i_tile + 1).to(tl.int64) + tl.arange(0, BLOCK)
    m_position = o_position < tl.load(segments[1] + 2 * adapter + 1)
    if GATHER:
        o_position = tl.load(segments[2] + o_position, mask=m_position, other=0)
    return o_position, m_position


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
def stacked_rows(p_factors, offsets, strides, o_rank, ALIGNED: tl.constexpr):
    """Pointers to rows ``o_rank`` of the factors stacked without gaps: factor i begins at row offsets[i]."""
    p_rows = p_factors[0] + (o_rank - clear(offsets[0])).to(tl.int64) * strides[0]
    for i in tl.static_range(1, len(p_factors)):
        o_own = o_rank - clear(offsets[i])
        p_rows = tl.where(o_own >= 0, p_factors[i] + o_own.to(tl.int64) * strides[i], p_rows)
    if ALIGNED:
        p_rows = tl.multiple_of(p_rows, 16)
    return p_rows


@triton.jit
def matmul_loop(b_acc, p_a, p_b, stride_b, m_a, m_b, K, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr,
                PRECISION: tl.constexpr):  # fmt: skip
    """``acc += a b^T`` over K: p_a [BM, 1], p_b [1, BN] at column 0; b's next column lies stride_b further."""
    o_k = tl.arange(0, BLOCK_K)
    for k in tl.range(0, K, BLOCK_K):
        m_k = k + o_k < K
        if EVEN_K:
            b_a = tl.load(p_a + (k + o_k)[None, :], mask=m_a, other=0.0)
            b_b = tl.load(p_b + (k + o_k)[:, None].to(tl.int64) * stride_b, mask=m_b, other=0.0)
        else:
            b_a = tl.load(p_a + (k + o_k)[None, :], mask=m_a & m_k[None, :], other=0.0)
            b_b = tl.load(p_b + (k + o_k)[:, None].to(tl.int64) * stride_b, mask=m_b & m_k[:, None], other=0.0)
        b_acc = tl.dot(b_a, b_b, b_acc, input_precision=PRECISION)
    return b_acc


@triton.jit
def dropout_of(segments, p_seed, i_group, o_m, m_m, threshold, keep_scale):
    """(seed, counter of each row, threshold, scale) of dropout: one for all rows, or row keys and the adapter's p."""
    if segments is None:
        return tl.load(p_seed), o_m, threshold, keep_scale
    else:
        p_key = segments[6] + 2 * o_m
        seeds, counters = tl.load(p_key, mask=m_m, other=0), tl.load(p_key + 1, mask=m_m, other=0)
        return seeds[:, None], counters, tl.load(segments[7] + i_group), tl.load(segments[8] + i_group)


@triton.jit
def masked_ranks(segments, i_group, PROJECTION: tl.constexpr, MASKED: tl.constexpr, firsts, ends,
                 EVEN: tl.constexpr = False):  # fmt: skip
    """(first, end) of a projection's ranks among the stacked ones."""
    if segments is None:
        return clear(firsts[PROJECTION], EVEN), clear(ends[PROJECTION], EVEN)
    else:
        _, rank, first = table_row(segments[5], i_group * MASKED + PROJECTION, 3, EVEN)
        return first, first + rank


@triton.jit
def keep_mask(seed, PROJECTION: tl.constexpr, o_row, o_first, threshold, COLUMNS: tl.constexpr):
    """Which of ``x[o_row, o_first : o_first + COLUMNS]`` dropout keeps; o_first is a multiple of 4.

    Word ``column % 4`` of ``philox(seed, (column // 4, row, row >> 32, projection))``, as ``reference.dropout``.
    """
    o_block = (o_first // 4 + tl.arange(0, COLUMNS // 4)).to(tl.uint32)
    c0 = tl.zeros((o_row.shape[0], COLUMNS // 4), tl.uint32) + o_block[None, :]
    row = o_row.to(tl.int64)[:, None]
    c1 = tl.zeros_like(c0) + (row & 0xFFFFFFFF).to(tl.uint32)
    c2 = tl.zeros_like(c0) + (row >> 32).to(tl.uint32)
    c3 = tl.full((o_row.shape[0], COLUMNS // 4), PROJECTION, tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3)
    least = threshold.to(tl.uint32)
    even = tl.interleave((w0 >= least).to(tl.int8), (w2 >= least).to(tl.int8))
    odd = tl.interleave((w1 >= least).to(tl.int8), (w3 >= least).to(tl.int8))
    return tl.interleave(even, odd) != 0
