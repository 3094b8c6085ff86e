"""Statistics of a step over data-parallel ranks: one all-reduce, before anything is squared."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .._utils.distributed import ProcessGroupInfo, ranks_of, several_processes
from ..nn.linear import Linear
from ..nn.probe import Contribution
from ..ops.layout import moved
from ..ops.reference import accumulate_dtype
from .statistics import Covariances, Tracked, all_finite, as_one_batch, moments_there

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shared:
    """What a step's reduction found, beside the leaves whose gradients it replaced."""

    ranks: ProcessGroupInfo
    present: Mapping[str, Tensor]  # kind -> whether some rank has it: a boolean a matrix
    finite: Tensor  # whether what covariances are made of is finite everywhere
    samples: Tensor  # of all ranks, under ``fisher`` with probes; a float64 scalar
    exact: Sequence[Mapping[str, Tensor]] | None  # values of each matrix under the exact estimator

    def finish(self, values: dict[str, Tensor], loss_reduction: str) -> dict[str, Tensor]:
        """With probes, ``fisher`` of the samples of all ranks."""
        if "fisher" in values and self.exact is None:
            values["fisher"] = values["fisher"] * sample_factor(loss_reduction, self.samples, self.ranks)
        return values


class Reduction:
    r"""Makes the gradients of a tracker's leaves those of the global batch.

    .. math:: Q = \frac{1}{D} \sum_r Q_r,\qquad \text{grad\_sq} = \lVert Q \rVert_F^2 / k

    D is what data-parallel training divides gradients by (the number of ranks). Q is linear in the gradient, squared
    norms are not: their mean would be the noise of the ranks, too. Sums and counts of ``act_var``, norms of the columns
    of x, numbers of samples and flags of what is there are added. The exact estimator adds each matrix's G_W [N, K] and
    the covariances of each layer by a further all-reduce.
    """

    def __init__(self, model: nn.Module, process_group: Any):
        self.ranks = ranks_of(model, process_group)
        self._agreed = False
        self.searching = self.ranks is None and process_group == "auto"

    def search(self, model: nn.Module) -> bool:
        """Before a forward of the first step: whether ranks appear, for the wrapper may have come after the tracker."""
        self.ranks = ranks_of(model)
        self.searching = self.ranks is None
        return self.ranks is not None

    def place(self) -> tuple[int, int]:
        """This rank and the number of ranks."""
        return (0, 1) if self.ranks is None else (self.ranks.rank, self.ranks.size)

    def restart(self) -> None:
        """The tracker took up another state: ranks have to agree again."""
        self._agreed = False

    def run(self, tracked: Tracked, samples: int | Tensor, agreement: Callable[[], Mapping[str, int]]) -> Shared | None:
        """Reduce a step; None where one process trains alone. A collective: every rank calls ``tracker.step()``.

        ``samples``: this rank's of the step. ``agreement``: numbers that must be the same everywhere; ``ValueError`` on
        every rank names those that differ.
        """
        if self.searching:
            self.searching = False
            if several_processes():
                logger.warning(
                    "track: this process's statistics alone: %d processes run, and the model is neither wrapped by DDP "
                    "nor sharded by fully_shard; give track a process_group, or None if that is meant",
                    torch.distributed.get_world_size(),
                )
        if self.ranks is None:
            return None
        if not self._agreed:
            _agree(agreement(), self.ranks, tracked.device)
            self._agreed = True
        return _Step(tracked, self.ranks).reduce(samples)

    def add_covariances(
        self,
        tracked: Tracked,
        total: Covariances,
        taken: Mapping[str, Sequence[Contribution]],
        keep: Tensor,
        inverse: Tensor,
    ) -> None:
        """Add the ranks' sums of one step to ``total``, layer by layer."""
        for path, calls in taken.items():
            layer, step = tracked.layers[path], Covariances(total.kinds)
            dtype = accumulate_dtype(layer.weight.dtype)
            step.reserve(path, layer.in_features, layer.out_features, dtype, layer.weight.device)
            step.add({path: calls}, keep, inverse / self.ranks.divisor, {path: layer.backend})
            for tensor in step.tensors():
                self.ranks.sum_(tensor)
            total.absorb(step)


