"""Signs: the random ±1 of the probes of all layers, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .primitives import launch
from .tiling import SIGNS_BLOCK


@triton.jit(do_not_specialize=["step", "tag", "count"])
def signs_kernel(p_out, p_seed, p_block, p_group, step, tag, count, BLOCK: tl.constexpr):
    """Bit b of word w of counter i is the sign of ``out[128 i + 32 w + b]``: 1 - 2 bit, as ``reference.signs``."""
    o_counter = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_counter = o_counter < count
    c0 = tl.load(p_block + o_counter, mask=m_counter, other=0).to(tl.uint32)
    c2 = tl.load(p_group + o_counter, mask=m_counter, other=0).to(tl.uint32)
    c1 = tl.zeros_like(c0) + step.to(tl.uint32)
    c3 = tl.zeros_like(c0) + tag.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(p_seed), c0, c1, c2, c3)
    words = (w0, w1, w2, w3)
    o_bit = tl.arange(0, 32)
    p_first = p_out + o_counter.to(tl.int64)[:, None] * 128 + o_bit[None, :]
    for w in tl.static_range(4):
        bits = (words[w][:, None] >> o_bit.to(tl.uint32)[None, :]) & 1
        tl.store(p_first + 32 * w, 1.0 - 2.0 * bits.to(tl.float32), mask=m_counter[:, None])


def signs_(out: Tensor, seed: Tensor, step: int, block: Tensor, group: Tensor, tag: int) -> Tensor:
    """Fill ``out`` float32 [128 C] with the signs of the counters (block_i, step, group_i, tag), i < C."""
    count = block.numel()
    if count:
        grid = (triton.cdiv(count, SIGNS_BLOCK),)
        launch(signs_kernel, grid, out, seed, block, group, step, tag, count, BLOCK=SIGNS_BLOCK, num_warps=4)
    return out
