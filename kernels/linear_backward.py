"""The backward of ``linear``: dx = sum dy W + dh A, in one accumulator or added to the library's matmul."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import (
    aligned,
    clear,
    dropout_of,
    even,
    keep_mask,
    launch,
    masked_ranks,
    matmul_loop,
    matmul_options,
    opaque,
    own_rows,
    stacked_rows,
    swizzle,
    table_row,
    unit_last,
)
from .tiling import TileConfig, choose_strategy, choose_tiles


@triton.jit(do_not_specialize=["M", "tiles_m", "threshold"])
def linear_backward_kernel(
    p_dy, p_w, p_dh, p_a, p_dx, p_seed, widths, strides_dy, strides_w, strides_a, offsets, ends, segments,
    M, K, stride_dh, stride_dx, tiles_m, threshold, keep_scale,
    EVEN_R: tl.constexpr, SOURCES: tl.constexpr, MASKED: tl.constexpr, ALIGNED: tl.constexpr, EVEN_N: tl.constexpr,
    GATHER: tl.constexpr, BAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of dx [M, K]: dh A (masked per projection), then the sum over SOURCES; without, dx is updated.

    With ``segments`` a tile is rows of one adapter, and its rows of the packed ``p_a[0]`` stand in a table.
    """
    i_m, i_n = swizzle(tl.program_id(0), tiles_m, tl.cdiv(K, BLOCK_N), BAND)
    o_m, o_n = i_m * BLOCK_M + tl.arange(0, BLOCK_M), i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, o_skip, adapter = o_m < M, 0, 0
    first, end = clear(offsets[0], EVEN_R), clear(ends[len(ends) - 1], EVEN_R)
    if segments is not None:
        adapter = tl.load(segments[0] + 2 * i_m).to(tl.int64)
        if adapter < 0:
            return
        o_m, m_m = own_rows(segments, i_m, GATHER, BLOCK_M)
        o_skip, end, first = table_row(segments[3], adapter, 3, EVEN_R)
    if MASKED > 0:
        seed, o_key, least, kept = dropout_of(segments, p_seed, adapter, o_m, m_m, threshold, keep_scale)
    m_m, m_n = m_m[:, None], (o_n < K)[None, :]
    o_row = o_m.to(tl.int64)[:, None]
    b_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in tl.static_range(MASKED if MASKED > 0 else 1):
        if MASKED > 0:
            first, end = masked_ranks(segments, adapter, i, MASKED, offsets, ends, EVEN_R)
        b_part = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for r in tl.range(first, end, BLOCK_R, num_stages=1):
            o_rank = r + tl.arange(0, BLOCK_R)
            m_rank = o_rank < end
            b_dh = tl.load(
                p_dh + o_row * clear(stride_dh[0], EVEN_R) + o_rank[None, :], mask=m_m & m_rank[None, :], other=0.0
            )
            if segments is not None:
                p_rows = p_a[0] + (o_skip + o_rank) * strides_a[0]
            else:
                p_rows = stacked_rows(p_a, offsets, strides_a, o_rank, ALIGNED)
            b_a = tl.load(p_rows[:, None] + o_n[None, :], mask=m_n & m_rank[:, None], other=0.0).to(b_dh.dtype)
            b_part = tl.dot(b_dh, b_a, b_part, input_precision=PRECISION)
        if MASKED > 0:
            m_keep = keep_mask(seed, i, o_key, i_n * BLOCK_N, least, BLOCK_N)
            b_part = tl.where(m_keep, b_part * kept, 0.0)
        b_acc += b_part
    p_tile = p_dx + o_row * stride_dx + o_n[None, :]
    if SOURCES > 0:
        for j in tl.static_range(SOURCES):
            b_acc = matmul_loop(b_acc, p_dy[j] + o_row * strides_dy[j], p_w[j] + o_n[None, :], strides_w[j], m_m, m_n,
                                widths[j], EVEN_N, BLOCK_K, PRECISION)  # fmt: skip
    else:
        b_acc += tl.load(p_tile, mask=m_m & m_n, other=0.0).to(tl.float32)
    tl.store(p_tile, b_acc.to(p_dx.dtype.element_ty), mask=m_m & m_n)


