"""Fixed-order sums of partial results, with scale and cast folded in: what replaces atomics."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .primitives import (
    Matrix,
    Runs,
    find_tile,
    hide_from_specialization,
    launch,
    matrix,
    reveal,
    select,
    spread,
)
from .tiling import REDUCE_BLOCK


@triton.jit(do_not_specialize=["total", "parts"])
def reduce_kernel(p_partial, p_out, sizes, scales, total, parts, BLOCK: tl.constexpr):
    """``out_i = scale_i * sum_p partial[p, region i]``; regions lie one after another in each part."""
    i_region, o_first, o_region = find_tile(tl.program_id(0), sizes, BLOCK)
    o_element = o_first + tl.arange(0, BLOCK)
    m_element = o_element < select(sizes, i_region)
    p_next = p_partial + o_region.to(tl.int64) + o_element
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for _ in tl.range(0, parts):
        b_sum += tl.load(p_next, mask=m_element, other=0.0)
        p_next += total
    b_sum *= select(scales, i_region)
    for i in tl.static_range(len(p_out)):
        if i_region == i:
            tl.store(p_out[i] + o_element, b_sum.to(p_out[i].dtype.element_ty), mask=m_element)


def reduce_partials(partial: Tensor, outputs: Sequence[Tensor], scales: Sequence[float]) -> None:
    """Sum ``partial`` [parts, total] over parts into contiguous outputs, which together hold ``total`` elements."""
    kept = [(out, float(scale)) for out, scale in zip(outputs, scales, strict=True) if out.numel()]
    if not kept:
        return
    sizes = tuple(out.numel() for out, _ in kept)
    grid = (sum(triton.cdiv(size, REDUCE_BLOCK) for size in sizes),)
    outs, scales = zip(*kept, strict=True)
    parts, total = partial.shape
    launch(reduce_kernel, grid, partial, outs, sizes, scales, total, parts, BLOCK=REDUCE_BLOCK, num_warps=4)


@triton.jit(do_not_specialize=["parts"])
def reduce_tiles_kernel(p_partial, p_out, parts, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of squares and of absolute values of each tile of SIZE elements, which is the sum of its parts."""
    i_tile = tl.program_id(0).to(tl.int64)
    b_squares, b_absolutes = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, SIZE, BLOCK):
        p_next = p_partial + i_tile * parts * SIZE + start + tl.arange(0, BLOCK)
        b_sum = tl.zeros((BLOCK,), tl.float32)
        for _ in tl.range(0, parts):
            b_sum += tl.load(p_next)
            p_next += SIZE
        b_squares += b_sum * b_sum
        b_absolutes += tl.abs(b_sum)
    tl.store(p_out + 2 * i_tile, tl.sum(b_squares))
    tl.store(p_out + 2 * i_tile + 1, tl.sum(b_absolutes))


def reduce_tiles(partial: Tensor, out: Tensor) -> None:
    """The two sums of each tile of ``partial`` [tiles, parts, size], first summed over its parts, into fp32 ``out``."""
    tiles, parts, size = partial.shape
    blocks = {"SIZE": size, "BLOCK": min(size, REDUCE_BLOCK)}
    launch(reduce_tiles_kernel, (tiles,), partial, out, parts, **blocks, num_warps=4)


@triton.jit(do_not_specialize=["total"])
def reduce_pairs_kernel(p_partial, p_out, counts, total, BLOCK: tl.constexpr):
    """``out[i, run] = sum_j partial[run, j]`` for pairs, over the j of region i, in float64."""
    i_run, i_region = tl.program_id(0), tl.program_id(1)
    o_region = i_region * 0
    for i in tl.static_range(len(counts)):
        o_region += tl.where(i < i_region, reveal(counts[i]), 0)
    count = reveal(select(counts, i_region))
    o_pair = tl.arange(0, 2)
    b_sum = tl.zeros((BLOCK, 2), tl.float64)
    for start in tl.range(0, count, BLOCK):
        o_item = start + tl.arange(0, BLOCK)
        o_element = (i_run.to(tl.int64) * total + o_region + o_item)[:, None] * 2 + o_pair[None, :]
        b_sum += tl.load(p_partial + o_element, mask=(o_item < count)[:, None], other=0.0).to(tl.float64)
    b_total = tl.sum(b_sum, axis=0)
    o_out = i_region.to(tl.int64) * tl.num_programs(0) + i_run
    tl.store(p_out + o_out * 2 + o_pair, b_total.to(p_out.dtype.element_ty))


