"""Shrink: h = x [A; P]^T for all ranks of a group in one pass over x, and dh = s dy B, block-diagonal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import (
    Segments,
    aligned,
    block_rank,
    clear,
    compiled,
    dropout_of,
    even,
    keep_mask,
    launch,
    masked_ranks,
    opaque,
    own_rows,
    pick,
    stacked_rows,
    store_moments,
    table_row,
    unit_last,
)
from .reduce import reduce_moments, reduce_partials
from .tiling import TileConfig, choose_split, choose_tiles


@triton.jit
def masked_product(b_acc, b_x, b_f, seed, o_key, o_rank, segments, i_group, offsets, ends, k, threshold,
                   MASKED: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """(acc + x f with each of MASKED factors' own dropout of x, f without them)."""
    for i in tl.static_range(MASKED):
        first, end = masked_ranks(segments, i_group, i, MASKED, offsets, ends)
        m_own = (o_rank >= first) & (o_rank < end)
        b_seen = tl.where(keep_mask(seed, i, o_key, k, threshold, BLOCK_K), b_x, 0.0)
        b_acc = tl.dot(b_seen, tl.where(m_own[None, :], b_f, 0.0), b_acc, input_precision=PRECISION)
    _, last = masked_ranks(segments, i_group, MASKED - 1, MASKED, offsets, ends)
    return b_acc, tl.where((o_rank >= last)[None, :], b_f, 0.0)


@triton.jit
def factor_rows(p_factors, strides_factor, offsets, ends, scales, i_entry, o_own, total, SHARED: tl.constexpr,
                ALIGNED: tl.constexpr, EVEN_R: tl.constexpr):  # fmt: skip
    """(columns of h, which exist, scale, pointers to their factors, stride along the sum) of a block of one group."""
    if SHARED:
        p_rows = stacked_rows(p_factors, offsets, strides_factor, o_own, ALIGNED)
        return o_own, o_own < total, scales[0], p_rows, 1
    else:
        o_rank = clear(pick(offsets, i_entry), EVEN_R) + o_own
        m_rank, p_rows = o_rank < clear(pick(ends, i_entry), EVEN_R), pick(p_factors, i_entry) + o_own
        return o_rank, m_rank, pick(scales, i_entry), p_rows, clear(pick(strides_factor, i_entry), EVEN_R)


@triton.jit
def shrink_loop(
    b_acc, p_x, p_f, stride_f, m_m, m_rank, K, k_first, k_last, p_sums, i_m, o_block, seed, o_key, o_rank, segments,
    i_group, offsets, ends, threshold,
    MASKED: tl.constexpr, MOMENTS: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``acc += x f`` from k_first to k_last: p_x [BLOCK_M, 1], p_f [BLOCK_R] at column 0."""
    for k in tl.range(k_first, k_last, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        m_x, m_f = m_m[:, None], m_rank[None, :]
        if not EVEN_K:
            m_x, m_f = m_x & (o_k < K)[None, :], m_f & (o_k < K)[:, None]
        b_x = tl.load(p_x + o_k[None, :], mask=m_x, other=0.0)
        b_f = tl.load(p_f[None, :] + o_k[:, None].to(tl.int64) * stride_f, mask=m_f, other=0.0).to(b_x.dtype)
        if MOMENTS:
            p_sum = p_sums + i_m.to(tl.int64) * 2 * K + o_k
            store_moments(p_sum, K, b_x.to(tl.float32), m_m[:, None], (o_k < K) & (o_block == 0))
        if MASKED > 0:
            b_acc, b_f = masked_product(
                b_acc, b_x, b_f, seed, o_key, o_rank, segments, i_group, offsets, ends, k, threshold,
                MASKED, BLOCK_K, PRECISION,
            )  # fmt: skip
        b_acc = tl.dot(b_x, b_f, b_acc, input_precision=PRECISION)
    return b_acc


@triton.jit(do_not_specialize=["M", "threshold"])
def shrink_kernel(
    p_x, p_factors, p_out, p_seed, p_sums, widths, strides_x, strides_factor, offsets, ends, scales, segments,
    M, total, threshold,
    SHARED: tl.constexpr, MASKED: tl.constexpr, MOMENTS: tl.constexpr, GATHER: tl.constexpr,
    EVEN_R: tl.constexpr, ALIGNED: tl.constexpr, EVEN_K: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """SHARED: one x and all factors stacked, rows of the first MASKED factors see their own dropout of x.

    Else factor i multiplies its own x_i, scaled by scales[i]. ``total`` is the number of columns of h. MOMENTS leaves
    each tile's column sums of x, and of its squares about their mean, in p_sums. With ``segments`` a tile is rows of
    one adapter, and its part of the packed ``p_factors[0]`` stands in a table.
    """
    # Rank blocks of the same rows are neighbours: the second finds x in the cache.
    columns = BLOCKS if SHARED else BLOCKS * len(widths)
    i_m, i_column, i_split = tl.program_id(0) // columns, tl.program_id(0) % columns, tl.program_id(1)
    stride_out = clear(total[0], EVEN_R)
    i_entry = i_column * 0 if SHARED else i_column // BLOCKS
    o_block = (i_column % BLOCKS) * BLOCK_R
    o_own = o_block + tl.arange(0, BLOCK_R)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m, adapter = o_m < M, 0
    if segments is not None:
        adapter = tl.load(segments[0] + 2 * i_m).to(tl.int64)
        if adapter < 0:
            return
        i_pair = adapter * (1 if SHARED else len(widths)) + i_entry
        first, rank, offset = table_row(segments[3], i_pair, 3, EVEN_R)
        if o_block >= rank:
            return
        o_m, m_m = own_rows(segments, i_m, GATHER, BLOCK_M)
        o_rank, m_rank, scale = offset + o_own, o_own < rank, tl.load(segments[4] + i_pair)
        p_rows = p_factors[0] + ((first + o_own) * strides_factor[0] if SHARED else first + o_own)
        stride_depth = 1 if SHARED else rank
    else:
        o_rank, m_rank, scale, p_rows, stride_depth = factor_rows(
            p_factors, strides_factor, offsets, ends, scales, i_entry, o_own, stride_out, SHARED, ALIGNED, EVEN_R
        )
    K = pick(widths, i_entry)
    part = tl.cdiv(tl.cdiv(K, BLOCK_K), tl.num_programs(1)) * BLOCK_K
    p_rows_x = pick(p_x, i_entry) + o_m.to(tl.int64)[:, None] * pick(strides_x, i_entry)
    b_acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    seed, o_key, least, keep_scale = None, o_m, threshold, scale
    if MASKED > 0:
        seed, o_key, least, keep_scale = dropout_of(segments, p_seed, adapter, o_m, m_m, threshold, scale)
    b_acc = shrink_loop(
        b_acc, p_rows_x, p_rows, stride_depth, m_m, m_rank, K, i_split * part, tl.minimum(K, (i_split + 1) * part),
        p_sums, i_m, o_block, seed, o_key, o_rank, segments, adapter, offsets, ends, least,
        MASKED, MOMENTS, EVEN_K, BLOCK_K, PRECISION,
    )  # fmt: skip
    if MASKED > 0:
        _, last = masked_ranks(segments, adapter, MASKED - 1, MASKED, offsets, ends)
        b_acc *= tl.where(o_rank < last, keep_scale, 1.0)[None, :]
    elif not SHARED:
        b_acc *= scale
    p_tile = p_out + (i_split.to(tl.int64) * M + o_m)[:, None] * stride_out + o_rank[None, :]
    tl.store(p_tile, b_acc.to(p_out.dtype.element_ty), mask=m_m[:, None] & m_rank[None, :])


def run(
    x: Sequence[Tensor],
    factors: Sequence[Tensor],
    out: Tensor,
    offsets: Sequence[int],
    scales: Sequence[float],
    shared: bool,
    tiles: TileConfig | None = None,
    seed: Tensor | None = None,
    masked: int = 0,
    threshold: int = 0,
    moments: Tensor | None = None,
    segments: Segments | None = None,
) -> None:
    """Launch over ``x`` (one a factor, or one for all) and finish a split sum into ``out`` [M, R].

    With ``segments`` there is one factor, the packed [rows or elements, K or 1] of all adapters, and no split: how a
    row is summed must not depend on the rest of the batch.
    """
    M, total = out.shape
    strides = tuple(f.stride(0) for f in factors)
    ranks = [f.shape[0] if shared else f.shape[1] for f in factors]
    widths = tuple(t.shape[1] for t in x)
    plain = "shrink" if moments is None else "shrink_moments"
    verb = "shrink_dropout" if masked else plain
    tiles = tiles or choose_tiles(verb, M, 0, max(widths), total, x[0].dtype)
    widest = segments.widest if segments else total if shared else max(ranks)
    block = block_rank(widest) if segments is None else tiles.columns
    blocks = max(1, triton.cdiv(widest, block))
    tiles_m = triton.cdiv(M, tiles.rows) if segments is None else segments.tiles.shape[0]
    programs = tiles_m * blocks * (1 if shared else len(x))
    # Columns that no factor covers keep the caller's zeros, so they may not pass through a sum of partials.
    covered = sum(ranks) == total and segments is None
    split = choose_split(programs, triton.cdiv(min(widths), tiles.depth)) if covered else 1
    target = out if split == 1 else torch.empty(split, M, total, dtype=torch.float32, device=out.device)
    sums = x[0] if moments is None else torch.empty(tiles_m, 2, widths[0], dtype=torch.float32, device=out.device)
    own = even(offsets, ranks, () if shared else strides) if segments is None else segments.even
    ends = [o + r for o, r in zip(offsets, ranks, strict=True)]
    launch(
        shrink_kernel, (programs, split), tuple(x), tuple(factors), target, seed if masked else x[0], sums, widths,
        tuple(t.stride(0) for t in x), strides if shared else opaque(strides), opaque(offsets), opaque(ends),
        tuple(float(s) for s in scales), None if segments is None else segments.tensors, M, opaque([total]), threshold,
        SHARED=shared, MASKED=masked, MOMENTS=moments is not None, GATHER=segments is not None and segments.gather,
        EVEN_R=own and total % 8 == 0, ALIGNED=shared and aligned(factors),
        EVEN_K=all(width % tiles.depth == 0 for width in widths), BLOCKS=blocks,
        BLOCK_M=tiles.rows, BLOCK_K=tiles.depth, BLOCK_R=block, **compiled(tiles, x[0].dtype),
    )  # fmt: skip
    if split > 1:
        reduce_partials(target.view(split, -1), [out], [1.0])
    if moments is not None:
        reduce_moments(sums, [moments], M, tiles.rows)


def shrink(
    x: Tensor,
    factors: Sequence[Tensor],
    probes: int = 0,
    seed: Tensor | None = None,
    threshold: int = 0,
    keep_scale: float = 1.0,
    moments: Tensor | None = None,
    tiles: TileConfig | None = None,
) -> Tensor:
    """``h = x [F_0; F_1; ...]^T``: x [M, K], F_i [r_i, K] of one dtype -> h [M, sum r_i] in x's dtype.

    With a seed each factor but the last ``probes`` sees x under its own dropout mask, scaled by ``keep_scale``.
    ``moments``: float64 [2, K], filled in the same pass with the sums of the columns of x and of their squares.
    """
    x, factors = unit_last(x), [unit_last(f) for f in factors]
    ranks = [f.shape[0] for f in factors]
    h = torch.empty(x.shape[0], sum(ranks), dtype=x.dtype, device=x.device)
    if moments is not None and x.numel() == 0:
        moments.zero_()
    if x.numel() == 0 or (moments is None and h.numel() == 0):
        return h.zero_()
    offsets = [sum(ranks[:i]) for i in range(len(ranks))]
    masked = 0 if seed is None else len(factors) - probes
    run([x], factors, h, offsets, [keep_scale], True, tiles, seed, masked, threshold, moments)
    return h


def shrink_backward(
    dy: Sequence[Tensor | None],
    B: Sequence[Tensor],
    offsets: Sequence[int],
    scales: Sequence[float],
    rank: int,
    tiles: TileConfig | None = None,
) -> Tensor:
    """``dh[:, o_i : o_i + r_i] = s_i dy_i B_i``: dy_i [M, N_i], B_i [N_i, r_i] -> dh [M, rank] in dy's dtype.

    Columns of a projection without dy are zero. At least one dy is given.
    """
    live = [i for i, b in enumerate(B) if dy[i] is not None and b.shape[1] > 0]
    some = next(g for g in dy if g is not None)
    make = torch.empty if sum(B[i].shape[1] for i in live) == rank else torch.zeros
    dh = make(some.shape[0], rank, dtype=some.dtype, device=some.device)
    if dh.numel() == 0 or not live:
        return dh
    wide, factors = [unit_last(dy[i]) for i in live], [unit_last(B[i]) for i in live]
    run(wide, factors, dh, [offsets[i] for i in live], [scales[i] for i in live], False, tiles)
    return dh
