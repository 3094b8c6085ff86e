"""A few launches over all layers: norms, variances, resizing, random signs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._utils.torch_compat import norm_of_each
from . import native, reference
from .backends import triton

_FACTORS = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (Tensor, torch.nn.Parameter)
_SIGNS = torch.ops.fastlora.philox_signs_.default if native.available() else None


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


def fold_samples(averages: Sequence[Tensor], Q: Sequence[Tensor], V: Sequence[Tensor], *rest) -> bool:
    """Fold samples into ``averages``, (means, steps, skipped), in one call as ``csrc/library.cpp`` says, if it can."""
    if unsupported_reason("fold_samples_", [*averages[:1], *Q, *V], (torch.float32, torch.float64)) is not None:
        return False
    torch.ops.fastlora.fold_samples_(*averages, Q, V, *rest)
    return True


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
    """The ±1 of groups of counters: 128 of ``philox(seed, (i, step, first + g, tag))``, i < counts[g]."""

    def __init__(self, counts: Sequence[int], tag: int, first: int = 0):
        self.counts, self.tag, self.first = list(counts), tag, first
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def fill_(self, out: Tensor, seed: Tensor, step: int) -> Tensor:
        """Write them into ``out`` float32 [128 Σ counts], group after group; nothing is read back from a device."""
        if native.has_kernel("philox_signs_", out.device):
            _SIGNS(out, seed, step, self.first, self.tag, self.counts)
            return out
        block, group = self._counters(out.device)
        if triton.unsupported_reason(out.device, out.dtype) is None:
            return triton.signs_(out, seed, step, block, group, self.tag)
        steps, tags = (torch.full_like(block, value) for value in (step, self.tag))
        return out.copy_(reference.signs_of(seed, block, steps, group, tags))

    def _counters(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The first and third counter word of every block of 128 signs: its number in the group, and the group."""
        if device not in self._on:
            blocks = [torch.arange(count, device=device) for count in self.counts]
            groups = [torch.full_like(block, self.first + g) for g, block in enumerate(blocks)]
            self._on[device] = torch.cat(blocks), torch.cat(groups)
        return self._on[device]
