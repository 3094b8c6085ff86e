"""Gradstat: sums over the entries of dy^T x per run of rows, reduced in registers; covariances on half the tiles."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import (
    Options,
    aligned,
    find_tile,
    hide_from_specialization,
    launch,
    matrices,
    matrix,
    precision,
    reveal,
    select_matrix,
    swizzle,
    unit_last,
)
from .reduce import reduce_pairs, reduce_tiles
from .tiling import GRID_LIMIT, TileConfig, choose_filling, choose_split


class Split(NamedTuple):
    """Parts that the rows of every run are cut into, and where their products wait to be summed: fp32 tiles."""

    partial: Tensor
    parts: int


@triton.jit
def run_product(x, dy, first, count, o_n, o_k, TILE: tl.constexpr, OPTIONS: tl.constexpr):
    """One tile of ``dy^T x`` over ``count`` rows from ``first`` on."""
    BLOCK_M: tl.constexpr = TILE.depth
    BLOCK_N: tl.constexpr = TILE.rows
    BLOCK_K: tl.constexpr = TILE.columns
    m_n, m_k = (o_n < dy.columns)[None, :], (o_k < x.columns)[None, :]
    p_x, p_dy = x.data + first * x.stride + o_k[None, :], dy.data + first * dy.stride + o_n[None, :]
    b_acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for m in tl.range(0, count, BLOCK_M):
        o_m = (m + tl.arange(0, BLOCK_M))[:, None]
        b_dy = tl.load(p_dy + o_m.to(tl.int64) * dy.stride, mask=(o_m < count) & m_n, other=0.0)
        b_x = tl.load(p_x + o_m.to(tl.int64) * x.stride, mask=(o_m < count) & m_k, other=0.0)
        b_acc = tl.dot(tl.trans(b_dy), b_x, b_acc, input_precision=OPTIONS.precision)
    return b_acc


@triton.jit(do_not_specialize=["runs"])
def gradstat_kernel(x, dy, offsets, sums, diagonal, split, runs, TILE: tl.constexpr, OPTIONS: tl.constexpr):
    """Sum of squares and of absolute values of one tile of one run's ``dy_i^T x``; dy is a group, tiled as one matrix.

    With ``diagonal`` [sum N_i, K] of all runs' one after the other, whose squares are added to this tile of it. With
    ``split`` the product over one part of the run's rows goes there instead.
    """
    BLOCK_M: tl.constexpr = TILE.depth
    BLOCK_N: tl.constexpr = TILE.rows
    BLOCK_K: tl.constexpr = TILE.columns
    K, tiles_n, tiles_k = x.columns, tl.num_programs(0) // tl.cdiv(x.columns, BLOCK_K), tl.cdiv(x.columns, BLOCK_K)
    i_n, i_k = swizzle(tl.program_id(0), tiles_n, tiles_k, TILE.band)
    i_tile = i_n * tiles_k + i_k
    i_part, o_first, o_part = find_tile(i_n, dy.columns, BLOCK_N)
    dy = select_matrix(dy, i_part)
    o_n, o_k = o_first + tl.arange(0, BLOCK_N), i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    i_run = tl.program_id(1)
    p_out = sums + (i_run.to(tl.int64) * tl.num_programs(0) + i_tile) * 2
    if diagonal is not None:
        b_squares = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        # Addresses and masks of the inner loop are not kept over this one: they would cost registers for nothing.
        for i_each in tl.range(0, runs, num_stages=1, disable_licm=True):
            first, last = tl.load(offsets + i_each), tl.load(offsets + i_each + 1)
            b_acc = run_product(x, dy, first, (last - first).to(tl.int32), o_n, o_k, TILE, OPTIONS)
            b_squares += b_acc * b_acc
            p_each = p_out + i_each * tl.num_programs(0).to(tl.int64) * 2
            tl.store(p_each, tl.sum(b_acc * b_acc))
            tl.store(p_each + 1, tl.sum(tl.abs(b_acc)))
        p_tile = diagonal + (o_part + o_n).to(tl.int64)[:, None] * K + o_k[None, :]
        m_tile = (o_n < dy.columns)[:, None] & (o_k < K)[None, :]
        tl.store(p_tile, b_squares + tl.load(p_tile, mask=m_tile, other=0.0), mask=m_tile)
    else:
        first, last = tl.load(offsets + i_run), tl.load(offsets + i_run + 1)
        count = (last - first).to(tl.int32)
        if split is not None:
            each = tl.cdiv(tl.cdiv(count, BLOCK_M), reveal(split.parts)) * BLOCK_M
            o_start = tl.minimum(tl.program_id(2) * each, count)
            b_acc = run_product(x, dy, first + o_start, tl.minimum(count - o_start, each), o_n, o_k, TILE, OPTIONS)
            i_partial = (i_run * tl.num_programs(0) + i_tile) * reveal(split.parts) + tl.program_id(2)
            o_tile = tl.arange(0, BLOCK_N)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
            tl.store(split.partial + i_partial.to(tl.int64) * (BLOCK_N * BLOCK_K) + o_tile, b_acc)
        else:
            b_acc = run_product(x, dy, first, count, o_n, o_k, TILE, OPTIONS)
            tl.store(p_out, tl.sum(b_acc * b_acc))
            tl.store(p_out + 1, tl.sum(tl.abs(b_acc)))


@triton.jit(do_not_specialize=["M"])
def covariance_kernel(x, out, weight, M, scale, TILE: tl.constexpr, OPTIONS: tl.constexpr):
    """One tile on or below the diagonal of ``scale x^T x``, written to both of its places.

    With ``weight`` in place of scale, added at its place on or above the diagonal; a weight of 0 leaves all as it is.
    """
    BLOCK_M: tl.constexpr = TILE.depth
    BLOCK_N: tl.constexpr = TILE.rows
    N = x.columns
    if weight is not None:
        scale = tl.load(weight)
        if scale == 0.0:
            return
    i_tile = tl.program_id(0)
    # Tile (i, j), j <= i, is number i (i + 1) / 2 + j; the root may be one off in fp32.
    i_row = ((tl.sqrt(8.0 * i_tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i_row = tl.where(i_row * (i_row + 1) // 2 > i_tile, i_row - 1, i_row)
    i_row = tl.where((i_row + 1) * (i_row + 2) // 2 <= i_tile, i_row + 1, i_row)
    i_column = i_tile - i_row * (i_row + 1) // 2
    o_row, o_column = i_row * BLOCK_N + tl.arange(0, BLOCK_N), i_column * BLOCK_N + tl.arange(0, BLOCK_N)
    m_row, m_column = o_row < N, o_column < N
    b_acc = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    for m in tl.range(0, M, BLOCK_M):
        o_m = (m + tl.arange(0, BLOCK_M))[:, None]
        p_m = x.data + o_m.to(tl.int64) * x.stride
        b_left = tl.load(p_m + o_row[None, :], mask=(o_m < M) & m_row[None, :], other=0.0)
        b_right = tl.load(p_m + o_column[None, :], mask=(o_m < M) & m_column[None, :], other=0.0)
        b_acc = tl.dot(tl.trans(b_left), b_right, b_acc, input_precision=OPTIONS.precision)
    b_acc *= scale
    m_tile = m_row[:, None] & m_column[None, :]
    p_above = out + o_column.to(tl.int64)[None, :] * N + o_row[:, None]
    if weight is not None:
        tl.store(p_above, b_acc + tl.load(p_above, mask=m_tile, other=0.0), mask=m_tile)
    else:
        tl.store(out + o_row.to(tl.int64)[:, None] * N + o_column[None, :], b_acc, mask=m_tile)
        if i_row != i_column:
            tl.store(p_above, b_acc, mask=m_tile)


def _tiles(widths: Sequence[int], K: int, tile: TileConfig) -> int:
    return sum(triton.cdiv(N, tile.rows) for N in widths) * triton.cdiv(K, tile.columns)


def _half(N: int, tile: TileConfig) -> int:
    side = triton.cdiv(N, tile.rows)
    return side * (side + 1) // 2


def gradstat(
    x: Tensor,
    dy: Sequence[Tensor],
    offsets: Tensor,
    tiles: TileConfig | None = None,
    diagonal: Tensor | None = None,
) -> Tensor:
    """``sum G^2`` and ``sum |G|`` of each ``G = dy_i^T x`` over the rows ``offsets[j] : offsets[j + 1]``.

    All come out of one launch. x [M, K], dy_i [M, N_i] of one dtype, offsets int64 [runs + 1] on their device -> fp32
    [matrices, runs, 2]. No G is stored; but where all have fewer tiles than half the multiprocessors, rows are split
    and as many tiles as there are multiprocessors wait to be summed. ``diagonal``: fp32 [sum N_i, K], contiguous, to
    which the sum of G^2 over the runs is added; it changes only once everything that can run out of memory has been
    allocated.
    """
    x, dy = unit_last(x), [unit_last(part) for part in dy]
    runs, (M, K), widths = offsets.shape[0] - 1, x.shape, [part.shape[1] for part in dy]
    if runs == 0 or K == 0 or sum(widths) == 0:
        return torch.zeros(len(dy), runs, 2, dtype=torch.float32, device=x.device)
    operation = "gradstat" if diagonal is None else "gradstat_diagonal"
    # Without a diagonal a program takes one run.
    at_once = runs if diagonal is None else 1
    tiles = tiles or choose_filling(
        operation, lambda tile: at_once * _tiles(widths, K, tile), sum(widths), K, x.dtype, x.device, aligned([x, *dy])
    )
    count, options = _tiles(widths, K, tiles), Options(precision(x.dtype))
    parts = choose_split(runs * count, triton.cdiv(M, runs * tiles.depth)) if diagonal is None else 1
    sums = torch.empty(runs, count, 2, dtype=torch.float32, device=x.device)
    out, split = torch.empty(len(dy), runs, 2, dtype=torch.float32, device=x.device), None
    if parts > 1:
        size = runs * count * parts * tiles.rows * tiles.columns
        split = Split(torch.empty(size, dtype=torch.float32, device=x.device), *hide_from_specialization([parts]))
    each = GRID_LIMIT if diagonal is None else runs
    for start in range(0, runs, each):
        some = min(each, runs - start)
        some_runs = offsets[start:], sums[start:], diagonal, split, some
        grid = (count, some, parts) if diagonal is None else (count,)
        launch(gradstat_kernel, grid, matrix(x), matrices(dy), *some_runs, TILE=tiles, OPTIONS=options)
    if split is not None:
        reduce_tiles(split.partial.view(runs * count, parts, -1), sums)
    reduce_pairs(sums, out, [_tiles([width], K, tiles) for width in widths])
    return out


def _symmetric(x: Tensor, out: Tensor, weight: Tensor | None, scale: float, tiles: TileConfig | None) -> None:
    M, N = x.shape
    programs = functools.partial(_half, N)
    tiles = tiles or choose_filling("covariance", programs, N, N, x.dtype, x.device, aligned([x]))
    grid, options = (_half(N, tiles),), Options(precision(x.dtype))
    launch(covariance_kernel, grid, matrix(x), out, weight, M, scale, TILE=tiles, OPTIONS=options)


def covariance(x: Tensor, tiles: TileConfig | None = None) -> Tensor:
    """``x^T x / M``, symmetric, by the tiles on and below the diagonal: x [M, N] -> fp32 [N, N] (zeros for M = 0)."""
    x = unit_last(x)
    M, N = x.shape
    out = torch.zeros(N, N, dtype=torch.float32, device=x.device) if M == 0 else x.new_empty(N, N, dtype=torch.float32)
    if x.numel():
        _symmetric(x, out, None, 1.0 / M, tiles)
    return out


def add_gram_(total: Tensor, x: Tensor, weight: Tensor, tiles: TileConfig | None = None) -> None:
    """``total += weight x^T x`` on and above the diagonal; below it, within a tile's width, total is undefined.

    total fp32 [N, N], contiguous, x [M, N], weight an fp32 scalar on their device; 0 adds nothing, whatever x holds.
    """
    if x.numel():
        _symmetric(unit_last(x), total, weight, 1.0, tiles)
