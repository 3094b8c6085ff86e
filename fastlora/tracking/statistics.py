"""Running averages, exact values, covariances."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._utils.errors import wrong_value
from ..nn.linear import Linear, matrix_key
from ..nn.probe import Contribution, LayerProbe
from ..ops.backends import choose
from ..ops.layout import moved, on_host
from ..ops.multi_tensor import averages_of_leaves, output_variances
from ..ops.reference import accumulate_dtype


@dataclass(frozen=True)
class Tracked:
    """What a tracker follows: the layers of one adapter, their matrices, and the statistics taken of them."""

    layers: Mapping[str, Linear]
    probes: Mapping[str, LayerProbe]  # of each layer
    estimator: str
    kinds: tuple[str, ...]  # one number a matrix
    covariances: tuple[str, ...]  # one matrix a layer
    loss_reduction: str

    @functools.cached_property
    def matrices(self) -> list[tuple[str, str]]:
        """(path, slice) of every matrix."""
        return [(path, name) for path, layer in self.layers.items() for name in layer.slices]

    @functools.cached_property
    def keys(self) -> list[str]:
        return [matrix_key(path, name) for path, name in self.matrices]

    @functools.cached_property
    def device(self) -> torch.device:
        return next(iter(self.layers.values())).weight.device

    @functools.cached_property
    def weight_kinds(self) -> tuple[str, ...]:
        """The statistics of the weight's gradient: all but that of the output."""
        return tuple(kind for kind in self.kinds if kind != "act_var")

    @functools.cached_property
    def Z(self) -> list[Tensor]:
        """The leaves of the matrices, with probes."""
        return [leaf for probe in self.probes.values() for leaf in probe.Z.values()]

    @functools.cached_property
    def leaves(self) -> list[Tensor]:
        return [*self.Z, *self.V]

    @functools.cached_property
    def runs(self) -> tuple[list[int], list[int]] | None:
        """Of each layer with moments, how many runs of columns there are; and the sizes of all, None where they mix."""
        if any(layer.parts > 1 or layer.slices.blocks > 1 for layer in self.layers.values()):
            return None
        sizes = [[*layer.slices.values()] for layer in self.layers.values()] if self.V else []
        return [len(own) for own in sizes], [size for own in sizes for size in own]

    def taken(self) -> dict[str, list[Contribution]]:
        """What backward left in each layer under the exact estimator."""
        return {path: probe.taken for path, probe in self.probes.items()}

    def taken_of(self, path: str, name: str) -> list[Contribution]:
        """What backward left for one matrix."""
        return [call for call in self.probes[path].taken if call.part in (None, name)]

    @functools.cached_property
    def V(self) -> list[Tensor]:
        """The leaves of the layers' moments, with ``act_var``."""
        return [probe.V for probe in self.probes.values() if probe.V is not None]

    def exact_values(self) -> list[dict[str, Tensor]]:
        """This step's exact value of each statistic of every matrix; empty where no backward ran through its layer."""
        found: dict[tuple[str, str], dict[str, Tensor]] = {matrix: {} for matrix in self.matrices}
        if {"grad_sq", "grad_abs"} & {*self.kinds}:
            for matrices in self._on_one_input():
                for matrix, sums in self._gradstat(matrices, as_one_batch, "grad_abs" in self.kinds):
                    found[matrix] = dict(zip(("grad_sq", "grad_abs"), sums[0], strict=True))
        if "fisher" in self.kinds:
            for matrix, (total, samples) in self.sample_squares().items():
                if self.taken_of(*matrix):
                    found[matrix]["fisher"] = total * fisher_factor(self.loss_reduction, samples)
        return list(found.values())

    def sample_squares(self) -> dict[tuple[str, str], tuple[Tensor, int]]:
        """``Σ_i ||G_i||²`` of every matrix over the samples of this step, and their number."""
        zeros = {path: torch.zeros((), dtype=torch.float64, device=x.weight.device) for path, x in self.layers.items()}
        found = {(path, name): (zeros[path], 0) for path, name in self.matrices}
        for matrices in self._on_one_input():
            for micro in sorted({call.micro for call in self.taken_of(*matrices[0])}):
                for matrix, sums in self._gradstat(matrices, by_sample, False, micro):
                    total, samples = found[matrix]
                    found[matrix] = total + sums[:, 0].double().sum(), samples + len(sums)
        return found

    def _on_one_input(self) -> list[list[tuple[str, str]]]:
        """The matrices with contributions: those together whose calls saw one x, as slices and q, k and v do."""
        found: list[list[tuple[str, str]]] = []
        for matrix in self.matrices:
            if self.taken_of(*matrix) and found and self._alike(found[-1][0], matrix):
                found[-1].append(matrix)
            elif self.taken_of(*matrix):
                found.append([matrix])
        return found

    def _alike(self, *matrices: tuple[str, str]) -> bool:
        first, other = (self.taken_of(*matrix) for matrix in matrices)
        if len(first) != len(other) or len({self.layers[path].backend for path, _ in matrices}) > 1:
            return False
        return all(a.micro == b.micro and _same(a.x, b.x) for a, b in zip(first, other, strict=True))

    def _gradstat(
        self, matrices: Sequence[tuple[str, str]], batch: Callable, absolute: bool, micro: int | None = None
    ) -> Iterator[tuple[tuple[str, str], Tensor]]:
        """``Backend.gradstat`` of matrices on one input, in one call: (matrix, [runs, 2])."""
        parts = []
        for path, name in matrices:
            calls = [call for call in self.taken_of(path, name) if micro in (None, call.micro)]
            x, dy, offsets = batch(calls)
            parts.append(_columns(self.layers[path], name, dy, calls))
        backend, _ = choose(self.layers[matrices[0][0]].backend, x.device, x.dtype)
        yield from zip(matrices, backend.gradstat(x, parts, offsets, absolute), strict=True)


