"""Shrink: h = x [A; P]^T for all ranks of a group in one pass over x, and dh = s dy B, block-diagonal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import (
    Factors,
    KeyDropout,
    Options,
    Runs,
    SeedDropout,
    Segments,
    aligned,
    block_rank,
    hidden_sum,
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
    spread,
    stacked_rows,
    table_row,
    tile_rows,
    unit_last,
)
from .reduce import reduce_partials
from .tiling import TileConfig, choose_split, choose_tiles


class Block(NamedTuple):
    """A block of ranks: columns of h, which exist, where their factors begin and the stride along the sum, scale."""

    columns: tl.tensor
    exist: tl.tensor
    factors: tl.tensor
    stride: tl.tensor
    scale: tl.tensor


@triton.jit
def rank_block(factors, i, o_own, total, SHARED: tl.constexpr, OPTIONS: tl.constexpr):
    """Ranks ``o_own`` of all factors stacked (SHARED), or of factor i."""
    if SHARED:
        p_rows = stacked_rows(factors, o_own, OPTIONS.aligned)
        return Block(o_own, o_own < total, p_rows, 1, 1.0)
    else:
        EVEN: tl.constexpr = OPTIONS.even_r
        first, rank = select(factors.columns.offsets, i), select(factors.columns.ranks, i)
        o_rank = reveal(first, EVEN) + o_own
        m_rank, p_rows = o_rank < reveal(hidden_sum(first, rank), EVEN), select(factors.data, i) + o_own
        scale, stride = select(factors.scales, i), reveal(select(factors.strides, i), EVEN)
        return Block(o_rank, m_rank, p_rows, stride, scale)


@triton.jit
def shrink_loop(
    p_x, K, first, last, rows, block, dropout, factors, i_x, adapter, TILE: tl.constexpr, OPTIONS: tl.constexpr
):
    """``x f`` over the columns from first to last, with dropout of x for the masked projections' ranks."""
    columns = factors.columns
    BLOCK_M: tl.constexpr = TILE.rows
    BLOCK_R: tl.constexpr = TILE.columns
    BLOCK_K: tl.constexpr = TILE.depth
    MASKED: tl.constexpr = OPTIONS.masked
    b_acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if dropout is not None:
        keys = row_keys(dropout, adapter, rows)
    for k in tl.range(first, last, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        m_x, m_f = rows.exist[:, None], block.exist[None, :]
        if not OPTIONS.even_k:
            m_x, m_f = m_x & (o_k < K)[None, :], m_f & (o_k < K)[:, None]
        b_x = tl.load(p_x + spread(o_k, factors.runs, i_x)[None, :], mask=m_x, other=0.0)
        p_f = block.factors[None, :] + o_k[:, None].to(tl.int64) * block.stride
        b_f = tl.load(p_f, mask=m_f, other=0.0).to(b_x.dtype)
        if dropout is not None:
            for i in tl.static_range(MASKED):
                low, high = masked_ranks(dropout, columns, adapter, i, OPTIONS)
                m_own = (block.columns >= low) & (block.columns < high)
                b_seen = tl.where(
                    keep_mask(keys.seed, OPTIONS.streams[i], keys.counters, k, keys.threshold, BLOCK_K), b_x, 0.0
                )
                b_own = tl.where(m_own[None, :], b_f, 0.0)
                b_acc = tl.dot(b_seen, b_own, b_acc, input_precision=OPTIONS.precision)
            _, masked = masked_ranks(dropout, columns, adapter, MASKED - 1, OPTIONS)
            b_f = tl.where((block.columns >= masked)[None, :], b_f, 0.0)
        b_acc = tl.dot(b_x, b_f, b_acc, input_precision=OPTIONS.precision)
    if dropout is not None:
        _, masked = masked_ranks(dropout, columns, adapter, MASKED - 1, OPTIONS)
        b_acc *= tl.where(block.columns < masked, keys.scale, 1.0)[None, :]
    return b_acc


@triton.jit(do_not_specialize=["M"])
def shrink_kernel(
    x, factors, out, dropout, segments, M,
    SHARED: tl.constexpr, BLOCKS: tl.constexpr, TILE: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """A tile of h, with BLOCKS of ranks for each x. SHARED: one x and all factors stacked; else factor i times x_i.

    With ``segments`` a tile is rows of one adapter, and its part of the packed factors stands in a table.
    """
    # Rank blocks of the same rows are neighbours: the second finds x in the cache.
    columns = BLOCKS if SHARED else BLOCKS * len(x.data)
    i_m, i_column, i_split = tl.program_id(0) // columns, tl.program_id(0) % columns, tl.program_id(1)
    i = i_column * 0 if SHARED else i_column // BLOCKS
    o_block = (i_column % BLOCKS) * TILE.columns
    o_own = o_block + tl.arange(0, TILE.columns)
    stride_out, adapter = reveal(out.stride, OPTIONS.even_r), None
    if segments is not None:
        adapter = tl.load(segments.tiles + 2 * i_m).to(tl.int64)
        if adapter < 0:
            return
        i_pair = adapter * (1 if SHARED else len(x.data)) + i
        row, rank, offset = table_row(segments.table, i_pair, 3, OPTIONS.even_r)
        if o_block >= rank:
            return
        rows = tile_rows(segments, adapter, i_m, M, TILE.rows, OPTIONS.gather)
        p_factors = factors.data[0] + ((row + o_own) * factors.strides[0] if SHARED else row + o_own)
        scale = tl.load(segments.scales + i_pair)
        block = Block(offset + o_own, o_own < rank, p_factors, 1 if SHARED else rank, scale)
    else:
        rows = tile_rows(segments, adapter, i_m, M, TILE.rows, OPTIONS.gather)
        block = rank_block(factors, i, o_own, stride_out, SHARED, OPTIONS)
    K = select(x.columns, i)
    part = tl.cdiv(tl.cdiv(K, TILE.depth), tl.num_programs(1)) * TILE.depth
    p_x = select(x.data, i) + rows.numbers.to(tl.int64)[:, None] * select(x.stride, i)
    first, last = i_split * part, tl.minimum(K, (i_split + 1) * part)
    b_acc = shrink_loop(p_x, K, first, last, rows, block, dropout, factors, i, adapter, TILE, OPTIONS)
    if not SHARED:
        b_acc *= block.scale
    o_row = i_split.to(tl.int64) * M + rows.numbers
    p_tile = out.data + o_row[:, None] * stride_out + block.columns[None, :]
    tl.store(p_tile, b_acc.to(out.data.dtype.element_ty), mask=rows.exist[:, None] & block.exist[None, :])


def run(
    x: Sequence[Tensor],
    factors: Sequence[Tensor],
    out: Tensor,
    offsets: Sequence[int],
    scales: Sequence[float] | None,
    tiles: TileConfig | None = None,
    dropout: SeedDropout | KeyDropout | None = None,
    streams: Sequence[int] = (),
    segments: Segments | None = None,
    widest: int = 0,
    even: bool = False,
    runs: Runs | None = None,
) -> None:
    """Launch over ``x`` (one a factor, or without ``scales`` one for all) and finish a split sum into ``out`` [M, R].

    ``streams``: one for each projection that has a mask under ``dropout``. With ``segments`` there is one factor, the
    packed [rows or elements, K or 1] of all adapters, ``widest`` ranks wide at most and ``even`` if all ranks are
    multiples of 8. No split then: how a row is summed must not depend on the rest of the batch. ``runs``: of x whose
    columns interleave.
    """
    M, total = out.shape
    shared = scales is None
    strides = tuple(f.stride(0) for f in factors)
    ranks = [f.shape[0] if shared else f.shape[1] for f in factors]
    widths = [t.shape[1] for t in x]
    operation = ("shrink_dropout" if dropout else "shrink") if shared else "shrink_backward"
    tiles = tiles or choose_tiles(operation, M, 0, max(widths), total, x[0].dtype, x[0].device)
    if segments is None:
        widest = total if shared else max(ranks)
        even = multiples_of_8(offsets, ranks, () if shared else strides)
        tiles = tiles._replace(columns=block_rank(widest))
    blocks = max(1, triton.cdiv(widest, tiles.columns))
    tiles_m = triton.cdiv(M, tiles.rows) if segments is None else segments.tiles.shape[0]
    programs = tiles_m * blocks * (1 if shared else len(x))
    # Columns that no factor covers keep the caller's zeros, so they may not pass through a sum of partials.
    covered = sum(ranks) == total and segments is None
    split = choose_split(programs, triton.cdiv(min(widths), tiles.depth)) if covered else 1
    target = out if split == 1 else torch.empty(split * M, total, dtype=torch.float32, device=out.device)
    strides = strides if shared else hide_from_specialization(strides)
    scales = None if shared else tuple(float(s) for s in scales)
    operands = (
        matrices(x),
        Factors(tuple(factors), strides, rank_columns(offsets, ranks), scales, runs),
        rank_matrix(target),
        dropout,
        segments,
    )
    options = Options(
        precision(x[0].dtype),
        even_k=all(width % tiles.depth == 0 for width in widths),
        even_r=even and total % 8 == 0,
        aligned=shared and aligned(factors),
        masked=len(streams),
        streams=tuple(streams),
        gather=segments is not None and segments.order.numel() > 0,
    )
    launch(shrink_kernel, (programs, split), *operands, M, SHARED=shared, BLOCKS=blocks, TILE=tiles, OPTIONS=options)
    if split > 1:
        reduce_partials(target.view(split, -1), [out], [1.0])


def shrink(
    x: Tensor,
    factors: Sequence[Tensor],
    probes: int = 0,
    seed: Tensor | None = None,
    threshold: int = 0,
    keep_scale: float = 1.0,
    streams: Sequence[int] = (),
    tiles: TileConfig | None = None,
) -> Tensor:
    """``h = x [F_0; F_1; ...]^T``: x [M, K], F_i [r_i, K] of one dtype -> h [M, sum r_i] in x's dtype.

    With a seed each factor but the last ``probes`` sees x under its own dropout mask, scaled by ``keep_scale``;
    ``streams`` tell the masks apart, 0, 1, ... without.
    """
    x, factors = unit_last(x), [unit_last(f) for f in factors]
    ranks = [f.shape[0] for f in factors]
    h = torch.empty(x.shape[0], sum(ranks), dtype=x.dtype, device=x.device)
    if x.numel() == 0 or h.numel() == 0:
        return h.zero_()
    offsets = [sum(ranks[:i]) for i in range(len(ranks))]
    dropout, own = seed_dropout(seed, threshold, keep_scale), streams or range(len(factors) - probes)
    run([x], factors, h, offsets, None, tiles, dropout, () if seed is None else own)
    return h


def shrink_backward(
    dy: Sequence[Tensor | None],
    B: Sequence[Tensor],
    offsets: Sequence[int],
    scales: Sequence[float],
    rank: int,
    tiles: TileConfig | None = None,
    runs: Runs | None = None,
) -> Tensor:
    """``dh[:, o_i : o_i + r_i] = s_i dy_i B_i``: dy_i [M, N_i], B_i [N_i, r_i] -> dh [M, rank] in dy's dtype.

    Columns of a projection without dy are zero. At least one dy is given. ``runs``: of projections that interleave,
    whose dy have a column stride of 1.
    """
    live = [i for i, b in enumerate(B) if dy[i] is not None and b.shape[1] > 0]
    some = next(g for g in dy if g is not None)
    make = torch.empty if sum(B[i].shape[1] for i in live) == rank else torch.zeros
    dh = make(some.shape[0], rank, dtype=some.dtype, device=some.device)
    if dh.numel() == 0 or not live:
        return dh
    wide, factors = [unit_last(dy[i]) for i in live], [unit_last(B[i]) for i in live]
    runs = runs and runs.of(live)
    run(wide, factors, dh, [offsets[i] for i in live], [scales[i] for i in live], tiles, runs=runs)
    return dh
