"""Fixed-order sums of partial results, with scale and cast folded in: what replaces atomics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import find_tile, launch, pick
from .tiling import REDUCE_BLOCK


@triton.jit(do_not_specialize=["total", "parts"])
def reduce_kernel(p_partial, p_out, sizes, scales, total, parts, BLOCK: tl.constexpr):
    """``out_i = scale_i * sum_p partial[p, region i]``; regions lie one after another in each part."""
    i_region, o_first, o_region = find_tile(tl.program_id(0), sizes, BLOCK)
    o_element = o_first + tl.arange(0, BLOCK)
    m_element = o_element < pick(sizes, i_region)
    p_next = p_partial + o_region.to(tl.int64) + o_element
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for _ in tl.range(0, parts):
        b_sum += tl.load(p_next, mask=m_element, other=0.0)
        p_next += total
    b_sum *= pick(scales, i_region)
    for i in tl.static_range(len(p_out)):
        if i_region == i:
            tl.store(p_out[i] + o_element, b_sum.to(p_out[i].dtype.element_ty), mask=m_element)


def reduce_partials(partial: Tensor, outputs: Sequence[Tensor], scales: Sequence[float]) -> None:
    """Sum ``partial`` [parts, total] over parts into contiguous outputs, which together hold ``total`` elements."""
    kept = [(out, float(scale)) for out, scale in zip(outputs, scales, strict=True) if out.numel()]
    if not kept:
        return
    sizes = tuple(out.numel() for out, _ in kept)
    launch(
        reduce_kernel,
        (sum(triton.cdiv(size, REDUCE_BLOCK) for size in sizes),),
        partial,
        tuple(out for out, _ in kept),
        sizes,
        tuple(scale for _, scale in kept),
        partial.shape[1],
        partial.shape[0],
        BLOCK=REDUCE_BLOCK,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["count"])
def reduce_pairs_kernel(p_partial, p_out, count, BLOCK: tl.constexpr):
    """``out[run] = sum_i partial[run, i]`` for pairs, in float64."""
    i_run = tl.program_id(0)
    o_pair = tl.arange(0, 2)
    b_sum = tl.zeros((BLOCK, 2), tl.float64)
    for start in tl.range(0, count, BLOCK):
        o_item = start + tl.arange(0, BLOCK)
        o_element = (i_run.to(tl.int64) * count + o_item)[:, None] * 2 + o_pair[None, :]
        b_sum += tl.load(p_partial + o_element, mask=(o_item < count)[:, None], other=0.0).to(tl.float64)
    b_total = tl.sum(b_sum, axis=0)
    tl.store(p_out + i_run.to(tl.int64) * 2 + o_pair, b_total.to(p_out.dtype.element_ty))


def reduce_pairs(partial: Tensor) -> Tensor:
    """Sum of ``partial`` [runs, count, 2] over count: fp32 [runs, 2]."""
    out = torch.empty(partial.shape[0], 2, dtype=torch.float32, device=partial.device)
    launch(reduce_pairs_kernel, (partial.shape[0],), partial, out, partial.shape[1], BLOCK=256, num_warps=4)
    return out