def _columns(layer: Linear, name: str, dy: Tensor, taken: Sequence[Contribution]) -> Tensor:
    """Columns of dy that are a slice's."""
    return layer.slices.columns(dy, name) if taken[0].part is None else dy


def fisher_factor(loss_reduction: str, samples: int | Tensor) -> float | Tensor:
    """What makes ``fisher`` of ``Σ_i ||G_i||²``, G_i as it was backpropagated: n for a mean loss, 1/n for a sum."""
    # The gradients of a mean loss are 1/n of the samples' own: n Σ||G_i||² is their mean square.
    if not isinstance(samples, Tensor):
        return float(samples) if loss_reduction == "mean" else 1.0 / max(samples, 1)
    return samples.double() if loss_reduction == "mean" else 1.0 / samples.double().clamp(min=1)


def output_variances_of(
    layers: Iterable[Linear], V: Sequence[Tensor | None], device: torch.device, shared: bool = False
) -> tuple[Tensor | None, list[bool]]:
    """``act_var`` of the matrices whose layer has moments, and for each matrix whether it has.

    ``shared``: of experts that saw no row there is one, too, since who has one is agreed on by all ranks.
    """
    live, there = [], []
    for layer, total in zip(layers, V, strict=True):
        sizes = [*layer.slices.values()]
        if total is None:
            there += [False] * len(sizes)
        elif layer.parts == 1:
            there += [True] * len(sizes)
            live.append((_by_slice(total, layer), sizes))
        else:
            seen, total = moments_there(total, layer), total.clone()
            total.view(2, layer.parts, -1)[:, :, -1].clamp_(min=1)
            there += seen
            parts = zip(total.view(2, layer.parts, -1).unbind(1), sizes, seen, strict=True)
            live += [(part.contiguous(), [size]) for part, size, has in parts if has or shared]
    found = output_variances(*zip(*live, strict=True)).to(device) if live else None
    return found, there


def moments_there(total: Tensor | None, layer: Linear) -> list[bool]:
    """Whether each matrix of a layer has moments: of experts, those with rows (read back from a device)."""
    if total is None or layer.parts == 1:
        return [total is not None] * len(layer.slices)
    return (total.view(2, layer.parts, -1)[0, :, -1] > 0).tolist()


def _by_slice(total: Tensor, layer: Linear) -> Tensor:
    """Moments [2, N + 1] with the columns of each slice together."""
    if layer.slices.blocks == 1:
        return total
    parts = [layer.slices.columns(total[:, :-1], name) for name in layer.slices]
    return torch.cat([*parts, total[:, -1:]], dim=1)


# Of each statistic: the numbers of those matrices that have one, float64, and for each matrix whether it has; or the
# numbers of all of them, and a boolean tensor.
Found = Mapping[str, tuple[Tensor | None, Sequence[bool] | Tensor]]


