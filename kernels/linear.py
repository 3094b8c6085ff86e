"""Linear: y = x W^T + bias + s h B^T with the expand in the accumulator of the matmul, and dx = sum dy W + dh A."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import (
    aligned,
    clear,
    even,
    find_tile,
    keep_mask,
    launch,
    matmul_loop,
    opaque,
    pick,
    precision,
    stacked_rows,
    swizzle,
    unit_last,
)
from .tiling import TileConfig, choose_strategy, choose_tiles


class Projection(NamedTuple):
    """A block of output columns with its own adapter: views of the frozen weight, its bias, B and the output.

    W [N_i, K]; bias [N_i] or None; B [N_i, r_i]; y [M, N_i]; moments float64 [2, N_i] or None; offset: first column
    in h.
    """

    W: Tensor
    bias: Tensor | None
    B: Tensor
    y: Tensor
    moments: Tensor | None
    offset: int
    scale: float


@triton.jit(do_not_specialize=["M"])
def linear_kernel(
    p_x, p_w, p_bias, p_h, p_b, p_y, p_sums, widths, strides_w, strides_b, strides_y, offsets, ranks, scales,
    M, K, N, stride_x, stride_h, tiles_n,
    EVEN_R: tl.constexpr, MATMUL: tl.constexpr, BIAS: tl.constexpr, MOMENTS: tl.constexpr, EVEN_K: tl.constexpr,
    BAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of one projection's y. Without MATMUL y holds x W^T + bias already and is updated in place."""
    i_m, i_n = swizzle(tl.program_id(0), tl.cdiv(M, BLOCK_M), tiles_n, BAND)
    i_entry, o_first, o_entry = find_tile(i_n, widths, BLOCK_N)
    o_m, o_n = i_m * BLOCK_M + tl.arange(0, BLOCK_M), o_first + tl.arange(0, BLOCK_N)
    m_m, m_n = (o_m < M)[:, None], (o_n < pick(widths, i_entry))[None, :]
    o_row = o_m.to(tl.int64)[:, None]
    # The expand comes first: scaled in fp32 it becomes the start of the accumulator and needs no registers of its own.
    rank = clear(pick(ranks, i_entry), EVEN_R)
    p_rows_h = p_h + o_row * clear(stride_h[0], EVEN_R) + clear(pick(offsets, i_entry), EVEN_R)
    p_rows_b = pick(p_b, i_entry) + o_n.to(tl.int64)[None, :] * clear(pick(strides_b, i_entry), EVEN_R)
    b_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r in tl.range(0, rank, BLOCK_R, num_stages=1):
        o_rank = r + tl.arange(0, BLOCK_R)
        b_h = tl.load(p_rows_h + o_rank[None, :], mask=m_m & (o_rank < rank)[None, :], other=0.0)
        b_b = tl.load(p_rows_b + o_rank[:, None], mask=m_n & (o_rank < rank)[:, None], other=0.0).to(b_h.dtype)
        b_acc = tl.dot(b_h, b_b, b_acc, input_precision=PRECISION)
    b_acc *= pick(scales, i_entry)
    p_tile = pick(p_y, i_entry) + o_row * pick(strides_y, i_entry) + o_n[None, :]
    if MATMUL:
        p_rows_w = pick(p_w, i_entry) + o_n.to(tl.int64)[None, :] * pick(strides_w, i_entry)
        b_acc = matmul_loop(b_acc, p_x + o_row * stride_x, p_rows_w, 1, m_m, m_n, K, EVEN_K, BLOCK_K, PRECISION)
        if BIAS:
            b_acc += tl.load(pick(p_bias, i_entry) + o_n[None, :], mask=m_n, other=0.0).to(tl.float32)
    else:
        b_acc += tl.load(p_tile, mask=m_m & m_n, other=0.0).to(tl.float32)
    b_y = b_acc.to(p_y[0].dtype.element_ty)
    tl.store(p_tile, b_y, mask=m_m & m_n)
    if MOMENTS:
        rows = tl.minimum(M - i_m * BLOCK_M, BLOCK_M)
        b_seen = tl.where(m_m, b_y.to(tl.float32), 0.0)
        b_sum = tl.sum(b_seen, axis=0)
        b_shifted = tl.where(m_m, b_seen - (b_sum / rows)[None, :], 0.0)
        p_sum = p_sums + i_m.to(tl.int64) * 2 * N + o_entry + o_n
        m_sum = o_n < pick(widths, i_entry)
        tl.store(p_sum, b_sum, mask=m_sum)
        tl.store(p_sum + N, tl.sum(b_shifted * b_shifted, axis=0), mask=m_sum)


