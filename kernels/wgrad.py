"""Wgrad: dA and dB in one pass over x and one over dy; Q rides in the padding of the rank block of dB."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import (
    Segments,
    block_rank,
    clear,
    compiled,
    dropout_of,
    even,
    find_tile,
    keep_mask,
    launch,
    masked_ranks,
    opaque,
    pick,
    table_row,
    unit_last,
)
from .reduce import reduce_partials
from .tiling import TileConfig, choose_split, choose_tiles


class Product(NamedTuple):
    """One ``wide^T skinny``: wide [M, n], columns ``first : first + ranks`` and ``probes`` further ones of skinny.

    The rank columns go to ``region`` of the partial sums at ``column * strides[0] + rank * strides[1]``, the probe
    columns, from ``first_probe`` on, behind ``probe_region`` as [n, probes].
    """

    wide: Tensor
    skinny: Tensor
    first: int
    ranks: int
    probes: int
    region: int
    strides: tuple[int, int]
    probe_region: int = 0
    first_probe: int = 0


@triton.jit
def product_row(p_table, i_product, EVEN_R: tl.constexpr):
    """The 8 numbers of one adapter's product: rank columns, probe columns, and where both go."""
    o_factor, rank, probe = table_row(p_table, i_product, 8, EVEN_R)
    p_rest = p_table + i_product * 8
    o_probes = tl.load(p_rest + 7)
    if EVEN_R:
        o_probes = tl.multiple_of(o_probes, 8)
    region, stride_column, stride_rank = tl.load(p_rest + 3), tl.load(p_rest + 4), tl.load(p_rest + 5)
    return o_factor, rank, probe, o_probes, region, stride_column, stride_rank, tl.load(p_rest + 6)


