"""Statistics of one matrix from the x and dy that the exact estimator kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backends import choose
from .nn.linear import Linear
from .probes import as_one_batch, by_sample


def exact_values(tracker: Any, layer: Linear, name: str, kinds: Sequence[str]) -> dict[str, Tensor]:
    """This step's value of each of ``kinds``, or none where no backward ran through the layer."""
    taken = layer.probes[tracker.adapter].taken
    if not taken:
        return {}
    backend, _ = choose(layer.backend, layer.weight.device, taken[0].x.dtype)
    rows, found = layer.slice_rows(name), {}
    if set(kinds) & {"grad_sq", "grad_abs"}:
        x, dy, offsets = as_one_batch(taken)
        both = backend.gradstat(x, dy[:, rows], offsets, absolute="grad_abs" in kinds)
        found["grad_sq"], found["grad_abs"] = both[0]
    if "fisher" in kinds:
        total, samples = sample_squares(tracker, layer, name)
        found["fisher"] = total * tracker._sample_factor(samples)
    return found


def sample_squares(tracker: Any, layer: Linear, name: str) -> tuple[Tensor, int]:
    """``Σ_i ||G_i||²`` over the samples that were taken, and their number."""
    taken, rows = layer.probes[tracker.adapter].taken, layer.slice_rows(name)
    total, samples = torch.zeros((), dtype=torch.float64, device=layer.weight.device), 0
    for micro in sorted({c.micro for c in taken}):
        x, dy, offsets = by_sample([c for c in taken if c.micro == micro])
        backend, _ = choose(layer.backend, x.device, x.dtype)
        total += backend.gradstat(x, dy[:, rows], offsets, absolute=False)[:, 0].double().sum()
        samples += len(offsets) - 1
    return total, samples
