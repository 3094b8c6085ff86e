"""Shrink: h = x [A; P]^T for all ranks of a group in one pass over x, and dh = s dy B, block-diagonal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import (
    aligned,
    block_rank,
    clear,
    even,
    keep_mask,
    launch,
    opaque,
    pick,
    precision,
    stacked_rows,
    unit_last,
)
from .reduce import reduce_partials
from .tiling import TileConfig, choose_split, choose_tiles


@triton.jit(do_not_specialize=["M", "threshold"])
def shrink_kernel(
    p_x, p_factors, p_out, p_seed, widths, strides_x, strides_factor, offsets, ends, scales,
    M, total, threshold,
    SHARED: tl.constexpr, MASKED: tl.constexpr, EVEN_R: tl.constexpr, ALIGNED: tl.constexpr, EVEN_K: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """SHARED: one x and all factors stacked, rows of the first MASKED factors see their own dropout of x.

    Else factor i multiplies its own x_i, scaled by scales[i]. ``total`` is the number of columns of h.
    """
    i_split = tl.program_id(2)
    stride_out = clear(total[0], EVEN_R)
    i_entry = 0 if SHARED else tl.program_id(1) // BLOCKS
    o_block = (tl.program_id(1) % BLOCKS) * BLOCK_R
    if SHARED:
        o_rank = o_block + tl.arange(0, BLOCK_R)
        m_rank = o_rank < stride_out
        p_rows = stacked_rows(p_factors, offsets, strides_factor, o_rank, ALIGNED)
        stride_depth = 1
    else:
        o_own = o_block + tl.arange(0, BLOCK_R)
        o_rank = clear(pick(offsets, i_entry), EVEN_R) + o_own
        m_rank = o_rank < clear(pick(ends, i_entry), EVEN_R)
        p_rows = pick(p_factors, i_entry) + o_own
        stride_depth = clear(pick(strides_factor, i_entry), EVEN_R)
    K = pick(widths, i_entry)
    part = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT) * BLOCK_K
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M
    p_rows_x = pick(p_x, i_entry) + o_m.to(tl.int64)[:, None] * pick(strides_x, i_entry)
    b_acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if MASKED > 0:
        seed = tl.load(p_seed)
    for k in tl.range(i_split * part, tl.minimum(K, (i_split + 1) * part), BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        m_x, m_f = m_m[:, None], m_rank[None, :]
        if not EVEN_K:
            m_x, m_f = m_x & (o_k < K)[None, :], m_f & (o_k < K)[:, None]
        b_x = tl.load(p_rows_x + o_k[None, :], mask=m_x, other=0.0)
        b_f = tl.load(p_rows[None, :] + o_k[:, None].to(tl.int64) * stride_depth, mask=m_f, other=0.0).to(b_x.dtype)
        if MASKED > 0:
            for i in tl.static_range(MASKED):
                m_own = (o_rank >= clear(offsets[i])) & (o_rank < clear(ends[i]))
                m_keep = keep_mask(seed, i, o_m, k, threshold, BLOCK_K)
                b_acc = tl.dot(
                    tl.where(m_keep, b_x, 0.0), tl.where(m_own[None, :], b_f, 0.0), b_acc, input_precision=PRECISION
                )
            b_f = tl.where((o_rank >= clear(ends[MASKED - 1]))[None, :], b_f, 0.0)
        b_acc = tl.dot(b_x, b_f, b_acc, input_precision=PRECISION)
    if MASKED > 0:
        b_acc *= tl.where(o_rank < clear(ends[MASKED - 1]), scales[0], 1.0)[None, :]
    elif not SHARED:
        b_acc *= pick(scales, i_entry)
    p_tile = p_out + (i_split.to(tl.int64) * M + o_m)[:, None] * stride_out + o_rank[None, :]
    tl.store(p_tile, b_acc.to(p_out.dtype.element_ty), mask=m_m[:, None] & m_rank[None, :])


def _run(x, factors, out, seed, offsets, scales, shared, masked, threshold, tiles):
    """Launch over ``x`` (one a factor, or one for all) and finish a split sum into ``out`` [M, R]."""
    M, total = out.shape
    strides = tuple(f.stride(0) for f in factors)
    ranks = [f.shape[0] if shared else f.shape[1] for f in factors]
    widths = tuple(t.shape[1] for t in x)
    tiles = tiles or choose_tiles("shrink_dropout" if masked else "shrink", M, 0, max(widths), total, x[0].dtype)
    widest = total if shared else max(ranks)
    block = block_rank(widest)
    blocks = triton.cdiv(widest, block)
    grid = (triton.cdiv(M, tiles.rows), blocks * len(x))
    # Columns that no factor covers keep the caller's zeros, so they may not pass through a sum of partials.
    covered = sum(ranks) == total
    split = choose_split(grid[0] * grid[1], triton.cdiv(min(widths), tiles.depth)) if covered else 1
    target = out if split == 1 else torch.empty(split, M, total, dtype=torch.float32, device=out.device)
    launch(
        shrink_kernel,
        (*grid, split),
        tuple(x),
        tuple(factors),
        target,
        seed if masked else x[0],
        widths,
        tuple(t.stride(0) for t in x),
        strides if shared else opaque(strides),
        opaque(offsets),
        opaque([o + r for o, r in zip(offsets, ranks, strict=True)]),
        tuple(float(s) for s in scales),
        M,
        opaque([total]),
        threshold,
        SHARED=shared,
        MASKED=masked,
        EVEN_R=even([total], offsets, ranks) and (shared or even(strides)),
        ALIGNED=shared and aligned(factors),
        EVEN_K=all(width % tiles.depth == 0 for width in widths),
        SPLIT=split,
        BLOCKS=blocks,
        BLOCK_M=tiles.rows,
        BLOCK_K=tiles.depth,
        BLOCK_R=block,
        PRECISION=precision(x[0].dtype),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    if split > 1:
        reduce_partials(target.view(split, -1), [out], [1.0])


def shrink(
    x: Tensor,
    factors: Sequence[Tensor],
    probes: int = 0,
    seed: Tensor | None = None,
    threshold: int = 0,
    keep_scale: float = 1.0,
    tiles: TileConfig | None = None,
) -> Tensor:
    """``h = x [F_0; F_1; ...]^T``: x [M, K], F_i [r_i, K] of one dtype -> h [M, sum r_i] in x's dtype.

    With a seed each factor but the last ``probes`` sees x under its own dropout mask, scaled by ``keep_scale``.
    """
    x, factors = unit_last(x), [unit_last(f) for f in factors]
    ranks = [f.shape[0] for f in factors]
    h = torch.empty(x.shape[0], sum(ranks), dtype=x.dtype, device=x.device)
    if h.numel() == 0:
        return h
    offsets = [sum(ranks[:i]) for i in range(len(ranks))]
    masked = 0 if seed is None else len(factors) - probes
    _run([x], factors, h, seed, offsets, [keep_scale], True, masked, threshold, tiles)
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
    _run(wide, factors, dh, None, [offsets[i] for i in live], [scales[i] for i in live], False, 0, 0, tiles)
    return dh
