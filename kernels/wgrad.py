"""Wgrad: dA and dB in one pass over x and one over dy; Q rides in the padding of the rank block of dB."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import (
    KeyDropout,
    Matrix,
    Options,
    RankColumns,
    Rows,
    SeedDropout,
    Segments,
    block_rank,
    find_tile,
    hide_from_specialization,
    keep_mask,
    launch,
    masked_ranks,
    matrices,
    multiples_of_8,
    precision,
    rank_columns,
    rank_matrix,
    reveal,
    row_keys,
    seed_dropout,
    select,
    table_row,
    unit_last,
)
from .reduce import reduce_partials
from .tiling import TileConfig, choose_split, choose_tiles


class Layout(NamedTuple):
    """Which columns of ``skinny`` a product takes, and where its results go in the partial sums.

    Columns ``first : first + ranks`` go to ``region`` at ``column * stride_column + rank * stride_rank``; ``probes``
    further ones, from ``first_probe`` on, behind ``probe_region`` as [n, probes]. A row of the adapters' table holds
    the same numbers.
    """

    first: int
    ranks: int
    probes: int
    region: int
    stride_column: int
    stride_rank: int
    probe_region: int = 0
    first_probe: int = 0


class Product(NamedTuple):
    """One ``wide^T skinny``: wide [M, n]; with ``Segments`` the layout stands in their table."""

    wide: Tensor
    skinny: Tensor
    layout: Layout | None = None


class Products(NamedTuple):
    """The products as a kernel takes them; the layout's numbers are hidden from specialization.

    masked: columns of ``skinny`` that belong to a dropout mask each.
    """

    wide: Matrix
    skinny: Matrix
    layout: Layout | None
    masked: RankColumns | None


class Side(NamedTuple):
    """One side of a product: pointers to its columns in row 0, elements between rows, which columns exist."""

    data: tl.tensor
    stride: tl.tensor
    exist: tl.tensor


@triton.jit
def product_layout(products, i, segments, adapter, EVEN: tl.constexpr):
    """The layout of product i, with ``segments`` of one adapter's."""
    if segments is None:
        hidden = products.layout
        first, ranks = reveal(select(hidden.first, i), EVEN), reveal(select(hidden.ranks, i), EVEN)
        probes, first_probe = reveal(select(hidden.probes, i), EVEN), reveal(select(hidden.first_probe, i), EVEN)
        region, probe_region = reveal(select(hidden.region, i)), reveal(select(hidden.probe_region, i))
        stride_column, stride_rank = reveal(select(hidden.stride_column, i)), reveal(select(hidden.stride_rank, i))
    else:
        i_product = adapter * len(products.wide.data) + i
        first, ranks, probes = table_row(segments.table, i_product, 8, EVEN)
        p_rest = segments.table + i_product * 8
        first_probe = tl.load(p_rest + 7)
        if EVEN:
            first_probe = tl.multiple_of(first_probe, 8)
        region, stride_column, stride_rank = tl.load(p_rest + 3), tl.load(p_rest + 4), tl.load(p_rest + 5)
        probe_region = tl.load(p_rest + 6)
    return Layout(first, ranks, probes, region, stride_column, stride_rank, probe_region, first_probe)


@triton.jit
def wgrad_loop(
    wide, skinny, o_first, first, last, dropout, masked, segments, adapter, TILE: tl.constexpr, OPTIONS: tl.constexpr
):
    """``wide^T skinny`` over the rows from first to last; wide begins at column o_first."""
    BLOCK_M: tl.constexpr = TILE.depth
    BLOCK_N: tl.constexpr = TILE.columns
    BLOCK_R: tl.constexpr = TILE.rows
    MASKED: tl.constexpr = OPTIONS.masked
    o_rank = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    b_acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for m in tl.range(first, last, BLOCK_M):
        o_m = m + tl.arange(0, BLOCK_M)
        m_m = o_m < last
        if OPTIONS.gather:
            o_m = tl.load(segments.order + o_m, mask=m_m, other=0)
        o_row = o_m.to(tl.int64)[:, None]
        b_wide = tl.load(wide.data + o_row * wide.stride, mask=m_m[:, None] & wide.exist[None, :], other=0.0)
        b_skinny = tl.load(skinny.data + o_row * skinny.stride, mask=m_m[:, None] & skinny.exist[None, :], other=0.0)
        if dropout is None:
            b_acc = tl.dot(tl.trans(b_wide), b_skinny, b_acc, input_precision=OPTIONS.precision)
        else:
            keys = row_keys(dropout, adapter, Rows(o_m, m_m))
            for i in tl.static_range(MASKED):
                low, high = masked_ranks(dropout, masked, adapter, i, OPTIONS)
                m_own = (o_rank >= low) & (o_rank < high)
                m_keep = keep_mask(keys.seed, OPTIONS.streams[i], keys.counters, o_first, keys.threshold, BLOCK_N)
                b_seen = tl.where(m_keep, b_wide, 0.0)
                b_own = tl.where(m_own[None, :], b_skinny, 0.0)
                b_acc = tl.dot(tl.trans(b_seen), b_own, b_acc, input_precision=OPTIONS.precision)
    return b_acc