class _Step:
    """One step's numbers on their way into one flat tensor and back."""

    def __init__(self, tracked: Tracked, ranks: ProcessGroupInfo):
        self.tracked, self.ranks, self.device = tracked, ranks, tracked.device
        self.probes = tracked.probes
        self.exact = tracked.weight_kinds if tracked.estimator == "exact" else ()

    def reduce(self, samples: int | Tensor) -> Shared:
        probes = self.probes
        Z: dict[Any, Tensor] = {(path, name): z for path, probe in probes.items() for name, z in probe.Z.items()}
        V: dict[Any, Tensor] = {path: probe.V for path, probe in probes.items() if probe.V is not None}
        measured = {path: probe for path, probe in probes.items() if probe.step.refreshes_norms}
        norms = {("norms", path, name): leaf for path, p in measured.items() for name, leaf in p.norms.items()}
        sums = self._counts(samples) | {key: _gradient(leaf) for key, leaf in (V | norms).items()}
        total = _summed(sums, {key: _gradient(leaf) for key, leaf in Z.items()}, self.ranks, self.device)
        for key, leaf in (Z | V | norms).items():
            leaf.grad = total[key].to(leaf.device, leaf.dtype)
        here = total["here"].view(2, -1) > 0
        present = {kind: here[int(kind == "act_var")] for kind in self.tracked.kinds}
        exact = self._exact_values(total) if self.exact else None
        return Shared(self.ranks, present, total["bad"] == 0, total["samples"].double(), exact)

    def _counts(self, samples: int | Tensor) -> dict[Any, Tensor]:
        """What is there of weights and of moments, whether it is finite; squares of samples and their numbers."""
        tracked, weights, moments = self.tracked, [], []
        for path, name in tracked.matrices:
            probe = self.probes[path]
            weights.append(bool(probe.taken) or (name in probe.Z and probe.Z[name].grad is not None))
        for path, probe in self.probes.items():
            moments += moments_there(None if probe.V is None else probe.V.grad, tracked.layers[path])
        taken = tracked.taken() if tracked.covariances else {}
        parts = {
            "here": torch.tensor([*weights, *moments], device="cpu"),
            "bad": ~all_finite(taken, self.device),
            "samples": torch.as_tensor(samples, device=getattr(samples, "device", "cpu")),
        }
        if "fisher" in self.exact:
            found = tracked.sample_squares().values()
            parts["squares"] = torch.stack([square.to(self.device) for square, _ in found])
            parts["numbers"] = torch.tensor([number for _, number in found], device="cpu")
        return parts

    def _exact_values(self, total: Mapping[Any, Tensor]) -> list[dict[str, Tensor]]:
        values: list[dict[str, Tensor]] = [{} for _ in self.tracked.matrices]
        if "fisher" in self.exact:
            samples = total["numbers"].double()
            factors = sample_factor(self.tracked.loss_reduction, samples, self.ranks, averaged=False)
            for value, square, factor in zip(values, total["squares"].double(), factors, strict=True):
                value["fisher"] = square * factor
        if not {"grad_sq", "grad_abs"} & set(self.exact):
            return values
        gradients = {path: self._gradient(self.tracked.layers[path], p.taken) for path, p in self.probes.items()}
        for value, (path, name) in zip(values, self.tracked.matrices, strict=True):
            value["grad_sq"], value["grad_abs"] = gradients[path][name]
        return values

    def _gradient(self, layer: Linear, taken: list[Contribution]) -> dict[str, tuple[Tensor, Tensor]]:
        """``||G||^2`` and ``sum |G|`` of each slice of G_W, which is there as a whole for this one layer."""
        dtype = accumulate_dtype(layer.weight.dtype)
        gradient = torch.zeros(layer.out_features, layer.in_features, dtype=dtype, device=layer.weight.device)
        for part in dict.fromkeys(call.part for call in taken):
            x, dy, _ = as_one_batch([call for call in taken if call.part == part])
            rows = slice(None) if part is None else layer.slices.rows(part)
            gradient[rows] += dy.to(dtype).T @ x.to(dtype)
        self.ranks.sum_(gradient).div_(self.ranks.divisor)
        parts = {name: gradient[layer.slices.rows(name)].double() for name in layer.slices}
        return {name: (part.square().sum(), part.abs().sum()) for name, part in parts.items()}


def sample_factor(loss_reduction: str, samples: Tensor, ranks: ProcessGroupInfo, averaged: bool = True) -> Tensor:
    r"""What makes ``fisher`` of a sum of squares over the ranks' samples.

    .. math:: \text{mean: } \frac{n}{W^2} \sum_i \lVert G_i \rVert^2,\qquad
              \text{sum: } \frac{1}{n} \sum_i \lVert G_i \rVert^2

    n samples on W ranks, G_i as backpropagated on its rank; ``averaged``: squares of what was divided by D are given.
    """
    undone = ranks.divisor**2 if averaged else 1.0
    if loss_reduction == "mean":
        return samples * (undone / ranks.size**2)
    return undone / samples.clamp(min=1)


def averaged(
    gradients: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], ranks: ProcessGroupInfo, device: torch.device
) -> dict[str, Tensor]:
    """Gradients by name, averaged over the ranks by one all-reduce; one that no rank has is left out.

    Reads back which are there. Gradients that are the same on all ranks, as DDP leaves them, stay what they are.
    """
    there = torch.tensor([name in gradients for name in shapes], device="cpu")
    every = {
        name: gradients[name] if name in gradients else torch.zeros(shape, dtype=torch.float32, device=device)
        for name, shape in shapes.items()
    }
    total = _summed({"": there}, every, replace(ranks, divisor=float(ranks.size)), device)
    return {name: total[name] for name, flag in zip(shapes, total[""].tolist(), strict=True) if flag}


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _summed(
    sums: Mapping[Any, Tensor], gradients: Mapping[Any, Tensor], ranks: ProcessGroupInfo, device: torch.device
) -> dict[Any, Tensor]:
    """Sums over the ranks, and gradients as they are averaged, by one all-reduce in the widest of the dtypes."""
    parts = {**sums, **gradients}
    dtype = functools.reduce(torch.promote_types, (part.dtype for part in parts.values()), torch.float32)
    # Without waiting for a GPU: a plain copy from the host would.
    flat = torch.cat([moved(part.reshape(-1), device, dtype) for part in parts.values()])
    ranks.sum_(flat)[sum(part.numel() for part in sums.values()) :] /= ranks.divisor
    split = flat.split([part.numel() for part in parts.values()])
    return {key: piece.view(part.shape) for (key, part), piece in zip(parts.items(), split, strict=True)}


def _agree(own: Mapping[str, int], ranks: ProcessGroupInfo, device: torch.device) -> None:
    """The numbers are the same everywhere, or ``ValueError`` on every rank with what differs."""
    values = torch.tensor(list(own.values()), dtype=torch.int64, device=device)
    low, high = ranks.min(torch.stack([values, -values]))
    differing = [name for name, a, b in zip(own, low.tolist(), (-high).tolist(), strict=True) if a != b]
    if differing:
        here = ", ".join(f"{name} {own[name]}" for name in differing)
        raise ValueError(f"track: {', '.join(differing)} differ between the data-parallel ranks; here: {here}")