def linear_backward(
    dy: Sequence[Tensor],
    W: Sequence[Tensor],
    dh: Tensor,
    A: Sequence[Tensor],
    offsets: Sequence[int],
    seed: Tensor | None = None,
    threshold: int = 0,
    keep_scale: float = 1.0,
    strategy: str | None = None,
    tiles: TileConfig | None = None,
) -> Tensor:
    """``dx = sum_j dy_j W_j + sum_i mask_i o (dh_i A_i)``: dy_j [M, N_j], W_j [N_j, K], A_i [r_i, K] -> dx [M, K].

    The masks are dropout's with their ``keep_scale`` when a seed is given, 1 otherwise. A_i of one dtype.
    """
    dy, W, A = [unit_last(t) for t in dy], [unit_last(t) for t in W], [unit_last(t) for t in A]
    M, K = dy[0].shape[0], W[0].shape[1]
    if M == 0:
        return dy[0].new_empty(M, K)
    N = sum(w.shape[0] for w in W)
    strategy = strategy or choose_strategy("backward", M, N, K, dh.shape[1], dh.dtype)
    if strategy == "augmented" and seed is None and dh.shape[1] > 0:
        return torch.cat([*dy, dh], dim=1) @ torch.cat([*W, torch.cat(list(A)).to(dh.dtype)])
    if strategy == "fused":
        dx = torch.empty(M, K, dtype=dy[0].dtype, device=dy[0].device)
    else:
        dx = torch.mm(dy[0], W[0])
        for grad, w in zip(dy[1:], W[1:], strict=True):
            dx.addmm_(grad, w)
    if strategy == "fused" or dh.shape[1] > 0:
        sources = (dy, W) if strategy == "fused" else ((), ())
        add_adapters_(dx, dh, A, offsets, *sources, seed, threshold, keep_scale, tiles)
    return dx


def add_adapters_(dx, dh, A, offsets, dy=(), W=(), seed=None, threshold=0, keep_scale=1.0, tiles=None, segments=None):
    """Add the adapters' part to dx in place, or fill dx when ``dy`` is given.

    With ``segments`` every row gets its own adapter's part, and A is the packed [rows, K] of all.
    """
    M, K = dx.shape
    widths = tuple(t.shape[1] for t in dy)
    masked = 0 if seed is None else len(A) if segments is None else segments.masked
    verb = ("linear_backward" if dy else "expand") + ("_dropout" if masked else "")
    tiles = tiles or choose_tiles(verb, M, sum(widths), K, dh.shape[1], dx.dtype)
    tiles_m = triton.cdiv(M, tiles.rows) if segments is None else segments.tiles.shape[0]
    ends = [o + a.shape[0] for o, a in zip(offsets, A, strict=True)]
    own = even(offsets, ends) if segments is None else segments.even
    launch(
        linear_backward_kernel, (tiles_m * triton.cdiv(K, tiles.columns),),
        tuple(dy) or (dx,), tuple(W) or (dx,), dh, tuple(A), dx, dh if seed is None else seed, widths or (0,),
        tuple(t.stride(0) for t in dy) or (0,), tuple(w.stride(0) for w in W) or (0,), tuple(a.stride(0) for a in A),
        opaque(offsets), opaque(ends), None if segments is None else segments.tensors,
        M, K, opaque([dh.stride(0)]), dx.stride(0), tiles_m, threshold, keep_scale,
        EVEN_R=own and dh.stride(0) % 8 == 0, SOURCES=len(dy), MASKED=masked,
        ALIGNED=aligned(A), EVEN_N=all(width % tiles.depth == 0 for width in widths),
        GATHER=segments is not None and segments.gather, **matmul_options(tiles, dx.dtype),
    )  # fmt: skip
