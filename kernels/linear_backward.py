"""The backward of ``linear``: dx = sum dy W + dh A, in one accumulator or added to the library's matmul."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import (
    Factors,
    Matrix,
    Options,
    aligned,
    hidden_sum,
    keep_mask,
    launch,
    masked_ranks,
    matmul_loop,
    matrices,
    matrix,
    multiples_of_8,
    precision,
    rank_columns,
    rank_matrix,
    reveal,
    row_keys,
    seed_dropout,
    stacked_rows,
    swizzle,
    table_row,
    tile_rows,
    unit_last,
)
from .tiling import TileConfig, choose_strategy, choose_tiles


class Sources(NamedTuple):
    """The products of the frozen weights that dx sums: dy_j [M, N_j] and W_j [N_j, K]."""

    dy: Matrix
    W: Matrix


@triton.jit(do_not_specialize=["M", "tiles_m"])
def linear_backward_kernel(
    dx, dh, A, sources, dropout, segments, M, tiles_m, TILE: tl.constexpr, OPTIONS: tl.constexpr
):
    """One tile of dx [M, K]: dh A (masked per projection), then the sum over ``sources``; without, dx is updated.

    With ``segments`` a tile is rows of one adapter, and its rows of the packed A stand in a table. With TILE.tma the
    sources come through descriptors, made by every program.
    """
    BLOCK_M: tl.constexpr = TILE.rows
    BLOCK_N: tl.constexpr = TILE.columns
    BLOCK_K: tl.constexpr = TILE.depth
    BLOCK_R: tl.constexpr = 16  # a tensor core's
    LAST: tl.constexpr = len(A.columns.ranks) - 1
    PARTS: tl.constexpr = 1 if dropout is None else OPTIONS.masked
    i_m, i_n = swizzle(tl.program_id(0), tiles_m, tl.cdiv(dx.columns, BLOCK_N), TILE.band)
    adapter = None
    if segments is not None:
        adapter = tl.load(segments.tiles + 2 * i_m).to(tl.int64)
        if adapter < 0:
            return
    rows, o_n = tile_rows(segments, adapter, i_m, M, BLOCK_M, OPTIONS.gather), i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if segments is not None:
        o_skip, end, first = table_row(segments.table, adapter, 3, OPTIONS.even_r)
    else:
        first = reveal(A.columns.offsets[0], OPTIONS.even_r)
        end = reveal(hidden_sum(A.columns.offsets[LAST], A.columns.ranks[LAST]), OPTIONS.even_r)
    m_m, m_n = rows.exist[:, None], (o_n < dx.columns)[None, :]
    o_row = rows.numbers.to(tl.int64)[:, None]
    p_dh = dh.data + o_row * reveal(dh.stride, OPTIONS.even_r)
    b_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in tl.static_range(PARTS):
        if dropout is not None:
            first, end = masked_ranks(dropout, A.columns, adapter, i, OPTIONS)
        b_part = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for r in tl.range(first, end, BLOCK_R, num_stages=1):
            o_rank = r + tl.arange(0, BLOCK_R)
            m_rank = o_rank < end
            b_dh = tl.load(p_dh + o_rank[None, :], mask=m_m & m_rank[None, :], other=0.0)
            if segments is not None:
                p_rows = A.data[0] + (o_skip + o_rank) * A.strides[0]
            else:
                p_rows = stacked_rows(A, o_rank, OPTIONS.aligned)
            b_a = tl.load(p_rows[:, None] + o_n[None, :], mask=m_n & m_rank[:, None], other=0.0).to(b_dh.dtype)
            b_part = tl.dot(b_dh, b_a, b_part, input_precision=OPTIONS.precision)
        if dropout is not None:
            keys = row_keys(dropout, adapter, rows)
            m_keep = keep_mask(keys.seed, OPTIONS.streams[i], keys.counters, i_n * BLOCK_N, keys.threshold, BLOCK_N)
            b_part = tl.where(m_keep, b_part * keys.scale, 0.0)
        b_acc += b_part
    p_tile = dx.data + o_row * dx.stride + o_n[None, :]
    if sources is None:
        b_acc += tl.load(p_tile, mask=m_m & m_n, other=0.0).to(tl.float32)
    else:
        dy, W = sources.dy, sources.W
        for j in tl.static_range(len(dy.data)):
            if TILE.tma:
                N, K = dy.columns[j], dx.columns
                desc_dy = tl.make_tensor_descriptor(dy.data[j], [M, N], [dy.stride[j], 1], [BLOCK_M, BLOCK_K])
                desc_w = tl.make_tensor_descriptor(W.data[j], [N, K], [W.stride[j], 1], [BLOCK_K, BLOCK_N])
                for n in tl.range(0, N, BLOCK_K):
                    b_dy, b_w = desc_dy.load([i_m * BLOCK_M, n]), desc_w.load([n, i_n * BLOCK_N])
                    b_acc = tl.dot(b_dy, b_w, b_acc, input_precision=OPTIONS.precision)
            else:
                p_dy, p_w = dy.data[j] + o_row * dy.stride[j], W.data[j] + o_n[None, :]
                b_acc = matmul_loop(b_acc, p_dy, p_w, W.stride[j], m_m, m_n, dy.columns[j], TILE, OPTIONS)
    tl.store(p_tile, b_acc.to(dx.data.dtype.element_ty), mask=m_m & m_n)


def linear_backward(
    dy: Sequence[Tensor],
    W: Sequence[Tensor],
    dh: Tensor,
    A: Sequence[Tensor],
    offsets: Sequence[int],
    seed: Tensor | None = None,
    threshold: int = 0,
    keep_scale: float = 1.0,
    streams: Sequence[int] = (),
    strategy: str | None = None,
    tiles: TileConfig | None = None,
) -> Tensor:
    """``dx = sum_j dy_j W_j + sum_i mask_i o (dh_i A_i)``: dy_j [M, N_j], W_j [N_j, K], A_i [r_i, K] -> dx [M, K].

    The masks are dropout's, of ``streams`` (0, 1, ... without), with their ``keep_scale`` when a seed is given, 1
    otherwise. A_i of one dtype.
    """
    dy, A = [unit_last(t) for t in dy], [unit_last(t) for t in A]
    M, K = dy[0].shape[0], W[0].shape[1]
    if M == 0:
        return dy[0].new_empty(M, K)
    N = sum(w.shape[0] for w in W)
    if strategy is None:
        strategy = choose_strategy("backward", M, N, K, dh.shape[1], dh.dtype, dh.device, len(W))
        # As in ``linear``.
        strategy = "library" if strategy == "fused" and not aligned([*dy, *W]) else strategy
    if strategy == "fused" and seed is None:
        tiles = tiles or choose_tiles("linear_backward", M, N, K, dh.shape[1], dh.dtype, dh.device)
        # As in ``linear``.
        if tiles.tma and not aligned([*dy, *W]):
            strategy, tiles = "library", None
    if strategy == "augmented" and seed is None and dh.shape[1] > 0:
        # Zeros behind the ranks, so that rows stay aligned.
        padding = -(N + dh.shape[1]) % 8
        both = torch.cat([*dy, dh, dh.new_zeros(M, padding)], dim=1)
        return both @ torch.cat([*W, torch.cat(list(A)).to(dh.dtype), dh.new_zeros(padding, K)])
    if strategy == "fused":
        W = [unit_last(w) for w in W]
        dx = torch.empty(M, K, dtype=dy[0].dtype, device=dy[0].device)
    else:
        dx = torch.mm(dy[0], W[0])
        for grad, w in zip(dy[1:], W[1:], strict=True):
            dx.addmm_(grad, w)
    if strategy == "fused" or dh.shape[1] > 0:
        sources = Sources(matrices(dy), matrices(W)) if strategy == "fused" else None
        dropout, own = seed_dropout(seed, threshold, keep_scale), streams or range(len(A))
        add_adapters_(dx, dh, A, offsets, sources, dropout, () if seed is None else own, tiles)
    return dx


def add_adapters_(
    dx, dh, A, offsets, sources=None, dropout=None, streams=(), tiles=None, segments=None, even=False
) -> None:
    """Add the adapters' part to dx in place, or fill dx when ``sources`` are given.

    streams: one for each projection with a mask under ``dropout``. With ``segments`` every row gets its own adapter's
    part, A is the packed [rows, K] of all, and ``even`` says whether all ranks are multiples of 8.
    """
    M, K = dx.shape
    widths = sources.dy.columns if sources else ()
    operation = ("linear_backward" if sources else "expand") + ("_dropout" if dropout else "")
    tiles = tiles or choose_tiles(operation, M, sum(widths), K, dh.shape[1], dx.dtype, dx.device)
    tiles = tiles._replace(tma=sources is not None and tiles.tma)
    tiles_m = triton.cdiv(M, tiles.rows) if segments is None else segments.tiles.shape[0]
    ranks = [a.shape[0] for a in A]
    if segments is None:
        even = multiples_of_8(offsets, ranks)
    options = Options(
        precision(dx.dtype),
        even_k=all(width % tiles.depth == 0 for width in widths),
        even_r=even and dh.stride(0) % 8 == 0,
        aligned=aligned(A),
        masked=len(streams),
        streams=tuple(streams),
        gather=segments is not None and segments.order.numel() > 0,
    )
    factors = Factors(tuple(A), tuple(a.stride(0) for a in A), rank_columns(offsets, ranks))
    operands = matrix(dx), rank_matrix(dh), factors, sources, dropout, segments
    grid = (tiles_m * triton.cdiv(K, tiles.columns),)
    launch(linear_backward_kernel, grid, *operands, M, tiles_m, TILE=tiles, OPTIONS=options)
