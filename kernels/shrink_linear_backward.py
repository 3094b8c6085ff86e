"""dx and dh in one kernel: dh = s dy B is summed beside a tile of dx, and dh A joins it after each projection."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import (
    Factors,
    Matrix,
    Options,
    Runs,
    aligned,
    block_rank,
    hide_from_specialization,
    launch,
    matrices,
    matrix,
    multiples_of_8,
    precision,
    rank_columns,
    rank_matrix,
    reveal,
    spread,
    swizzle,
    tile_rows,
    unit_last,
)
from .shrink_linear import WIDEST
from .tiling import TileConfig, choose_strategy, choose_tiles


@triton.jit
def shrink_matmul_loop(
    b_acc, p_dy, p_w, stride_w, p_b, stride_b, m_m, m_n, m_rank, N, runs, i_dy,
    RANKS: tl.constexpr, TILE: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """(acc + dy W, dy B) over N: p_dy [BM, 1], p_w [1, BN] and p_b [1, RANKS] at row 0 of W and B."""
    BLOCK_M: tl.constexpr = TILE.rows
    BLOCK_K: tl.constexpr = TILE.depth
    b_dh = tl.zeros((BLOCK_M, RANKS), tl.float32)
    for n in tl.range(0, N, BLOCK_K):
        o_n = n + tl.arange(0, BLOCK_K)
        o_dy, o_row = spread(o_n, runs, i_dy), o_n[:, None].to(tl.int64)
        m_dy, m_w, m_b = m_m, m_n, m_rank
        if not OPTIONS.even_k:
            m_dy, m_w, m_b = m_m & (o_n < N)[None, :], m_n & (o_n < N)[:, None], m_rank & (o_n < N)[:, None]
        b_dy = tl.load(p_dy + o_dy[None, :], mask=m_dy, other=0.0)
        b_w = tl.load(p_w + o_dy[:, None].to(tl.int64) * stride_w, mask=m_w, other=0.0)
        b_b = tl.load(p_b + o_row * stride_b, mask=m_b, other=0.0).to(b_dy.dtype)
        b_acc = tl.dot(b_dy, b_w, b_acc, input_precision=OPTIONS.precision)
        b_dh = tl.dot(b_dy, b_b, b_dh, input_precision=OPTIONS.precision)
    return b_acc, b_dh


@triton.jit(do_not_specialize=["M", "tiles_m"])
def shrink_linear_backward_kernel(
    dx, dh, A, B, dy, W, M, tiles_m, RANKS: tl.constexpr, TILE: tl.constexpr, OPTIONS: tl.constexpr
):
    """One tile of dx [M, K], the sum over the projections; the first tile of a row of them stores dh."""
    BLOCK_M: tl.constexpr = TILE.rows
    BLOCK_N: tl.constexpr = TILE.columns
    EVEN: tl.constexpr = OPTIONS.even_r
    i_m, i_n = swizzle(tl.program_id(0), tiles_m, tl.cdiv(dx.columns, BLOCK_N), TILE.band)
    rows, o_n = tile_rows(None, None, i_m, M, BLOCK_M, False), i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n, o_rank = rows.exist[:, None], (o_n < dx.columns)[None, :], tl.arange(0, RANKS)
    o_row = rows.numbers.to(tl.int64)[:, None]
    b_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in tl.static_range(len(dy.data)):
        offset, m_rank = reveal(B.columns.offsets[i], EVEN), o_rank < reveal(B.columns.ranks[i], EVEN)
        stride_b, p_b = reveal(B.strides[i], EVEN), B.data[i] + o_rank[None, :]
        p_dy, p_w = dy.data[i] + o_row * dy.stride[i], W.data[i] + o_n[None, :]
        b_acc, b_dh = shrink_matmul_loop(
            b_acc, p_dy, p_w, W.stride[i], p_b, stride_b, m_m, m_n, m_rank[None, :], dy.columns[i], B.runs, i,
            RANKS, TILE, OPTIONS,
        )  # fmt: skip
        b_low = (b_dh * B.scales[i]).to(dh.data.dtype.element_ty)
        p_a = A.data[i] + o_rank.to(tl.int64)[:, None] * A.strides[i] + o_n[None, :]
        b_a = tl.load(p_a, mask=m_rank[:, None] & m_n, other=0.0).to(b_low.dtype)
        b_acc = tl.dot(b_low, b_a, b_acc, input_precision=OPTIONS.precision)
        if i_n == 0:
            p_dh = dh.data + o_row * reveal(dh.stride, EVEN) + (offset + o_rank)[None, :]
            tl.store(p_dh, b_low, mask=m_m & m_rank[None, :])
    tl.store(dx.data + o_row * dx.stride + o_n[None, :], b_acc.to(dx.data.dtype.element_ty), mask=m_m & m_n)


def shrink_linear_backward(
    dy: Sequence[Tensor | None],
    W: Sequence[Tensor],
    B: Sequence[Tensor],
    A: Sequence[Tensor],
    places: Sequence[tuple[int, int]],
    offsets: Sequence[int],
    scales: Sequence[float],
    strategy: str | None = None,
    tiles: TileConfig | None = None,
    runs: Runs | None = None,
) -> tuple[Tensor, Tensor] | None:
    """``dx = sum_i dy_i W_i + dh_i A_i`` with ``dh_i = s_i dy_i B_i``: (dx [M, K], dh [M, R]); None where they are two.

    dy_i [M, N_i] (None: no gradient came), B_i [N_i, r_i] and A_i [r_i, K] of every projection; W_i are the N_i rows
    of W at its place (weight, first row), so that the projections cover the weights. ``strategy``: "fused" or
    "separate", default by the table; two kernels it is for more than 32 ranks and rows that are not aligned.
    ``runs``: of projections that interleave, whose dy have a column stride of 1.
    """
    live, ranks = [i for i, g in enumerate(dy) if g is not None], [b.shape[1] for b in B]
    wide = [unit_last(dy[i]) for i in live]
    used = {places[i][0]: W[places[i][0]] for i in live}
    (M, K), N, device = (wide[0].shape[0], W[0].shape[1]), sum(g.shape[1] for g in wide), wide[0].device
    strategy = strategy or choose_strategy("shrink_linear_backward", M, N, K, max(ranks), wide[0].dtype, device)
    if strategy == "separate" or M == 0 or max(ranks) > WIDEST or not aligned([*wide, *used.values()]):
        return None
    used = {j: unit_last(w) for j, w in used.items()}
    weights = [used[places[i][0]].narrow(0, places[i][1], dy[i].shape[1]) for i in live]
    tiles = tiles or choose_tiles("shrink_linear_backward", M, N, K, sum(ranks), wide[0].dtype, device)
    dx = torch.empty(M, K, dtype=wide[0].dtype, device=device)
    make = torch.empty if len(live) == len(dy) else torch.zeros
    dh = make(M, sum(ranks), dtype=dx.dtype, device=device)
    A, B, ranks = [unit_last(A[i]) for i in live], [unit_last(B[i]) for i in live], [ranks[i] for i in live]
    columns, strides = rank_columns([offsets[i] for i in live], ranks), [b.stride(0) for b in B]
    tiles_m = triton.cdiv(M, tiles.rows)
    options = Options(
        precision(dx.dtype),
        even_k=all(g.shape[1] % tiles.depth == 0 for g in wide),
        even_r=multiples_of_8(ranks, offsets, strides, [dh.shape[1]]),
    )
    operands = (
        matrix(dx),
        rank_matrix(dh),
        Factors(tuple(A), tuple(a.stride(0) for a in A), columns),
        Factors(
            tuple(B),
            hide_from_specialization(strides),
            columns,
            tuple(float(scales[i]) for i in live),
            runs and runs.of(live),
        ),
        matrices(wide),
        Matrix(tuple(weights), tuple(w.stride(0) for w in weights), None),
    )
    ranks = block_rank(max(ranks))
    # So that two programs share a multiprocessor; the compiler takes more without a bound, and odd ranks need more.
    bound = {"maxnreg": 128} if ranks == 16 and tiles.warps == 8 and options.even_r else {}
    grid = (tiles_m * triton.cdiv(K, tiles.columns),)
    launch(
        shrink_linear_backward_kernel, grid, *operands, M, tiles_m, RANKS=ranks, TILE=tiles, OPTIONS=options, **bound
    )
    return dx, dh
