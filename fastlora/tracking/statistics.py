"""Running averages, exact values, covariances."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..nn.linear import Linear
from ..nn.probe import Contribution
from ..ops.backends import choose
from ..ops.reference import accumulate_dtype


class Averages:
    """``F ← β F + (1 - β) f`` of every statistic and matrix, or their plain mean (``ema=None``), with the steps behind.

    ``values`` and ``counts`` are the rows by kind, [matrices] in float64.
    """

    def __init__(self, kinds: Sequence[str], matrices: int, ema: float | None, device: torch.device):
        self.kinds, self.ema = tuple(kinds), ema
        self._means = torch.zeros(len(self.kinds), matrices, dtype=torch.float64, device=device)
        self._steps = torch.zeros_like(self._means)
        self._everything = torch.ones(matrices, dtype=torch.bool, device=device)

    @property
    def values(self) -> dict[str, Tensor]:
        return dict(zip(self.kinds, self._means, strict=True))

    @property
    def counts(self) -> dict[str, Tensor]:
        return dict(zip(self.kinds, self._steps, strict=True))

    def add(
        self,
        values: Mapping[str, Tensor],
        seen: Mapping[str, Tensor],
        finite: Tensor | None,
        drawn: Tensor | None = None,
    ) -> Tensor:
        """Take in a step where ``seen``, all or none: whether its numbers, and what ``finite`` stands for, are finite.

        No statistic is negative. Of the matrices' own, all but ``act_var``, only those that are ``drawn`` count.
        """
        value, there = torch.stack([values[kind] for kind in self.kinds]), None
        if any([seen[kind] is not self._everything for kind in self.kinds]):
            there = torch.stack([seen[kind] for kind in self.kinds])
            value = torch.where(there, value, 0.0)
        own = value.amax() < math.inf
        finite = own if finite is None else own & finite
        keep = finite if there is None else there & finite
        if drawn is not None:
            keep = keep & torch.stack([drawn | (kind == "act_var") for kind in self.kinds])
        self._steps += keep
        weight = 1.0 / self._steps.clamp(min=1) if self.ema is None else 1.0 - self.ema
        self._means += torch.where(keep, value, self._means).sub_(self._means).mul_(weight)
        return finite

    def corrected(self, kind: str) -> Tensor:
        """The averages of a kind, the start at zero divided out."""
        value, count = self.values[kind], self.counts[kind]
        return value / (1.0 - self.ema**count).clamp(min=1e-300) if self.ema is not None else value.clone()

    def placed(self, found: Tensor | None, there: Sequence[bool]) -> tuple[Tensor, Tensor]:
        """Numbers of the matrices that have one, zeros for the others, and which have: what ``add`` takes of a kind."""
        if all(there):
            return found, self._everything
        seen = torch.tensor(there).to(self._means.device, non_blocking=True)
        values = torch.zeros_like(self._means[0])
        return (values if found is None else values.masked_scatter_(seen, found)), seen


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


COVARIANCES = ("act_cov", "grad_cov")
_BLOCK = 256


def add_gram_(total: Tensor, rows: Tensor, weight: Tensor) -> None:
    """``total += weight · rows^T rows`` on and above the diagonal, block by block: half of the full product.

    total [D, D], rows [M, D], weight a scalar tensor; a weight of 0 adds nothing, whatever the rows hold.
    """
    rows = rows.to(total.dtype)
    for start in range(0, rows.shape[1], _BLOCK):
        stop = min(start + _BLOCK, rows.shape[1])
        block = rows[:, start:stop].T @ rows[:, start:]
        total[start:stop, start:] += torch.where(weight == 0, 0.0, weight * block)


class Covariances:
    """``act_cov = x^T x / M`` [K, K] and ``grad_cov = dy^T dy / M`` [N, N] by layer, M counted over all steps.

    Source: Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature" (ICML 2015).
    """

    def __init__(self, kinds: Sequence[str]):
        self.kinds = tuple(kinds)
        self._sums: dict[str, dict[str, Tensor]] = {kind: {} for kind in self.kinds}
        self._rows: dict[str, Tensor] = {}

    def finite(self, taken: Mapping[str, Sequence[Contribution]], device: torch.device) -> Tensor:
        """Whether everything that was taken is finite: a boolean tensor, true when nothing was."""
        found = torch.ones((), dtype=torch.bool, device=device)
        for calls in taken.values():
            for call in calls:
                found &= (call.x.isfinite().all() & call.dy.isfinite().all()).to(device)
        return found

    def add(
        self,
        taken: Mapping[str, Sequence[Contribution]],
        keep: Tensor,
        inverse_scale: Tensor,
        backends: Mapping[str, str] | None = None,
    ) -> None:
        """Take in one step's calls by layer; ``keep`` is a boolean tensor that leaves the step out when false.

        ``backends``: name of each layer's backend, whose own symmetric product is used where it has one ("auto"
        without). Sums are allocated before any is changed.
        """
        for path, calls in taken.items():
            for call in calls[:1]:
                self._allocate(path, call)
        for path, calls in taken.items():
            for call in calls:
                x, dy = call.x.reshape(-1, call.x.shape[-1]), call.dy.reshape(-1, call.dy.shape[-1])
                backend, _ = choose((backends or {}).get(path, "auto"), x.device, x.dtype)
                acc, update = accumulate_dtype(x.dtype), getattr(backend, "add_gram_", add_gram_)
                for kind, rows, weight in (("act_cov", x, keep), ("grad_cov", dy, keep * inverse_scale.square())):
                    if kind in self._sums:
                        update(self._sums[kind][path], rows, weight.to(x.device, acc))
                self._rows[path] += keep.to(x.device, torch.float64) * x.shape[0]

    def _allocate(self, path: str, call: Contribution) -> None:
        x = call.x
        self.reserve(path, x.shape[-1], call.dy.shape[-1], accumulate_dtype(x.dtype), x.device)

    def reserve(self, path: str, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device) -> None:
        """Zeros where a layer has no sums yet."""
        for kind, width in (("act_cov", in_features), ("grad_cov", out_features)):
            if kind in self._sums and path not in self._sums[kind]:
                self._sums[kind][path] = torch.zeros(width, width, dtype=dtype, device=device)
        if path not in self._rows:
            self._rows[path] = torch.zeros((), dtype=torch.float64, device=device)

    def tensors(self) -> list[Tensor]:
        """The sums and the numbers of rows themselves."""
        return [*[total for sums in self._sums.values() for total in sums.values()], *self._rows.values()]

    def absorb(self, other: Covariances) -> None:
        """Take over the sums of another, of the same kinds."""
        for mine, theirs in (*((self._sums[k], other._sums[k]) for k in self.kinds), (self._rows, other._rows)):
            for path, total in theirs.items():
                mine[path] = mine[path] + total if path in mine else total

    def read(self, kind: str) -> dict[str, Tensor]:
        """Module path -> symmetric matrix."""
        return {
            path: (total.triu() + total.triu(1).T) / self._rows[path].to(total.dtype)
            for path, total in self._sums[kind].items()
        }

    def state_dict(self) -> dict[str, object]:
        return {
            "sums": {kind: {path: s.clone() for path, s in sums.items()} for kind, sums in self._sums.items()},
            "rows": {path: rows.clone() for path, rows in self._rows.items()},
        }

    def load_state_dict(self, state: Mapping) -> None:
        self._sums = {kind: {path: s.clone() for path, s in state["sums"][kind].items()} for kind in self.kinds}
        self._rows = {path: rows.clone() for path, rows in state["rows"].items()}


def as_one_batch(taken: list[Contribution]) -> tuple[Tensor, Tensor, list[int]]:
    """Every row of every call: their sum is one gradient."""
    x = torch.cat([c.x.reshape(-1, c.x.shape[-1]) for c in taken])
    dy = torch.cat([c.dy.reshape(-1, c.dy.shape[-1]).to(x.dtype) for c in taken])
    return x, dy, [0, x.shape[0]]


def by_sample(taken: list[Contribution]) -> tuple[Tensor, Tensor, list[int]]:
    """Calls of one micro-batch side by side, so that a sample's rows from all calls are one run."""
    samples = taken[0].x.shape[0] if taken[0].x.dim() > 1 else 1
    for c in taken:
        if c.x.dim() > 1 and c.x.shape[0] != samples:
            raise RuntimeError(f"fisher: calls of one layer saw {samples} and {c.x.shape[0]} samples in dimension 0")
    tokens = [c.x.shape[1:-1].numel() for c in taken]
    x = torch.cat([c.x.reshape(samples, t, c.x.shape[-1]) for c, t in zip(taken, tokens, strict=True)], dim=1)
    dy = torch.cat([c.dy.reshape(samples, t, c.dy.shape[-1]) for c, t in zip(taken, tokens, strict=True)], dim=1)
    return x.flatten(0, 1), dy.flatten(0, 1).to(x.dtype), [sum(tokens) * i for i in range(samples + 1)]