@triton.jit(do_not_specialize=["M", "rows", "splits"])
def wgrad_kernel(products, partial, dropout, segments, M, rows, splits, TILE: tl.constexpr, OPTIONS: tl.constexpr):
    """Partial ``wide^T skinny`` over ``rows`` rows; with ``segments`` over one of ``splits`` parts of an adapter's."""
    BLOCK_M: tl.constexpr = TILE.depth
    BLOCK_N: tl.constexpr = TILE.columns
    BLOCK_R: tl.constexpr = TILE.rows
    i, o_first, _ = find_tile(tl.program_id(0), products.wide.columns, BLOCK_N)
    o_rank = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    i_part, scale, adapter = tl.program_id(2), 1.0, None
    if segments is not None:
        adapter, i_part = (i_part // splits).to(tl.int64), i_part % splits
        scale = tl.load(segments.scales + adapter * len(products.wide.data) + i)
    layout = product_layout(products, i, segments, adapter, OPTIONS.even_r)
    if segments is not None:
        begin, end = tl.load(segments.ranges + 2 * adapter), tl.load(segments.ranges + 2 * adapter + 1)
        own = tl.cdiv(tl.cdiv(end - begin, splits), BLOCK_M) * BLOCK_M
        first = begin + i_part * own
        last = tl.minimum(first + own, end)
    else:
        first = i_part * rows
        last = tl.minimum(first + rows, M)
    ranks, count = layout.ranks, layout.ranks + layout.probes
    if tl.program_id(1) * BLOCK_R >= count:
        return
    o_n = o_first + tl.arange(0, BLOCK_N)
    m_n, m_rank = o_n < select(products.wide.columns, i), o_rank < count
    o_skinny = tl.where(o_rank < ranks, layout.first + o_rank, layout.first_probe + o_rank - ranks)
    p_wide, p_skinny = select(products.wide.data, i) + o_n[None, :], select(products.skinny.data, i) + o_skinny[None, :]
    wide = Side(p_wide, select(products.wide.stride, i), m_n)
    skinny = Side(p_skinny, reveal(select(products.skinny.stride, i), OPTIONS.even_r), m_rank)
    b_acc = wgrad_loop(wide, skinny, o_first, first, last, dropout, products.masked, segments, adapter, TILE, OPTIONS)
    if segments is not None:
        b_acc *= tl.where(o_rank < ranks, scale, 1.0)[None, :]
    o_column = o_n.to(tl.int64)[:, None]
    o_out = layout.region + o_column * layout.stride_column + o_rank[None, :] * layout.stride_rank
    o_probe = layout.probe_region + o_column * layout.probes + o_rank[None, :] - ranks
    o_out = tl.where((o_rank < ranks)[None, :], o_out, o_probe)
    p_out = partial.data + i_part.to(tl.int64) * reveal(partial.stride)
    tl.store(p_out + o_out, b_acc, mask=m_n[:, None] & m_rank[None, :])


def run(
    products: Sequence[Product],
    partial: Tensor,
    rows: int,
    tiles: TileConfig,
    dropout: SeedDropout | KeyDropout | None = None,
    columns: RankColumns | None = None,
    streams: Sequence[int] = (),
    segments: Segments | None = None,
    widest: int = 0,
    even: bool = False,
) -> None:
    """Launch over ``products``, ``rows`` rows a program, into ``partial`` [splits, total].

    ``columns`` of skinny have a mask each under ``dropout``, told apart by ``streams``.
    With ``segments`` each program takes one of ``splits`` parts of one adapter's rows; ``widest``: most ranks and
    probes of an adapter; ``even``: whether all are multiples of 8.
    """
    if not products:
        return
    wide, skinny = matrices([p.wide for p in products]), [p.skinny for p in products]
    strides, parts, adapters, layout = [s.stride(0) for s in skinny], partial.shape[0], 1, None
    if segments is None:
        layouts = [p.layout for p in products]
        widest = max(own.ranks + own.probes for own in layouts)
        even = multiples_of_8(*((own.first, own.ranks, own.probes, own.first_probe) for own in layouts))
        layout = Layout(*map(hide_from_specialization, zip(*layouts, strict=True)))
    else:
        adapters = segments.ranges.shape[0]
    tiles = tiles._replace(rows=block_rank(widest) if segments is None else 32)
    hidden = Matrix(tuple(skinny), hide_from_specialization(strides), None)
    grid = (
        sum(triton.cdiv(width, tiles.columns) for width in wide.columns),
        triton.cdiv(widest, tiles.rows),
        parts * adapters,
    )
    options = Options(
        precision(wide.data[0].dtype),
        even_r=even and multiples_of_8(strides),
        masked=len(streams),
        streams=tuple(streams),
        gather=segments is not None and segments.order.numel() > 0,
    )
    operands = Products(wide, hidden, layout, columns), rank_matrix(partial), dropout, segments
    launch(wgrad_kernel, grid, *operands, wide.data[0].shape[0], rows, parts, TILE=tiles, OPTIONS=options)


class Outer(NamedTuple):
    """dB [N_i, r_i] and fp32 Q [N_i, probes] for the projections with a dy, and how a row of partial sums holds them.

    products: those of dy, of the projections ``live`` that have ranks or probes; weights: the factor of each dB and Q.
    """

    dB: list[Tensor]
    Q: list[Tensor]
    products: list[Product]
    live: list[int]
    weights: list[float]


def outer_products(
    dy: Sequence[Tensor | None],
    h: Tensor,
    offsets: Sequence[int],
    ranks: Sequence[int],
    scales: Sequence[float],
    probes: int,
    dtype: torch.dtype,
    start: int = 0,
) -> Outer:
    """What the pass over dy fills, zero where there are no rows; its partial sums begin at ``start``."""
    some = [i for i, g in enumerate(dy) if g is not None]
    make, rank = torch.zeros if h.shape[0] == 0 else torch.empty, sum(ranks)
    dB = [make(dy[i].shape[1], ranks[i], dtype=dtype, device=h.device) for i in some]
    Q = [make(dy[i].shape[1], probes, dtype=torch.float32, device=h.device) for i in some]
    starts = list(accumulate((out.numel() for out in (*dB, *Q)), initial=start))
    stride = probes if h.shape[1] - rank == probes * len(ranks) else 0
    regions = zip(some, starts, starts[len(dB) :], strict=False)
    live = [(i, at_B, at_Q) for i, at_B, at_Q in regions if ranks[i] + probes > 0]
    products = [
        Product(unit_last(dy[i]), h, Layout(offsets[i], ranks[i], probes, at_B, ranks[i], 1, at_Q, rank + i * stride))
        for i, at_B, at_Q in live
    ]
    return Outer(dB, Q, products, [i for i, *_ in live], [scales[i] for i in some] + [1.0] * len(Q))


def wgrad(
    x: Tensor | None,
    dh: Tensor,
    dy: Sequence[Tensor | None],
    h: Tensor,
    offsets: Sequence[int],
    ranks: Sequence[int],
    scales: Sequence[float],
    probes: int,
    seed: Tensor | None = None,
    threshold: int = 0,
    keep_scale: float = 1.0,
    streams: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
    tiles: TileConfig | None = None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """``dA_i = dh_i^T x_i``, ``dB_i = s_i dy_i^T h_i``, ``Q_i = dy_i^T h_P``.

    x [M, K] (None: dA is not wanted), dh [M, R] with the ranks of the projections side by side, dy_i [M, N_i] (None: no
    gradient came), h [M, R + probes], or R + probes for each projection -> dA_i [r_i, K] for every projection, dB_i
    [N_i, r_i], both in ``dtype``, and Q_i fp32 [N_i, probes] for those with a dy. With a seed x_i is x under dropout
    mask i, of its stream (i without ``streams``), times ``keep_scale``.
    """
    h, dh = unit_last(h), unit_last(dh)
    rank, M = sum(ranks), h.shape[0]
    make = torch.zeros if M == 0 else torch.empty
    dA = [] if x is None else [make(r, x.shape[1], dtype=dtype, device=h.device) for r in ranks]
    inputs = [] if x is None or rank == 0 else [Product(unit_last(x), dh, Layout(0, rank, 0, 0, 1, x.shape[1]))]
    outer = outer_products(dy, h, offsets, ranks, scales, probes, dtype, sum(grad.numel() for grad in dA))
    outputs, products = [*dA, *outer.dB, *outer.Q], [*inputs, *outer.products]
    total = sum(out.numel() for out in outputs)
    if M == 0 or total == 0:
        return dA, outer.dB, outer.Q
    N = sum(grad.shape[0] for grad in outer.dB)
    unmasked = tiles or choose_tiles("wgrad", M, N, 0, rank, h.dtype, h.device)
    masked = tiles or choose_tiles("wgrad_dropout", M, 0, dh.shape[1], rank, h.dtype, h.device)
    programs = sum(triton.cdiv(p.wide.shape[1], unmasked.columns) for p in products)
    depth = max(unmasked.depth, masked.depth)
    steps = triton.cdiv(M, depth)
    rows = triton.cdiv(steps, choose_split(programs, steps, 2)) * depth
    partial = torch.empty(triton.cdiv(M, rows), total, dtype=torch.float32, device=h.device)
    if seed is None:
        run(products, partial, rows, unmasked)
    else:
        dropout = seed_dropout(seed, threshold, keep_scale)
        run(inputs, partial, rows, masked, dropout, rank_columns(offsets, ranks), streams or range(len(ranks)))
        run(outer.products, partial, rows, unmasked)
    reduce_partials(partial, outputs, [*[keep_scale] * len(dA), *outer.weights])
    return dA, outer.dB, outer.Q