class Averages:
    r"""Running averages of every statistic and matrix, over the same stretch of training however often it is sampled.

    .. math:: F \leftarrow \beta^n F + (1 - \beta^n) f

    f is a sample's value and n the optimizer steps that it stands for: β is the decay of one step. With ``ema=None`` F
    is the mean of all samples, in which each weighs n. ``values`` and ``counts`` are F and the sum of n by statistic,
    [matrices] in float64. A sample that is left out neither decays nor adds.
    """

    def __init__(self, kinds: Sequence[str], matrices: int, ema: float | None, device: torch.device):
        self.kinds, self.ema = tuple(kinds), ema
        self._means = torch.zeros(len(self.kinds), matrices, dtype=torch.float64, device=device)
        self._steps = torch.zeros_like(self._means)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)  # samples left out: something was not finite
        self._everything = torch.ones(matrices, dtype=torch.bool, device=device)

    @property
    def values(self) -> dict[str, Tensor]:
        return dict(zip(self.kinds, self._means, strict=True))

    @property
    def counts(self) -> dict[str, Tensor]:
        return dict(zip(self.kinds, self._steps, strict=True))

    def state_dict(self) -> dict[str, Any]:
        values, counts = ({kind: t.clone() for kind, t in part.items()} for part in (self.values, self.counts))
        return {"values": values, "counts": counts, "skipped": self.skipped.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for kept, saved in ((self.values, state["values"]), (self.counts, state["counts"])):
            for kind, numbers in kept.items():
                numbers.copy_(saved[kind])
        self.skipped.copy_(state["skipped"])

    def weight(self, n: int) -> float | None:
        """That of a sample which stands for n steps, ``1 - β^n``; None where it is its share of all steps."""
        return None if self.ema is None else 1.0 - self.ema**n

    def of_leaves(self, tracked: Tracked) -> Any:
        """``averages_of_leaves``, which does what ``add`` does; None where there is none."""
        if tracked.runs is None:
            return None
        squares_first, averages = self.kinds[0] != "act_var", (self._means, self._steps, self.skipped)
        return averages_of_leaves(averages, tracked.leaves, len(tracked.Z), *tracked.runs, squares_first)

    @torch.no_grad()
    def add(self, found: Found, finite: Tensor | None = None, drawn: Tensor | None = None, steps: int = 1) -> Tensor:
        """Fold in one sample for the matrices that have one, unless any number is not finite; returns whether it was.

        - ``finite``: a further condition on folding it in, a boolean tensor or None.
        - ``drawn``: the matrices whose statistics of the weight count, booleans [matrices]; None: all.
        - ``steps``: n, the optimizer steps that the sample stands for.
        """
        rows = [self._scatter(*found[kind]) for kind in self.kinds]
        value, keep = rows[0][0].unsqueeze(0) if len(rows) == 1 else torch.stack([numbers for numbers, _ in rows]), None
        if any([seen is not self._everything for _, seen in rows]):
            keep = torch.stack([seen for _, seen in rows])
            value = torch.where(keep, value, 0.0)
        folded = value.amax() < math.inf
        folded = folded if finite is None else folded & finite
        keep = folded if keep is None else keep & folded
        if drawn is not None:
            keep = keep & torch.stack([drawn | (kind == "act_var") for kind in self.kinds])
        self._steps += keep if steps == 1 else keep * steps
        change, weight = torch.where(keep, value - self._means, 0.0), self.weight(steps)
        if weight is None:
            self._means += change.mul_(steps / self._steps.clamp(min=1))
        else:
            self._means.add_(change, alpha=weight)
        self.skipped += ~folded
        return folded

    def _scatter(self, found: Tensor | None, there: Sequence[bool] | Tensor) -> tuple[Tensor, Tensor]:
        """Scatter ``found`` to all matrices; returns values and mask."""
        if isinstance(there, Tensor):
            return found, there
        if all(there):
            return found, self._everything
        seen = moved(torch.tensor(there), self._means.device)
        values = torch.zeros_like(self._means[0])
        return (values if found is None else values.masked_scatter_(seen, found)), seen

    def corrected(self, kind: str) -> Tensor:
        """Bias-corrected average of a statistic, ``F / (1 - β^Σn)``; 0 for a matrix without a sample."""
        if kind not in self.kinds:
            raise wrong_value("statistics", f"{kind!r} among them, which importance is made of", self.kinds)
        value, count = self.values[kind], self.counts[kind]
        return value / (1.0 - self.ema**count).clamp(min=1e-300) if self.ema is not None else value.clone()


COVARIANCES = ("act_cov", "grad_cov")


class Covariances:
    """``act_cov = x^T x / M`` [K, K] and ``grad_cov = dy^T dy / M`` [N, N] by layer, M counted over all steps.

    Under ``tracker.mask`` both are of the tokens that count, and M is their number.
    Source: Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature" (ICML 2015).
    """

    def __init__(self, kinds: Sequence[str]):
        self.kinds = tuple(kinds)
        self._sums: dict[str, dict[str, Tensor]] = {kind: {} for kind in self.kinds}
        self._rows: dict[str, Tensor] = {}

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
                x, dy = call.x, call.dy
                self.reserve(path, x.shape[-1], dy.shape[-1], accumulate_dtype(x.dtype), x.device)
        for path, calls in taken.items():
            for call in calls:
                x, dy = _counting_rows(call)
                backend, _ = choose((backends or {}).get(path, "auto"), x.device, x.dtype)
                acc = accumulate_dtype(x.dtype)
                for kind, rows, weight in (("act_cov", x, keep), ("grad_cov", dy, keep * inverse_scale.square())):
                    if kind in self._sums:
                        backend.add_gram_(self._sums[kind][path], rows, weight.to(x.device, acc))
                count = x.shape[0] if call.keep is None else call.keep.sum()
                self._rows[path] += keep.to(x.device, torch.float64) * count

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


def _counting_rows(call: Contribution) -> tuple[Tensor, Tensor]:
    """x [M, K] and dy [M, N] of the tokens that count."""
    x, dy = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (call.x, call.dy))
    if call.keep is None:
        return x, dy
    keep = call.keep.reshape(-1)
    if on_host(keep.device):
        return x[keep], dy[keep]
    # On a GPU nothing is read back to find out how many rows there are.
    return tuple(torch.where(keep.unsqueeze(1), rows, 0) for rows in (x, dy))