@triton.jit
def wgrad_loop(
    b_acc, p_columns, p_ranks, stride_wide, stride_skinny, m_n, m_rank, first, last, p_seed, o_first, o_rank, masks,
    segments, i_group, threshold, scale,
    MASKED: tl.constexpr, GATHER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``acc += wide^T skinny`` over the rows from first to last."""
    for m in tl.range(first, last, BLOCK_M):
        o_m = m + tl.arange(0, BLOCK_M)
        m_m = o_m < last
        if GATHER:
            o_m = tl.load(segments[2] + o_m, mask=m_m, other=0)
        o_row = o_m.to(tl.int64)[:, None]
        b_wide = tl.load(p_columns + o_row * stride_wide, mask=m_m[:, None] & m_n[None, :], other=0.0)
        b_skinny = tl.load(p_ranks + o_row * stride_skinny, mask=m_m[:, None] & m_rank[None, :], other=0.0)
        if MASKED > 0:
            seed, o_key, least, kept = dropout_of(segments, p_seed, i_group, o_m, m_m, threshold, scale)
            for i in tl.static_range(MASKED):
                low, high = masked_ranks(segments, i_group, i, MASKED, masks, masks[1:])
                m_own = (o_rank >= low) & (o_rank < high)
                b_seen = tl.where(keep_mask(seed, i, o_key, o_first, least, BLOCK_N), b_wide, 0.0)
                b_own = tl.where(m_own[None, :], b_skinny, 0.0)
                b_acc = tl.dot(tl.trans(b_seen), b_own, b_acc, input_precision=PRECISION)
        else:
            b_acc = tl.dot(tl.trans(b_wide), b_skinny, b_acc, input_precision=PRECISION)
    return b_acc


@triton.jit(do_not_specialize=["M", "rows", "splits", "total", "threshold"])
def wgrad_kernel(
    p_wide, p_skinny, p_partial, p_seed, widths, strides_wide, strides_skinny, firsts, ranks, probes,
    regions, strides_column, strides_rank, probe_regions, firsts_probe, masks, segments, M, rows, splits, total,
    threshold, EVEN_R: tl.constexpr, MASKED: tl.constexpr, GATHER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial ``wide^T skinny`` over ``rows`` rows; MASKED projections, ending at ``masks``, see their own dropout.

    With ``segments`` over one of ``splits`` parts of one adapter's rows; where its product lies: a table of 8 numbers.
    """
    i_entry, o_first, _ = find_tile(tl.program_id(0), widths, BLOCK_N)
    o_rank = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    i_part, scale, adapter = tl.program_id(2), 1.0, 0
    if segments is not None:
        adapter, i_part = (i_part // splits).to(tl.int64), i_part % splits
        i_product = adapter * len(widths) + i_entry
        scale = tl.load(segments[4] + i_product)
        o_factor, rank, probe, o_probes, region, stride_column, stride_rank, probe_region = product_row(
            segments[3], i_product, EVEN_R
        )
        begin, end = tl.load(segments[1] + 2 * adapter), tl.load(segments[1] + 2 * adapter + 1)
        own = tl.cdiv(tl.cdiv(end - begin, splits), BLOCK_M) * BLOCK_M
        first = begin + i_part * own
        last = tl.minimum(first + own, end)
    else:
        o_factor, rank = clear(pick(firsts, i_entry), EVEN_R), clear(pick(ranks, i_entry), EVEN_R)
        probe, o_probes = clear(pick(probes, i_entry), EVEN_R), clear(pick(firsts_probe, i_entry), EVEN_R)
        region, probe_region = clear(pick(regions, i_entry)), clear(pick(probe_regions, i_entry))
        stride_column, stride_rank = clear(pick(strides_column, i_entry)), clear(pick(strides_rank, i_entry))
        first = i_part * rows
        last = tl.minimum(first + rows, M)
    if tl.program_id(1) * BLOCK_R >= rank + probe:
        return
    o_n = o_first + tl.arange(0, BLOCK_N)
    m_n, m_rank = o_n < pick(widths, i_entry), o_rank < rank + probe
    o_skinny = tl.where(o_rank < rank, o_factor + o_rank, o_probes + o_rank - rank)
    p_columns = pick(p_wide, i_entry) + o_n[None, :]
    p_ranks = pick(p_skinny, i_entry) + o_skinny[None, :]
    b_acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    b_acc = wgrad_loop(
        b_acc, p_columns, p_ranks, pick(strides_wide, i_entry), clear(pick(strides_skinny, i_entry), EVEN_R),
        m_n, m_rank, first, last, p_seed, o_first, o_rank, masks, segments, adapter, threshold, scale,
        MASKED, GATHER, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip
    if segments is not None:
        b_acc *= tl.where(o_rank < rank, scale, 1.0)[None, :]
    o_column = o_n.to(tl.int64)[:, None]
    o_out = region + o_column * stride_column + o_rank[None, :] * stride_rank
    o_probe = probe_region + o_column * probe + o_rank[None, :] - rank
    o_out = tl.where((o_rank < rank)[None, :], o_out, o_probe)
    p_out = p_partial + i_part.to(tl.int64) * total
    tl.store(p_out + o_out, b_acc, mask=m_n[:, None] & m_rank[None, :])


def run(
    products: Sequence[Product],
    partial: Tensor,
    rows: int,
    tiles: TileConfig,
    masks: Sequence[int] = (0,),
    seed: Tensor | None = None,
    threshold: int = 0,
    segments: Segments | None = None,
) -> None:
    """Launch over ``products``, ``rows`` rows a program, into ``partial`` [splits, total].

    With ``segments`` each program takes one of ``splits`` parts of one adapter's rows; of a product only the tensors
    count then.
    """
    if not products:
        return
    widths = tuple(p.wide.shape[1] for p in products)
    widest = max(p.ranks + p.probes for p in products) if segments is None else segments.widest
    block, parts = (block_rank(widest) if segments is None else 32), partial.shape[0]
    adapters = 1 if segments is None else segments.ranges.shape[0]
    masked = 0 if seed is None else len(masks) - 1 if segments is None else segments.masked
    numbers = [number for p in products for number in (p.first, p.ranks, p.probes, p.first_probe)]
    strides_skinny = [p.skinny.stride(0) for p in products]
    own = even(numbers) if segments is None else segments.even
    launch(
        wgrad_kernel,
        (sum(triton.cdiv(w, tiles.columns) for w in widths), triton.cdiv(widest, block), parts * adapters),
        tuple(p.wide for p in products), tuple(p.skinny for p in products), partial,
        products[0].wide if seed is None else seed, widths, tuple(p.wide.stride(0) for p in products),
        opaque(strides_skinny), *(opaque(column) for column in zip(*(_numbers(p) for p in products), strict=True)),
        opaque(masks), None if segments is None else segments.tensors,
        products[0].wide.shape[0], rows, parts, partial.shape[1], threshold,
        EVEN_R=own and even(strides_skinny), MASKED=masked,
        GATHER=segments is not None and segments.gather,
        BLOCK_M=tiles.depth, BLOCK_N=tiles.columns, BLOCK_R=block, **compiled(tiles, products[0].wide.dtype),
    )  # fmt: skip


def _numbers(p: Product) -> tuple[int, ...]:
    return p.first, p.ranks, p.probes, p.region, *p.strides, p.probe_region, p.first_probe


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
    dtype: torch.dtype = torch.float32,
    tiles: TileConfig | None = None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """``dA_i = dh_i^T x_i``, ``dB_i = s_i dy_i^T h_i``, ``Q_i = dy_i^T h_P``.

    x [M, K] (None: dA is not wanted), dh [M, R] with the ranks of the projections side by side, dy_i [M, N_i] (None: no
    gradient came), h [M, R + probes], or R + probes for each projection -> dA_i [r_i, K] for every projection, dB_i
    [N_i, r_i], both in ``dtype``, and Q_i fp32 [N_i, probes] for those with a dy. With a seed x_i is x under dropout
    mask i times ``keep_scale``.
    """
    live = [i for i, g in enumerate(dy) if g is not None]
    wide, h, dh = [unit_last(dy[i]) for i in live], unit_last(h), unit_last(dh)
    rank, M, device = sum(ranks), h.shape[0], h.device
    make = torch.zeros if M == 0 else torch.empty
    dA = [] if x is None else [make(r, x.shape[1], dtype=dtype, device=device) for r in ranks]
    dB = [make(g.shape[1], ranks[i], dtype=dtype, device=device) for i, g in zip(live, wide, strict=True)]
    Q = [make(g.shape[1], probes, dtype=torch.float32, device=device) for g in wide]
    outputs = [*dA, *dB, *Q]
    weights = [keep_scale] * len(dA) + [scales[i] for i in live] + [1.0] * len(Q)
    starts = [0]
    for out in outputs:
        starts.append(starts[-1] + out.numel())
    if M == 0 or starts[-1] == 0:
        return dA, dB, Q
    at_B, at_Q = starts[len(dA) :], starts[len(dA) + len(dB) :]
    inputs = [] if x is None or rank == 0 else [Product(unit_last(x), dh, 0, rank, 0, 0, (1, x.shape[1]))]
    stride = probes if h.shape[1] - rank == probes * len(ranks) else 0
    outer = [
        Product(g, h, offsets[i], ranks[i], probes, at_B[n], (ranks[i], 1), at_Q[n], rank + i * stride)
        for n, (i, g) in enumerate(zip(live, wide, strict=True))
        if ranks[i] + probes > 0
    ]
    plain = tiles or choose_tiles("wgrad", M, sum(g.shape[1] for g in wide), 0, rank, h.dtype)
    masked = tiles or choose_tiles("wgrad_dropout", M, 0, dh.shape[1], rank, h.dtype)
    programs = sum(triton.cdiv(p.wide.shape[1], plain.columns) for p in [*inputs, *outer])
    depth = max(plain.depth, masked.depth)
    steps = triton.cdiv(M, depth)
    rows = triton.cdiv(steps, choose_split(programs, steps, 2)) * depth
    partial = torch.empty(triton.cdiv(M, rows), starts[-1], dtype=torch.float32, device=device)
    if seed is None:
        run([*inputs, *outer], partial, rows, plain)
    else:
        run(inputs, partial, rows, masked, [*offsets, rank], seed, threshold)
        run(outer, partial, rows, plain)
    reduce_partials(partial, outputs, weights)
    return dA, dB, Q
