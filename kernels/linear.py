"""Linear: y = x W^T + bias + s h B^T with the expand in the accumulator of the matmul."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import (
    Segments,
    aligned,
    clear,
    even,
    find_tile,
    launch,
    matmul_loop,
    matmul_options,
    opaque,
    own_rows,
    pick,
    store_moments,
    swizzle,
    table_row,
    unit_last,
)
from .reduce import reduce_moments
from .tiling import PROGRAMS, TileConfig, choose_strategy, choose_tiles


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


@triton.jit
def linear_tile(
    p_x, p_w, desc_x, desc_w, p_bias, p_h, p_b, p_y, p_sums, width, stride_w, stride_b, stride_y, offset, rank, scale,
    i_m, o_m, m_m, o_first, o_entry, K, N, stride_x, stride_h,
    MATMUL: tl.constexpr, BIAS: tl.constexpr, MOMENTS: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows ``o_m`` and columns from ``o_first`` of one projection, whose weight, bias, B and y the pointers name."""
    o_n = o_first + tl.arange(0, BLOCK_N)
    m_n = (o_n < width)[None, :]
    o_row = o_m.to(tl.int64)[:, None]
    # The expand comes first: scaled in fp32 it becomes the start of the accumulator and needs no registers of its own.
    p_rows_h = p_h + o_row * stride_h + offset
    p_rows_b = p_b + o_n.to(tl.int64)[None, :] * stride_b
    b_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r in tl.range(0, rank, BLOCK_R, num_stages=1):
        o_rank = r + tl.arange(0, BLOCK_R)
        b_h = tl.load(p_rows_h + o_rank[None, :], mask=m_m & (o_rank < rank)[None, :], other=0.0)
        b_b = tl.load(p_rows_b + o_rank[:, None], mask=m_n & (o_rank < rank)[:, None], other=0.0).to(b_h.dtype)
        b_acc = tl.dot(b_h, b_b, b_acc, input_precision=PRECISION)
    b_acc *= scale
    if MATMUL and desc_x is None:
        p_rows_w = p_w + o_n.to(tl.int64)[None, :] * stride_w
        b_acc = matmul_loop(b_acc, p_x + o_row * stride_x, p_rows_w, 1, m_m, m_n, K, EVEN_K, BLOCK_K, PRECISION)
    elif MATMUL:
        for k in tl.range(0, K, BLOCK_K):
            b_x, b_w = desc_x.load([i_m * BLOCK_M, k]), desc_w.load([o_first, k])
            b_acc = tl.dot(b_x, tl.trans(b_w), b_acc, input_precision=PRECISION)
    if BIAS:
        b_acc += tl.load(p_bias + o_n[None, :], mask=m_n, other=0.0).to(tl.float32)
    p_tile = p_y + o_row * stride_y + o_n[None, :]
    if not MATMUL:
        b_acc += tl.load(p_tile, mask=m_m & m_n, other=0.0).to(tl.float32)
    b_y = b_acc.to(p_y.dtype.element_ty)
    tl.store(p_tile, b_y, mask=m_m & m_n)
    if MOMENTS:
        p_sum = p_sums + i_m.to(tl.int64) * 2 * N + o_entry + o_n
        store_moments(p_sum, N, b_y.to(tl.float32), m_m, o_n < width)


