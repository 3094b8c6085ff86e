"""Gradstat: sums over the entries of dy^T x per run of rows, reduced in registers; covariances on half the tiles."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import compiled, launch, swizzle, unit_last
from .reduce import reduce_pairs
from .tiling import GRID_LIMIT, TileConfig, choose_tiles


@triton.jit
def run_product(
    p_x, p_dy, p_offsets, i_run, o_n, o_k, N, K, stride_x, stride_dy,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of ``dy^T x`` over the rows of one run."""
    first, last = tl.load(p_offsets + i_run), tl.load(p_offsets + i_run + 1)
    m_n, m_k = (o_n < N)[None, :], (o_k < K)[None, :]
    p_rows_x, p_rows_dy = p_x + first * stride_x + o_k[None, :], p_dy + first * stride_dy + o_n[None, :]
    count = (last - first).to(tl.int32)
    b_acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for m in tl.range(0, count, BLOCK_M):
        o_m = (m + tl.arange(0, BLOCK_M))[:, None]
        b_dy = tl.load(p_rows_dy + o_m.to(tl.int64) * stride_dy, mask=(o_m < count) & m_n, other=0.0)
        b_x = tl.load(p_rows_x + o_m.to(tl.int64) * stride_x, mask=(o_m < count) & m_k, other=0.0)
        b_acc = tl.dot(tl.trans(b_dy), b_x, b_acc, input_precision=PRECISION)
    return b_acc


@triton.jit(do_not_specialize=["runs"])
def gradstat_kernel(
    p_x, p_dy, p_offsets, p_partial, p_diagonal, N, K, stride_x, stride_dy, runs, DIAGONAL: tl.constexpr,
    BAND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum of squares and of absolute values of one tile of one run's ``dy^T x``.

    DIAGONAL: of all runs' one after the other, whose squares are added to this tile of p_diagonal [N, K].
    """
    i_n, i_k = swizzle(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K), BAND)
    o_n, o_k = i_n * BLOCK_N + tl.arange(0, BLOCK_N), i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    p_out = p_partial + (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * 2
    if DIAGONAL:
        b_squares = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for i_run in tl.range(0, runs, num_stages=1):
            b_acc = run_product(
                p_x, p_dy, p_offsets, i_run, o_n, o_k, N, K, stride_x, stride_dy, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
            )
            b_squares += b_acc * b_acc
            tl.store(p_out, tl.sum(b_acc * b_acc))
            tl.store(p_out + 1, tl.sum(tl.abs(b_acc)))
            p_out += tl.num_programs(0) * 2
        p_tile = p_diagonal + o_n.to(tl.int64)[:, None] * K + o_k[None, :]
        m_tile = (o_n < N)[:, None] & (o_k < K)[None, :]
        tl.store(p_tile, b_squares + tl.load(p_tile, mask=m_tile, other=0.0), mask=m_tile)
    else:
        b_acc = run_product(
            p_x, p_dy, p_offsets, tl.program_id(1), o_n, o_k, N, K, stride_x, stride_dy,
            BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
        tl.store(p_out, tl.sum(b_acc * b_acc))
        tl.store(p_out + 1, tl.sum(tl.abs(b_acc)))


@triton.jit(do_not_specialize=["M"])
def covariance_kernel(
    p_x, p_out, p_weight, M, N, stride_x, scale, ADD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile on or below the diagonal of ``scale x^T x``, written to both of its places.

    ADD: weighed by p_weight, which leaves everything as it is when 0, and added at its place on or above the diagonal.
    """
    weight = scale
    if ADD:
        weight = tl.load(p_weight)
        if weight == 0.0:
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
        p_m = p_x + o_m.to(tl.int64) * stride_x
        b_left = tl.load(p_m + o_row[None, :], mask=(o_m < M) & m_row[None, :], other=0.0)
        b_right = tl.load(p_m + o_column[None, :], mask=(o_m < M) & m_column[None, :], other=0.0)
        b_acc = tl.dot(tl.trans(b_left), b_right, b_acc, input_precision=PRECISION)
    b_acc *= weight
    m_tile = m_row[:, None] & m_column[None, :]
    p_above = p_out + o_column.to(tl.int64)[None, :] * N + o_row[:, None]
    if ADD:
        tl.store(p_above, b_acc + tl.load(p_above, mask=m_tile, other=0.0), mask=m_tile)
    else:
        tl.store(p_out + o_row.to(tl.int64)[:, None] * N + o_column[None, :], b_acc, mask=m_tile)
        if i_row != i_column:
            tl.store(p_above, b_acc, mask=m_tile)


def gradstat(
    x: Tensor,
    dy: Tensor,
    offsets: Tensor,
    tiles: TileConfig | None = None,
    longest: int = 0,
    diagonal: Tensor | None = None,
) -> Tensor:
    """``sum G^2`` and ``sum |G|`` of ``G = dy^T x`` over the rows ``offsets[i] : offsets[i + 1]``; G is never stored.

    x [M, K], dy [M, N] of one dtype, offsets int64 [runs + 1] on their device -> fp32 [runs, 2]. ``longest``: rows of
    the longest run, a hint for the tiles. ``diagonal``: fp32 [N, K], contiguous, to which the sum of G^2 over the runs
    is added; it changes only once everything that can run out of memory has been allocated.
    """
    x, dy = unit_last(x), unit_last(dy)
    runs, N, K = offsets.shape[0] - 1, dy.shape[1], x.shape[1]
    if runs == 0 or N == 0 or K == 0:
        return torch.zeros(runs, 2, dtype=torch.float32, device=x.device)
    verb = "gradstat" if diagonal is None else "gradstat_diagonal"
    tiles = tiles or choose_tiles(verb, longest or x.shape[0] // runs, N, K, 0, x.dtype)
    count = triton.cdiv(N, tiles.rows) * triton.cdiv(K, tiles.columns)
    partial = torch.empty(runs, count, 2, dtype=torch.float32, device=x.device)
    out = torch.empty(runs, 2, dtype=torch.float32, device=x.device)
    # Without a diagonal a program takes one run.
    each = GRID_LIMIT if diagonal is None else runs
    for start in range(0, runs, each):
        some = min(each, runs - start)
        launch(
            gradstat_kernel,
            (count, some if diagonal is None else 1),
            x,
            dy,
            offsets[start:],
            partial[start:],
            partial if diagonal is None else diagonal,
            N,
            K,
            x.stride(0),
            dy.stride(0),
            some,
            DIAGONAL=diagonal is not None,
            BAND=tiles.band,
            BLOCK_M=tiles.depth,
            BLOCK_N=tiles.rows,
            BLOCK_K=tiles.columns,
            **compiled(tiles, x.dtype),
        )
    reduce_pairs(partial, out)
    return out


def _symmetric(x: Tensor, out: Tensor, weight: Tensor | None, scale: float, tiles: TileConfig | None) -> None:
    M, N = x.shape
    tiles = tiles or choose_tiles("covariance", M, N, N, 0, x.dtype)
    side = triton.cdiv(N, tiles.rows)
    launch(
        covariance_kernel,
        (side * (side + 1) // 2,),
        x,
        out,
        out if weight is None else weight,
        M,
        N,
        x.stride(0),
        scale,
        ADD=weight is not None,
        BLOCK_M=tiles.depth,
        BLOCK_N=tiles.rows,
        **compiled(tiles, x.dtype),
    )


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
