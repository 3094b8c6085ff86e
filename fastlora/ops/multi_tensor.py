"""A few launches over all layers: norms, variances, resizing, random signs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._utils.torch_compat import norm_of_each
from . import native, reference
from .backends import triton
from .node import NODE

_FACTORS = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (Tensor, torch.nn.Parameter)
# Whether the node can do on a CPU what a tracker does at every step, without the dispatcher.
_AT_ONCE = NODE is not None and native.available() and NODE.open_samples(torch.ops.fastlora.sample_calls())


def unsupported_reason(
    operator: str, tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype] = _FACTORS
) -> str | None:
    """Why a native operator cannot take these tensors, or None."""
    if not native.available():
        return f"the native library is not there: {native.reason()}"
    if torch.compiler.is_compiling():
        return "torch.compile traces the formula"
    device = tensors[0].device
    for tensor in tensors:
        if type(tensor) not in _PLAIN:
            return f"its kernels take plain tensors, not {type(tensor).__name__}"
        if tensor.device != device:
            return f"one launch takes one device, the matrices are on {device} and {tensor.device}"
        if tensor.dtype not in dtypes:
            shown = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            return f"its kernels take {shown}, not {str(tensor.dtype).removeprefix('torch.')}"
    return None if native.has_kernel(operator, device) else f"it has no kernel for {device.type}"


def squared_norms(tensors: Sequence[Tensor], factor: float | Tensor = 1.0) -> Tensor:
    """``factor ||t||^2`` of one tensor or more, float64 [tensors]; two launches at most in a native operator."""
    if unsupported_reason("squared_norms", tensors, (*_FACTORS, torch.float64)) is None:
        return torch.ops.fastlora.squared_norms(tensors).mul_(factor)
    device = tensors[0].device
    norms = torch.stack([norm.to(device) for norm in norm_of_each(tensors, 2)])
    return norms.double().square().mul_(factor)


def output_variances(sums: Sequence[Tensor], sizes: Sequence[Sequence[int]]) -> Tensor:
    """``sum_o max(0, E y_o^2 - (E y_o)^2)`` over each run of columns of one layer or more, float64 [runs].

    ``sums``: [sum y; sum y^2] of a layer with the number of rows in the last column; ``sizes``: its runs of columns.
    A fixed number of launches, one where a native operator takes the tensors.
    """
    flat_sizes = [size for runs in sizes for size in runs]
    if unsupported_reason("output_variances", sums, (torch.float64,)) is None:
        return torch.ops.fastlora.output_variances(sums, [len(runs) for runs in sizes], flat_sizes)
    device = sums[0].device
    live = [given.to(device) for given in sums]
    flat = torch.cat([given[:, :-1] for given in live], dim=1)
    mean, square = flat / torch.cat([given[0, -1:].expand(given.shape[1] - 1) for given in live])
    # Nothing is negative here, so that the 1-norm is the sum.
    parts = (square - mean.square()).clamp_(min=0).split(flat_sizes)
    return torch.stack(norm_of_each(parts, 1))


def averages_of_leaves(averages: Sequence[Tensor], leaves: Sequence[Tensor], *rest) -> Any:
    """Its ``fold(factor, weight, n)`` takes the gradients of leaves, folds them into ``averages`` (means, steps,
    skipped) as ``csrc/sample.h`` says, and returns true; it returns false, and has done nothing, where one has none.

    None where there is no such call. ``rest``: how many leaves are Z, runs, sizes, whether the first kind is that of Z.
    """
    plain = all([leaf.device.type == "cpu" and leaf.dtype in (torch.float32, torch.float64) for leaf in leaves])
    return NODE.Averages(*averages, leaves, *rest) if _AT_ONCE and plain and leaves else None


def copy_overlap_(to: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    """``to_i = source_i`` where both have the row and the column, else 0; only one of the two sizes may differ."""
    every = [*to, *source]
    if every and unsupported_reason("resize_ranks_", every, (*_FACTORS, torch.float64)) is None:
        torch.ops.fastlora.resize_ranks_(to, source)
        return
    for mine, old in zip(to, source, strict=True):
        rows, columns = (min(a, b) for a, b in zip(mine.shape, old.shape, strict=True))
        mine.zero_()
        mine[:rows, :columns] = old[:rows, :columns]


class Signs:
    """The ±1 of groups of counters: 128 of ``philox(seed, (i, step, first + g, tag))``, i < counts[g].

    ``fill_(out, seed, step)`` writes them into ``out`` float32 [128 Σ counts], group after group; nothing is read back
    from a device.
    """

    def __init__(self, counts: Sequence[int], tag: int, device: torch.device, first: int = 0):
        if _AT_ONCE and device.type == "cpu":
            self.fill_ = functools.partial(NODE.write_signs, first, tag, list(counts))
        elif native.has_kernel("philox_signs_", device):
            self.fill_ = functools.partial(_native_signs_, first, tag, list(counts))
        else:
            blocks = [torch.arange(count, device=device) for count in counts]
            groups = [torch.full_like(block, first + g) for g, block in enumerate(blocks)]
            self.fill_ = functools.partial(_signs_, torch.cat(blocks), torch.cat(groups), tag)


def _native_signs_(first: int, tag: int, counts: list[int], out: Tensor, seed: Tensor, step: int) -> None:
    torch.ops.fastlora.philox_signs_(out, seed, step, first, tag, counts)


def _signs_(block: Tensor, group: Tensor, tag: int, out: Tensor, seed: Tensor, step: int) -> None:
    """Of blocks of 128 by the first and third counter word of each: its number in the group, and the group."""
    if triton.unsupported_reason(out.device, out.dtype) is None:
        triton.signs_(out, seed, step, block, group, tag)
        return
    steps, tags = (torch.full_like(block, value) for value in (step, tag))
    out.copy_(reference.signs_of(seed, block, steps, group, tags))