@triton.jit(do_not_specialize=["M"])
def moments_kernel(
    p_sums, p_out, widths, strides_out, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr
):
    """Column sums of y and y^2 in float64 from each row tile's sum and its squares about its own mean."""
    i_entry, o_first, o_entry = find_tile(tl.program_id(0), widths, BLOCK_N)
    o_n = o_first + tl.arange(0, BLOCK_N)
    m_n = o_n < pick(widths, i_entry)
    b_total = tl.zeros((TILES, BLOCK_N), tl.float64)
    b_square = tl.zeros((TILES, BLOCK_N), tl.float64)
    for i_first in tl.range(0, tl.cdiv(M, BLOCK_M), TILES):
        o_tile = (i_first + tl.arange(0, TILES))[:, None]
        m_sum = (o_tile * BLOCK_M < M) & m_n[None, :]
        p_sum = p_sums + o_tile.to(tl.int64) * 2 * N + (o_entry + o_n)[None, :]
        b_sum = tl.load(p_sum, mask=m_sum, other=0.0).to(tl.float64)
        rows = tl.maximum(tl.minimum(M - o_tile * BLOCK_M, BLOCK_M), 1).to(tl.float64)
        b_total += b_sum
        b_square += tl.load(p_sum + N, mask=m_sum, other=0.0).to(tl.float64) + b_sum * b_sum / rows
    p_tile = pick(p_out, i_entry) + o_n
    tl.store(p_tile, tl.sum(b_total, axis=0), mask=m_n)
    tl.store(p_tile + pick(strides_out, i_entry), tl.sum(b_square, axis=0), mask=m_n)