@triton.jit(do_not_specialize=["M", "tiles_m", "tiles_n"])
def linear_kernel(
    p_x, p_w, p_bias, p_h, p_b, p_y, p_sums, widths, strides_w, strides_b, strides_y, offsets, ranks, scales, segments,
    M, K, N, stride_x, stride_h, tiles_m, tiles_n,
    EVEN_R: tl.constexpr, MATMUL: tl.constexpr, BIAS: tl.constexpr, MOMENTS: tl.constexpr, EVEN_K: tl.constexpr,
    GATHER: tl.constexpr, TMA: tl.constexpr, BAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of one projection's y, or with TMA every so many of them from a fixed number of programs.

    Without MATMUL y holds x W^T + bias already and is updated in place. With ``segments`` a tile is rows of one
    adapter, and its part of the packed factors ``p_b[0]`` stands in a table.
    """
    if TMA:
        desc_x = tl.make_tensor_descriptor(p_x, [M, K], [stride_x, 1], [BLOCK_M, BLOCK_K])
        i_next, o_entry = tl.program_id(0), 0
        for i_entry in tl.range(0, len(widths), num_stages=1):
            width, stride_w, p_weight = pick(widths, i_entry), pick(strides_w, i_entry), pick(p_w, i_entry)
            desc_w = tl.make_tensor_descriptor(p_weight, [width, K], [stride_w, 1], [BLOCK_N, BLOCK_K])
            own = tiles_m * tl.cdiv(width, BLOCK_N)
            for i_tile in tl.range(i_next, own, tl.num_programs(0), num_stages=1, disable_licm=True):
                i_m, i_n = swizzle(i_tile, tiles_m, tl.cdiv(width, BLOCK_N), BAND)
                o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
                linear_tile(
                    p_x, p_weight, desc_x, desc_w, pick(p_bias, i_entry), p_h, pick(p_b, i_entry), pick(p_y, i_entry),
                    p_sums, width, stride_w, clear(pick(strides_b, i_entry), EVEN_R), pick(strides_y, i_entry),
                    clear(pick(offsets, i_entry), EVEN_R), clear(pick(ranks, i_entry), EVEN_R), pick(scales, i_entry),
                    i_m, o_m, (o_m < M)[:, None], i_n * BLOCK_N, o_entry, K, N, stride_x, clear(stride_h[0], EVEN_R),
                    MATMUL, BIAS, MOMENTS, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, PRECISION,
                )  # fmt: skip
            # The next projection's tiles go on where this one's ended, so that every program has as many.
            i_next += tl.cdiv(tl.maximum(own - i_next, 0), tl.num_programs(0)) * tl.num_programs(0) - own
            o_entry += width
        return
    i_m, i_n = swizzle(tl.program_id(0), tiles_m, tiles_n, BAND)
    i_entry, o_first, o_entry = find_tile(i_n, widths, BLOCK_N)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M
    if segments is not None:
        adapter = tl.load(segments[0] + 2 * i_m).to(tl.int64)
        if adapter < 0:
            return
        o_m, m_m = own_rows(segments, i_m, GATHER, BLOCK_M)
        i_pair = adapter * len(widths) + i_entry
        first, rank, offset = table_row(segments[3], i_pair, 3, EVEN_R)
        p_factor, stride_b, scale = p_b[0] + first, rank, tl.load(segments[4] + i_pair)
    else:
        rank, offset = clear(pick(ranks, i_entry), EVEN_R), clear(pick(offsets, i_entry), EVEN_R)
        p_factor, stride_b = pick(p_b, i_entry), clear(pick(strides_b, i_entry), EVEN_R)
        scale = pick(scales, i_entry)
    linear_tile(
        p_x, pick(p_w, i_entry), None, None, pick(p_bias, i_entry), p_h, p_factor, pick(p_y, i_entry), p_sums,
        pick(widths, i_entry), pick(strides_w, i_entry), stride_b, pick(strides_y, i_entry), offset, rank, scale,
        i_m, o_m, m_m[:, None], o_first, o_entry, K, N, stride_x, clear(stride_h[0], EVEN_R),
        MATMUL, BIAS, MOMENTS, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, PRECISION,
    )  # fmt: skip


def expand(
    x: Tensor,
    h: Tensor,
    projections: Sequence[Projection],
    matmul: bool,
    tiles: TileConfig | None,
    segments: Segments | None = None,
) -> None:
    """Fill (``matmul``) or update every projection's y, and its moments where it has them.

    With ``segments`` every row gets its own adapter's part: B is then the packed [elements, 1] of all, and the moments
    are [adapters, 2, N_i].
    """
    M, K = x.shape
    widths = tuple(p.W.shape[0] for p in projections)
    ranks, strides_b = [p.B.shape[1] for p in projections], [p.B.stride(0) for p in projections]
    offsets = [p.offset for p in projections]
    moments = projections[0].moments is not None
    verb = ("linear_moments" if moments else "linear") if matmul else "expand"
    tiles = tiles or choose_tiles(verb, M, sum(widths), K, max(ranks), x.dtype)
    tma = matmul and tiles.tma and aligned([x, *(p.W for p in projections)])
    tiles_m = triton.cdiv(M, tiles.rows) if segments is None else segments.tiles.shape[0]
    tiles_n = sum(triton.cdiv(width, tiles.columns) for width in widths)
    sums = torch.empty(tiles_m, 2, sum(widths), dtype=torch.float32, device=x.device) if moments else x
    biased = matmul and any(p.bias is not None for p in projections)
    bias = [p.W.new_zeros(p.W.shape[0]) if p.bias is None else p.bias for p in projections] if biased else [x]
    own = even(ranks, strides_b, offsets) if segments is None else segments.even
    launch(
        linear_kernel, (min(tiles_m * tiles_n, PROGRAMS) if tma else tiles_m * tiles_n,),
        x, tuple(p.W for p in projections), tuple(bias), h, tuple(p.B for p in projections),
        tuple(p.y for p in projections), sums, widths, tuple(p.W.stride(0) for p in projections), opaque(strides_b),
        tuple(p.y.stride(0) for p in projections), opaque(offsets), opaque(ranks),
        tuple(float(p.scale) for p in projections), None if segments is None else segments.tensors,
        M, K, sum(widths), x.stride(0), opaque([h.stride(0)]), tiles_m, tiles_n,
        EVEN_R=own and h.stride(0) % 8 == 0, MATMUL=matmul, BIAS=biased, MOMENTS=moments, EVEN_K=K % tiles.depth == 0,
        GATHER=segments is not None and segments.gather, TMA=tma, **matmul_options(tiles, x.dtype),
    )  # fmt: skip
    if moments:
        ranges = None if segments is None else segments.ranges
        reduce_moments(sums, [p.moments for p in projections], M, tiles.rows, ranges)


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
