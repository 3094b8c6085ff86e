"""Shrink and linear in one kernel: h = x [A; P]^T is summed beside a tile of y and expanded into it at the end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .linear import Projection, as_group, cut, linear, projection_part
from .primitives import (
    Factors,
    Options,
    Runs,
    aligned,
    block_rank,
    find_tile,
    launch,
    matrix,
    multiples_of_8,
    precision,
    rank_columns,
    rank_matrix,
    reveal,
    select,
    spread,
    swizzle,
    tile_rows,
    unit_last,
)
from .shrink import shrink
from .tiling import TileConfig, choose_strategy, choose_tiles

# Ranks and probes of a projection that fit beside its tile.
WIDEST = 32


@triton.jit
def shrink_matmul_loop(
    b_acc, p_x, p_w, p_f, m_m, m_n, m_f, K, RANKS: tl.constexpr, TILE: tl.constexpr, OPTIONS: tl.constexpr
):
    """(acc + x W^T, x f^T) over K: p_x [BM, 1], p_w [1, BN] and p_f [1, RANKS] at column 0."""
    BLOCK_M: tl.constexpr = TILE.rows
    BLOCK_K: tl.constexpr = TILE.depth
    b_h = tl.zeros((BLOCK_M, RANKS), tl.float32)
    for k in tl.range(0, K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        m_x, m_w, m_a = m_m, m_n, m_f
        if not OPTIONS.even_k:
            m_x, m_w, m_a = m_m & (o_k < K)[None, :], m_n & (o_k < K)[:, None], m_f & (o_k < K)[:, None]
        b_x = tl.load(p_x + o_k[None, :], mask=m_x, other=0.0)
        b_w = tl.load(p_w + o_k[:, None], mask=m_w, other=0.0)
        b_f = tl.load(p_f + o_k[:, None], mask=m_a, other=0.0).to(b_x.dtype)
        b_acc = tl.dot(b_x, b_w, b_acc, input_precision=OPTIONS.precision)
        b_h = tl.dot(b_x, b_f, b_h, input_precision=OPTIONS.precision)
    return b_acc, b_h


@triton.jit(do_not_specialize=["M", "tiles_m", "tiles_n"])
def shrink_linear_kernel(
    group, x, factors, h, M, tiles_m, tiles_n, RANKS: tl.constexpr, TILE: tl.constexpr, OPTIONS: tl.constexpr
):
    """One tile of one projection's y; its first tile stores h, that of the first projection the probes.

    ``factors``: A of every projection and, where h has probes, P.
    """
    BLOCK_M: tl.constexpr = TILE.rows
    BLOCK_N: tl.constexpr = TILE.columns
    PROBES: tl.constexpr = len(factors.data) > len(group.y.data)
    EVEN: tl.constexpr = OPTIONS.even_r
    i_m, i_n = swizzle(tl.program_id(0), tiles_m, tiles_n, TILE.band)
    i, o_first, _ = find_tile(i_n, group.y.columns, TILE.columns)
    part = projection_part(group, i, None, None, EVEN)
    rows, o_n, o_rank = (
        tile_rows(None, None, i_m, M, TILE.rows, False),
        o_first + tl.arange(0, TILE.columns),
        tl.arange(0, RANKS),
    )
    o_y = spread(o_n, group.B.runs, i)
    m_m, m_n, m_rank = rows.exist[:, None], (o_n < part.y.columns)[None, :], o_rank < part.rank
    o_row = rows.numbers.to(tl.int64)[:, None]
    p_f = select(factors.data, i) + o_rank.to(tl.int64) * select(factors.strides, i)
    o_h, m_f, m_store = part.offset + o_rank, m_rank, m_rank
    if PROBES:
        LAST: tl.constexpr = len(factors.data) - 1
        o_probe, m_f = o_rank - part.rank, o_rank < part.rank + reveal(factors.columns.ranks[LAST], EVEN)
        p_f = tl.where(m_rank, p_f, factors.data[LAST] + o_probe.to(tl.int64) * factors.strides[LAST])
        o_h = tl.where(m_rank, o_h, reveal(factors.columns.offsets[LAST], EVEN) + o_probe)
        m_store = m_rank | (m_f & (i == 0))
    if OPTIONS.aligned:
        p_f = tl.multiple_of(p_f, 16)
    b_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if group.bias is not None:
        b_acc += tl.load(select(group.bias, i) + o_y[None, :], mask=m_n, other=0.0).to(tl.float32)
    p_x, p_w = x.data + o_row * x.stride, part.W.data + o_y.to(tl.int64)[None, :] * part.W.stride
    b_acc, b_h = shrink_matmul_loop(
        b_acc, p_x, p_w, p_f[None, :], m_m, m_n, m_f[None, :], x.columns, RANKS, TILE, OPTIONS
    )
    b_low = b_h.to(h.data.dtype.element_ty)
    p_b = part.B + o_n.to(tl.int64)[None, :] * part.stride_B + o_rank[:, None]
    b_b = (tl.load(p_b, mask=m_n & m_rank[:, None], other=0.0).to(tl.float32) * part.scale).to(b_low.dtype)
    b_acc = tl.dot(b_low, b_b, b_acc, input_precision=OPTIONS.precision)
    tl.store(part.y.data + o_row * part.y.stride + o_y[None, :], b_acc.to(part.y.data.dtype.element_ty), mask=m_m & m_n)
    if o_first == 0:
        tl.store(h.data + o_row * reveal(h.stride, EVEN) + o_h[None, :], b_low, mask=m_m & m_store[None, :])


def run(
    x: Tensor,
    factors: Sequence[Tensor],
    h: Tensor,
    projections: Sequence[Projection],
    tiles: TileConfig | None,
    runs: Runs | None = None,
) -> None:
    """Fill h [M, R + probes] and every projection's y; ``factors``: A of each and P, if h has probes."""
    M, K = x.shape
    ranks, N = [f.shape[0] for f in factors], sum(p.W.shape[0] for p in projections)
    probes = h.shape[1] - sum(p.B.shape[1] for p in projections)
    tiles = tiles or choose_tiles("shrink_linear", M, N, K, h.shape[1], x.dtype, x.device)
    tiles_m, tiles_n = triton.cdiv(M, tiles.rows), sum(triton.cdiv(p.W.shape[0], tiles.columns) for p in projections)
    starts = [*[p.offset for p in projections], h.shape[1] - probes][: len(factors)]
    options = Options(
        precision(x.dtype),
        even_k=K % tiles.depth == 0,
        even_r=multiples_of_8(ranks, starts, [h.shape[1]], [p.B.stride(0) for p in projections]),
        aligned=aligned(factors),
    )
    columns = rank_columns(starts, ranks)
    operands = (
        as_group(projections, runs=runs),
        matrix(x),
        Factors(tuple(factors), tuple(f.stride(0) for f in factors), columns),
        rank_matrix(h),
    )
    widest = block_rank(max(p.B.shape[1] for p in projections) + probes)
    # So that two programs share a multiprocessor; without a bound the compiler takes more.
    bound = {"maxnreg": 128} if widest == 16 and tiles.warps == 8 and tiles.columns <= 128 else {}
    launch(
        shrink_linear_kernel, (tiles_m * tiles_n,), *operands, M, tiles_m, tiles_n,
        RANKS=widest, TILE=tiles, OPTIONS=options, **bound,
    )  # fmt: skip