@triton.jit(do_not_specialize=["M", "threshold"])
def linear_backward_kernel(
    p_dy, p_w, p_dh, p_a, p_dx, p_seed, widths, strides_dy, strides_w, strides_a, offsets, ends,
    M, K, stride_dh, stride_dx, threshold, keep_scale,
    EVEN_R: tl.constexpr, SOURCES: tl.constexpr, MASKED: tl.constexpr, ALIGNED: tl.constexpr, EVEN_N: tl.constexpr,
    BAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of dx [M, K]: dh A (masked per projection), then the sum over SOURCES; without, dx is updated."""
    i_m, i_n = swizzle(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_N), BAND)
    o_m, o_n = i_m * BLOCK_M + tl.arange(0, BLOCK_M), i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = (o_m < M)[:, None], (o_n < K)[None, :]
    o_row = o_m.to(tl.int64)[:, None]
    b_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in tl.static_range(MASKED if MASKED > 0 else 1):
        first = clear(offsets[i], EVEN_R)
        end = clear(ends[i if MASKED > 0 else len(ends) - 1], EVEN_R)
        b_part = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for r in tl.range(first, end, BLOCK_R, num_stages=1):
            o_rank = r + tl.arange(0, BLOCK_R)
            m_rank = o_rank < end
            b_dh = tl.load(
                p_dh + o_row * clear(stride_dh[0], EVEN_R) + o_rank[None, :], mask=m_m & m_rank[None, :], other=0.0
            )
            p_rows = stacked_rows(p_a, offsets, strides_a, o_rank, ALIGNED)
            b_a = tl.load(p_rows[:, None] + o_n[None, :], mask=m_n & m_rank[:, None], other=0.0).to(b_dh.dtype)
            b_part = tl.dot(b_dh, b_a, b_part, input_precision=PRECISION)
        if MASKED > 0:
            m_keep = keep_mask(tl.load(p_seed), i, o_m, i_n * BLOCK_N, threshold, BLOCK_N)
            b_part = tl.where(m_keep, b_part * keep_scale, 0.0)
        b_acc += b_part
    p_tile = p_dx + o_row * stride_dx + o_n[None, :]
    if SOURCES > 0:
        for j in tl.static_range(SOURCES):
            b_acc = matmul_loop(b_acc, p_dy[j] + o_row * strides_dy[j], p_w[j] + o_n[None, :], strides_w[j], m_m, m_n,
                                widths[j], EVEN_N, BLOCK_K, PRECISION)  # fmt: skip
    else:
        b_acc += tl.load(p_tile, mask=m_m & m_n, other=0.0).to(tl.float32)
    tl.store(p_tile, b_acc.to(p_dx.dtype.element_ty), mask=m_m & m_n)


def expand(x: Tensor, h: Tensor, projections: Sequence[Projection], matmul: bool, tiles: TileConfig | None) -> None:
    """Fill (``matmul``) or update every projection's y, and its moments where it has them."""
    M, K = x.shape
    widths = tuple(p.W.shape[0] for p in projections)
    ranks, strides_b = [p.B.shape[1] for p in projections], [p.B.stride(0) for p in projections]
    offsets = [p.offset for p in projections]
    tiles = tiles or choose_tiles("linear" if matmul else "expand", M, sum(widths), K, max(ranks), x.dtype)
    moments = projections[0].moments is not None
    tiles_m, tiles_n = triton.cdiv(M, tiles.rows), sum(triton.cdiv(width, tiles.columns) for width in widths)
    sums = torch.empty(tiles_m, 2, sum(widths), dtype=torch.float32, device=x.device) if moments else x
    biased = matmul and any(p.bias is not None for p in projections)
    bias = [p.W.new_zeros(p.W.shape[0]) if p.bias is None else p.bias for p in projections] if biased else [x]
    launch(
        linear_kernel,
        (tiles_m * tiles_n,),
        x,
        tuple(p.W for p in projections),
        tuple(bias),
        h,
        tuple(p.B for p in projections),
        tuple(p.y for p in projections),
        sums,
        widths,
        tuple(p.W.stride(0) for p in projections),
        opaque(strides_b),
        tuple(p.y.stride(0) for p in projections),
        opaque(offsets),
        opaque(ranks),
        tuple(float(p.scale) for p in projections),
        M,
        K,
        sum(widths),
        x.stride(0),
        opaque([h.stride(0)]),
        tiles_n,
        EVEN_R=even(ranks, strides_b, offsets, [h.stride(0)]),
        MATMUL=matmul,
        BIAS=biased,
        MOMENTS=moments,
        EVEN_K=K % tiles.depth == 0,
        BAND=tiles.band,
        BLOCK_M=tiles.rows,
        BLOCK_N=tiles.columns,
        BLOCK_K=tiles.depth,
        BLOCK_R=16,
        PRECISION=precision(x.dtype),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    if moments:
        _finish_moments(sums, [p.moments for p in projections], M, tiles)


def _finish_moments(sums: Tensor, moments: Sequence[Tensor], M: int, tiles: TileConfig) -> None:
    widths, block = tuple(m.shape[1] for m in moments), 32
    launch(
        moments_kernel,
        (sum(triton.cdiv(width, block) for width in widths),),
        sums,
        tuple(moments),
        widths,
        tuple(m.stride(0) for m in moments),
        M,
        sum(widths),
        BLOCK_M=tiles.rows,
        BLOCK_N=block,
        TILES=32,
        num_warps=4,
    )


def _augmented(x: Tensor, W: Tensor, bias: Tensor | None, h: Tensor, mine: Sequence[Projection], y: Tensor) -> None:
    """``y = [x | h] [W | s B]^T + bias`` by the library's matmul, B block-diagonal over one weight's projections."""
    factor = W.new_zeros(W.shape[0], h.shape[1])
    row = 0
    for p in mine:
        factor[row : row + p.B.shape[0], p.offset : p.offset + p.B.shape[1]] = p.scale * p.B
        row += p.B.shape[0]
    both, weight = torch.cat([x, h], dim=1), torch.cat([W, factor], dim=1)
    if bias is None:
        torch.mm(both, weight.t(), out=y)
    else:
        torch.addmm(bias, both, weight.t(), out=y)


def linear(
    x: Tensor,
    W: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    h: Tensor,
    B: Sequence[Tensor],
    places: Sequence[tuple[int, int]],
    offsets: Sequence[int],
    scales: Sequence[float],
    moments: bool = False,
    strategy: str | None = None,
    tiles: TileConfig | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """``y_j = x W_j^T + bias_j`` with ``s_i h_i B_i^T`` added at projection i's place (output, first column).

    x [M, K], W_j [N_j, K], h [M, R or more], B_i [N_i, r_i] of one dtype -> y_j [M, N_j] and, with ``moments``, the
    column sums of y and y^2, float64 [2, N_j]. ``strategy``: "fused", "library" or "augmented"; default by the table.
    """
    x, h, W, B = unit_last(x), unit_last(h), [unit_last(w) for w in W], [unit_last(b) for b in B]
    M, K = x.shape
    rank = sum(b.shape[1] for b in B)
    y = [torch.empty(M, w.shape[0], dtype=x.dtype, device=x.device) for w in W]
    make = torch.zeros if M == 0 else torch.empty
    sums = [make(2, w.shape[0], dtype=torch.float64, device=x.device) for w in W] if moments else []
    if M == 0:
        return y, sums
    strategy = strategy or choose_strategy("forward", M, sum(w.shape[0] for w in W), K, rank, x.dtype)
    if strategy == "library":
        y = [torch.nn.functional.linear(x, w, b) for w, b in zip(W, bias, strict=True)]
    projections = []
    for i, (j, column) in enumerate(places):
        n = B[i].shape[0]
        projections.append(
            Projection(
                W[j].narrow(0, column, n),
                None if bias[j] is None else bias[j].narrow(0, column, n),
                B[i],
                y[j].narrow(1, column, n),
                sums[j].narrow(1, column, n) if moments else None,
                offsets[i],
                scales[i],
            )
        )
    if strategy == "augmented":
        for j, (w, b) in enumerate(zip(W, bias, strict=True)):
            mine = [p for p, (output, _) in zip(projections, places, strict=True) if output == j]
            _augmented(x, w, b, h.narrow(1, 0, rank), mine, y[j])
        # The moments kernel finds nothing left to add.
        projections = [p._replace(B=p.B.narrow(1, 0, 0)) for p in projections]
    if strategy == "fused" or moments or (strategy == "library" and rank > 0):
        expand(x, h, projections, strategy == "fused", tiles)
    return y, sums


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
        _launch_backward(dy if strategy == "fused" else [], W, dh, A, dx, offsets, seed, threshold, keep_scale, tiles)
    return dx


def _launch_backward(dy, W, dh, A, dx, offsets, seed, threshold, keep_scale, tiles):
    """Fill dx from ``dy``, or add the adapters' part to it in place when ``dy`` is empty."""
    M, K = dx.shape
    widths = tuple(t.shape[1] for t in dy)
    verb = ("linear_backward" if dy else "expand") + ("" if seed is None else "_dropout")
    tiles = tiles or choose_tiles(verb, M, sum(widths), K, dh.shape[1], dx.dtype)
    ends = [o + a.shape[0] for o, a in zip(offsets, A, strict=True)]
    launch(
        linear_backward_kernel,
        (triton.cdiv(M, tiles.rows) * triton.cdiv(K, tiles.columns),),
        tuple(dy) or (dx,),
        tuple(W),
        dh,
        tuple(A),
        dx,
        dh if seed is None else seed,
        widths or (0,),
        tuple(t.stride(0) for t in dy) or (0,),
        tuple(w.stride(0) for w in W),
        tuple(a.stride(0) for a in A),
        opaque(offsets),
        opaque(ends),
        M,
        K,
        opaque([dh.stride(0)]),
        dx.stride(0),
        threshold,
        keep_scale,
        EVEN_R=even(offsets, ends, [dh.stride(0)]),
        SOURCES=len(dy),
        MASKED=0 if seed is None else len(A),
        ALIGNED=aligned(A),
        EVEN_N=all(width % tiles.depth == 0 for width in widths),
        BAND=tiles.band,
        BLOCK_M=tiles.rows,
        BLOCK_N=tiles.columns,
        BLOCK_K=tiles.depth,
        BLOCK_R=16,
        PRECISION=precision(dx.dtype),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