def all_finite(taken: Mapping[str, Sequence[Contribution]], device: torch.device) -> Tensor:
    """Whether everything that was taken and counts in covariances is finite: a boolean tensor, true without any."""
    found = torch.ones((), dtype=torch.bool, device=device)
    for calls in taken.values():
        for call in calls:
            for rows in _counting_rows(call):
                found &= rows.isfinite().all().to(device)
    return found


def as_one_batch(taken: list[Contribution]) -> tuple[Tensor, Tensor, list[int]]:
    """Every row of every call: their sum is one gradient."""
    x = _joined([call.x.reshape(-1, call.x.shape[-1]) for call in taken])
    dy = _joined([call.dy.reshape(-1, call.dy.shape[-1]).to(x.dtype) for call in taken])
    return x, dy, [0, x.shape[0]]


def _same(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are the same elements of the same memory."""
    views = [(t.dtype, t.shape, t.stride(), t.storage_offset()) for t in (x, y)]
    return views[0] == views[1] and x.untyped_storage() is y.untyped_storage()


def _joined(parts: list[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def by_sample(taken: list[Contribution]) -> tuple[Tensor, Tensor, list[int]]:
    """Calls of one micro-batch side by side, so that a sample's rows from all calls are one run."""
    if taken[0].samples is not None:
        return _by_sample_of_rows(taken)
    samples = taken[0].x.shape[0] if taken[0].x.dim() > 1 else 1
    for call in taken:
        if call.x.dim() > 1 and call.x.shape[0] != samples:
            raise RuntimeError(f"fisher: calls of one layer saw {samples} and {call.x.shape[0]} samples in dimension 0")
    tokens = [call.x.shape[1:-1].numel() for call in taken]
    x, dy = (
        _joined([part.reshape(samples, t, part.shape[-1]) for part, t in zip(parts, tokens, strict=True)], dim=1)
        for parts in ([call.x for call in taken], [call.dy for call in taken])
    )
    return x.flatten(0, 1), dy.flatten(0, 1).to(x.dtype), [sum(tokens) * i for i in range(samples + 1)]


def _by_sample_of_rows(taken: list[Contribution]) -> tuple[Tensor, Tensor, list[int]]:
    """As ``by_sample``, of calls whose rows say which sample they are of."""
    owners, order = torch.sort(torch.cat([call.samples[0] for call in taken]))
    x, dy = (_joined([call.x for call in taken])[order], _joined([call.dy for call in taken])[order])
    numbers = torch.arange(taken[0].samples[1], device=owners.device)
    return x, dy.to(x.dtype), [0, *torch.searchsorted(owners, numbers, right=True).tolist()]