def shrink_linear(
    x: Tensor,
    W: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    A: Sequence[Tensor],
    P: Tensor | None,
    B: Sequence[Tensor],
    places: Sequence[tuple[int, int]],
    offsets: Sequence[int],
    scales: Sequence[float],
    moments: bool = False,
    seed: Tensor | None = None,
    threshold: int = 0,
    keep_scale: float = 1.0,
    streams: Sequence[int] = (),
    strategy: str | None = None,
    tiles: TileConfig | None = None,
    runs: Runs | None = None,
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """(y, h, moments) as ``shrink`` of A and of the probes P [k, K] and ``linear`` have them.

    ``strategy``: "fused", one kernel with ``tiles``, or "separate"; default by the table. One kernel neither drops nor
    sums moments, and takes rows that are aligned and at most 32 ranks and probes of a projection: else it is two.
    ``runs``: of projections that interleave.
    """
    factors, probes = ([*A], 0) if P is None else ([*A, P], P.shape[0])
    (M, K), N, rank = x.shape, sum(w.shape[0] for w in W), sum(a.shape[0] for a in A)
    x, widest = unit_last(x), max(a.shape[0] for a in A) + probes
    strategy = strategy or choose_strategy("shrink_linear", M, N, K, widest, x.dtype, x.device)
    if strategy == "separate" or moments or seed is not None or M == 0 or widest > WIDEST or not aligned([x, *W]):
        h = shrink(x, factors, probes, seed, threshold, keep_scale, streams)
        y, sums = linear(x, W, bias, h, B, places, offsets, scales, moments, runs=runs)
        return y, h, sums
    h = torch.empty(M, rank + probes, dtype=x.dtype, device=x.device)
    y = [torch.empty(M, w.shape[0], dtype=x.dtype, device=x.device) for w in W]
    W, bias = [unit_last(w) for w in W], [None if b is None else unit_last(b) for b in bias]
    projections = cut(W, bias, [unit_last(b) for b in B], y, [], places, offsets, scales)
    run(x, [unit_last(f) for f in factors], h, projections, tiles, runs)
    return y, h, []
