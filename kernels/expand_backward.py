"""The backward of expand from one pass over dy: dh = s dy B, dB = s dy^T h and Q = dy^T h_P, and dA after them."""

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
    multiples_of_8,
    precision,
    rank_columns,
    rank_matrix,
    reveal,
    select,
    spread,
    unit_last,
)
from .reduce import reduce_partials
from .shrink import shrink_backward
from .tiling import TileConfig, choose_parts, choose_strategy, choose_tiles
from .wgrad import Layout, Outer, Products, outer_products, product_layout, runs_of_products, wgrad


@triton.jit(do_not_specialize=["M", "rows", "span"])
def expand_backward_kernel(products, B, dh, partial, M, rows, span, TILE: tl.constexpr, OPTIONS: tl.constexpr):
    """For ``rows`` rows and ``span`` columns of one projection's dy: their part of dh, and of its dB and Q."""
    BLOCK_M: tl.constexpr = TILE.rows
    BLOCK_R: tl.constexpr = TILE.columns
    BLOCK_N: tl.constexpr = TILE.depth
    i, i_part = tl.program_id(0) % len(products.wide.data), tl.program_id(0) // len(products.wide.data)
    layout = product_layout(products, i, None, None, OPTIONS.even_r)
    ranks, count = layout.ranks, layout.ranks + layout.probes
    if tl.program_id(1) * BLOCK_R >= count:
        return
    o_rank = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_row = i_part * rows + tl.arange(0, BLOCK_M)
    m_row = (o_row < tl.minimum(M, (i_part + 1) * rows))[:, None]
    m_rank, m_count = (o_rank < ranks)[None, :], (o_rank < count)[None, :]
    o_h = tl.where(o_rank < ranks, layout.first + o_rank, layout.first_probe + o_rank - ranks)
    p_h = select(products.skinny.data, i) + o_h[None, :]
    stride_h, stride_b = select(products.skinny.stride, i), reveal(select(B.strides, i), OPTIONS.even_r)
    b_h = tl.load(p_h + o_row.to(tl.int64)[:, None] * reveal(stride_h, OPTIONS.even_r), mask=m_row & m_count, other=0.0)
    N, first = select(products.wide.columns, i), tl.multiple_of(tl.program_id(2) * span, BLOCK_N)
    p_dy = select(products.wide.data, i) + o_row.to(tl.int64)[:, None] * select(products.wide.stride, i)
    p_b, p_part = select(B.data, i) + o_rank[None, :], partial.data + i_part.to(tl.int64) * reveal(partial.stride)
    b_dh = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for n in tl.range(first, tl.minimum(N, first + span), BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        m_n, m_dy = (o_n < N)[:, None], m_row
        if not OPTIONS.even_k:
            m_dy = m_row & (o_n < N)[None, :]
        o_column = o_n.to(tl.int64)[:, None]
        b_dy = tl.load(p_dy + spread(o_n, products.runs, i)[None, :], mask=m_dy, other=0.0)
        b_b = tl.load(p_b + o_column * stride_b, mask=m_n & m_rank, other=0.0).to(b_dy.dtype)
        b_dh = tl.dot(b_dy, b_b, b_dh, input_precision=OPTIONS.precision)
        b_dB = tl.dot(tl.trans(b_dy), b_h, input_precision=OPTIONS.precision)
        o_out = layout.region + o_column * ranks + o_rank[None, :]
        o_probe = layout.probe_region + o_column * layout.probes + o_rank[None, :] - ranks
        tl.store(p_part + tl.where(m_rank, o_out, o_probe), b_dB, mask=m_n & m_count)
    o_row = tl.program_id(2).to(tl.int64) * M + o_row
    p_dh = dh.data + o_row[:, None] * reveal(dh.stride, OPTIONS.even_r) + layout.first + o_rank[None, :]
    tl.store(p_dh, (b_dh * select(B.scales, i)).to(dh.data.dtype.element_ty), mask=m_row & m_rank)


def run(outer: Outer, B: Sequence[Tensor], scales: Sequence[float], dh: Tensor, tiles: TileConfig) -> None:
    """Fill dh, dB and Q: launch over the products of dy, then finish the sums that were cut."""
    M, total = dh.shape
    layouts, B = [p.layout for p in outer.products], [B[i] for i in outer.live]
    wide, skinny = matrices([p.wide for p in outer.products]), [p.skinny for p in outer.products]
    widest = max(own.ranks + own.probes for own in layouts)
    tiles = tiles._replace(columns=block_rank(widest))
    rows, span = choose_parts(M, wide.columns, tiles)
    parts, cuts = triton.cdiv(M, rows), triton.cdiv(max(wide.columns), span)
    elements = sum(out.numel() for out in (*outer.dB, *outer.Q))
    partial = torch.empty(parts, elements, dtype=torch.float32, device=dh.device)
    # Columns that no projection covers keep their zeros.
    covered = sum(own.ranks for own in layouts) == total
    make = torch.empty if covered else torch.zeros
    target = dh if cuts == 1 else make(cuts * M, total, dtype=torch.float32, device=dh.device)
    strides_b, strides_h = [b.stride(0) for b in B], [s.stride(0) for s in skinny]
    columns = rank_columns([own.first for own in layouts], [own.ranks for own in layouts])
    weights = tuple(float(scales[i]) for i in outer.live)
    even = multiples_of_8(*((own.first, own.ranks, own.probes, own.first_probe) for own in layouts))
    options = Options(
        precision(dh.dtype),
        even_k=all(width % tiles.depth == 0 for width in wide.columns),
        even_r=even and multiples_of_8(strides_b, strides_h, [total]),
    )
    operands = (
        Products(
            wide,
            Matrix(tuple(skinny), hide_from_specialization(strides_h), None),
            Layout(*map(hide_from_specialization, zip(*layouts, strict=True))),
            None,
            runs_of_products(outer.products),
        ),
        Factors(tuple(B), hide_from_specialization(strides_b), columns, weights),
        rank_matrix(target),
        rank_matrix(partial),
    )
    grid = (parts * len(layouts), triton.cdiv(widest, tiles.columns), cuts)
    launch(expand_backward_kernel, grid, *operands, M, rows, span, TILE=tiles, OPTIONS=options)
    if cuts > 1:
        reduce_partials(target.view(cuts, -1), [dh], [1.0])
    reduce_partials(partial, [*outer.dB, *outer.Q], outer.weights)


def expand_backward(
    x: Tensor | None,
    dy: Sequence[Tensor | None],
    h: Tensor,
    B: Sequence[Tensor],
    offsets: Sequence[int],
    scales: Sequence[float],
    rank: int,
    probes: int,
    dh: Tensor | None = None,
    seed: Tensor | None = None,
    threshold: int = 0,
    keep_scale: float = 1.0,
    streams: Sequence[int] = (),
    strategy: str | None = None,
    tiles: TileConfig | None = None,
    runs: Runs | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """dh [M, rank] as ``shrink_backward`` and dA, dB, Q as ``wgrad``, in the dtype of B.

    ``strategy``: "fused" reads dy once, with ``tiles``, "separate" once for dh and once for dB and Q; default by the
    table. A ``dh`` that is there already is kept. ``runs``: of projections that interleave, whose dy have a column
    stride of 1.
    """
    ranks, live = [b.shape[1] for b in B], [g for g in dy if g is not None]
    M, N = live[0].shape[0], sum(g.shape[1] for g in live)
    if strategy is None:
        strategy = choose_strategy("expand_backward", M, N, 0, rank + probes, h.dtype, h.device)
        strategy = strategy if aligned(live) else "separate"  # whose addresses spill
    rest = (h, offsets, ranks, scales, probes, seed, threshold, keep_scale, streams, B[0].dtype)
    if strategy == "separate" or dh is not None:
        dh = shrink_backward(dy, B, offsets, scales, rank, runs=runs) if dh is None else dh
        return dh, *wgrad(x, dh, dy, *rest, runs=runs)
    h, B, own = unit_last(h), [unit_last(b) for b in B], [r for r, g in zip(ranks, dy, strict=True) if g is not None]
    make = torch.empty if sum(own) == rank else torch.zeros
    dh = make(M, rank, dtype=live[0].dtype, device=h.device)
    outer = outer_products(dy, h, offsets, ranks, scales, probes, B[0].dtype, runs=runs)
    if M > 0 and outer.products:
        run(outer, B, scales, dh, tiles or choose_tiles("expand_backward", M, N, 0, rank + probes, h.dtype, h.device))
    dA = [] if x is None else wgrad(x, dh, [None] * len(dy), *rest)[0]
    return dh, dA, outer.dB, outer.Q
