"""Random signs of many groups in one launch, on every kind of device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import native, reference, triton_backend


class Signs:
    """The ±1 of groups of counters: 128 of ``philox(seed, (i, step, first + g, tag))``, i < counts[g]."""

    def __init__(self, counts: Sequence[int], tag: int, first: int = 0):
        self.counts, self.tag, self.first = list(counts), tag, first
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def fill_(self, out: Tensor, seed: Tensor, step: int) -> Tensor:
        """Write them into ``out`` float32 [128 Σ counts], group after group; nothing is read back from a device."""
        if native.has_kernel("philox_signs_", out.device):
            torch.ops.fastlora.philox_signs_.default(out, seed, step, self.first, self.tag, self.counts)
            return out
        block, group = self._counters(out.device)
        if triton_backend.unsupported_reason(out.device, out.dtype) is None:
            return triton_backend.signs_(out, seed, step, block, group, self.tag)
        steps, tags = (torch.full_like(block, value) for value in (step, self.tag))
        return out.copy_(reference.signs_of(seed, block, steps, group, tags))

    def _counters(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The first and third counter word of every block of 128 signs: its number in the group, and the group."""
        if device not in self._on:
            blocks = [torch.arange(count, device=device) for count in self.counts]
            groups = [torch.full_like(block, self.first + g) for g, block in enumerate(blocks)]
            self._on[device] = torch.cat(blocks), torch.cat(groups)
        return self._on[device]