def reduce_pairs(partial: Tensor, out: Tensor, counts: Sequence[int]) -> None:
    """Sum ``partial`` [runs, sum count_i, 2] over each region of count_i into fp32 ``out`` [regions, runs, 2]."""
    runs, total = partial.shape[:2]
    counts = hide_from_specialization(counts)
    launch(reduce_pairs_kernel, (runs, len(counts)), partial, out, counts, total, BLOCK=256, num_warps=4)


@triton.jit(do_not_specialize=["M"])
def moments_kernel(
    sums, out, ends, runs, ranges, M,
    ADAPTERS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Column sums and sums of squares in float64 from each row tile's sum and its squares about its own mean.

    The number of rows goes to the column ``ends`` of each output. With ``ranges`` of each adapter's own tiles, which
    follow one another; ADAPTERS: the power of two that holds them.
    """
    i_entry, o_first, o_entry = find_tile(tl.program_id(0), out.columns, BLOCK_N)
    o_n = o_first + tl.arange(0, BLOCK_N)
    m_n = o_n < select(out.columns, i_entry)
    adapter, i_before, own = tl.program_id(1).to(tl.int64), tl.zeros((), tl.int64), M.to(tl.int64)
    if ranges is not None:
        o_adapter = tl.arange(0, ADAPTERS)
        m_before = o_adapter < adapter
        p_pair = ranges + 2 * o_adapter
        length = tl.load(p_pair + 1, mask=m_before, other=0) - tl.load(p_pair, mask=m_before, other=0)
        i_before = tl.sum(tl.cdiv(length, BLOCK_M))
        own = tl.load(ranges + 2 * adapter + 1) - tl.load(ranges + 2 * adapter)
    b_total = tl.zeros((TILES, BLOCK_N), tl.float64)
    b_square = tl.zeros((TILES, BLOCK_N), tl.float64)
    for i_first in tl.range(0, tl.cdiv(own, BLOCK_M).to(tl.int32), TILES):
        o_tile = (i_first + tl.arange(0, TILES)).to(tl.int64)[:, None]
        m_sum = (o_tile * BLOCK_M < own) & m_n[None, :]
        p_sum = sums.data + (i_before + o_tile) * 2 * sums.stride + (o_entry + o_n)[None, :]
        b_sum = tl.load(p_sum, mask=m_sum, other=0.0).to(tl.float64)
        rows = tl.maximum(tl.minimum(own - o_tile * BLOCK_M, BLOCK_M), 1).to(tl.float64)
        b_total += b_sum
        b_square += tl.load(p_sum + sums.stride, mask=m_sum, other=0.0).to(tl.float64) + b_sum * b_sum / rows
    stride_out = select(out.stride, i_entry)
    p_first = select(out.data, i_entry) + adapter * 2 * stride_out
    p_tile = p_first + spread(o_n, runs, i_entry)
    tl.store(p_tile, tl.sum(b_total, axis=0), mask=m_n)
    tl.store(p_tile + stride_out, tl.sum(b_square, axis=0), mask=m_n)
    if o_first == 0:
        p_count = p_first + reveal(select(ends, i_entry))
        tl.store(p_count, own.to(tl.float64))
        tl.store(p_count + stride_out, own.to(tl.float64))


def reduce_moments(
    sums: Tensor,
    outputs: Sequence[Tensor],
    widths: Sequence[int],
    M: int,
    block: int,
    ranges: Tensor | None = None,
    runs: Runs | None = None,
) -> None:
    """Fill the first N_i columns of float64 outputs [2, N_i + 1 or more] from ``sums`` [2 tiles, sum N_i] of row tiles
    of height ``block``, and the last with the number of rows; ``widths``: N_i.

    With ``ranges`` [adapters, 2] the outputs are [adapters, 2, *] and each sums its own tiles. ``runs``: of outputs
    whose columns interleave.
    """
    adapters = 0 if ranges is None else ranges.shape[0]
    out = Matrix(tuple(outputs), tuple(m.stride(-2) for m in outputs), tuple(widths))
    ends = hide_from_specialization([m.shape[-1] - 1 for m in outputs])
    blocks = {"ADAPTERS": triton.next_power_of_2(adapters), "BLOCK_M": block, "BLOCK_N": 32, "TILES": 32}
    grid = (sum(triton.cdiv(width, blocks["BLOCK_N"]) for width in out.columns), max(adapters, 1))
    launch(moments_kernel, grid, matrix(sums), out, ends, runs, ranges, M, **blocks, num_warps=8)
