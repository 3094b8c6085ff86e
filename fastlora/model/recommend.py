"""``recommend``: targets and ranks for a budget of parameters, with the reason for each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._utils.distributed import refuse_parallel
from .._utils.errors import check_integer, check_model, wrong_value
from .._utils.reporting import Report, Tabular
from ..config import LoraConfig
from ..importance.allocation import allocate
from ..nn.linear import adapted_layers, matrix_key
from ..tracking.calibrate import calibrate
from ..tracking.tracker import Tracker
from .inject import inject

EVEN = (
    "the same rank on every linear that a gradient reaches: no ranks by importance have been shown to be better at as "
    "many parameters (docs/ranks.md)"
)
REST = "what is left, less than one rank everywhere, goes by squared gradient norm over N + K, one rank a matrix"
SCARCE = (
    "less than rank 1 everywhere: one rank a matrix by squared gradient norm over N + K, which no experiment tested"
)


@dataclass(frozen=True)
class Recommended:
    """One matrix: its rank, what that costs, r (N + K), its share of the sum of ‖dL/dW‖², and why."""

    key: str
    in_features: int
    out_features: int
    rank: int
    params: int
    share: float
    reason: str


@dataclass(frozen=True)
class Recommendation(Tabular):
    """What to adapt for a budget; ``print`` gives the table with its reasons, ``config`` what ``inject`` takes."""

    _numbers = range(1, 6)

    rows: tuple[Recommended, ...]
    budget: int
    reasons: tuple[str, ...]

    @property
    def ranks(self) -> dict[str, int]:
        """Rank by matrix, 0 where none is worth its parameters or no gradient arrives."""
        return {row.key: row.rank for row in self.rows}

    @property
    def targets(self) -> list[str]:
        """The matrices that get an adapter."""
        return [row.key for row in self.rows if row.rank]

    @property
    def params(self) -> int:
        """Trainable parameters of all adapters, at most ``budget``."""
        return sum(row.params for row in self.rows)

    @property
    def config(self) -> LoraConfig:
        """The scale is 2 on every matrix, whatever its rank: lora_alpha = 2 r."""
        r = max(self.ranks.values())
        others = {key: rank for key, rank in self.ranks.items() if rank != r}
        return LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", rank_pattern=others)

    def _parts(self) -> tuple[tuple[str, ...], list[tuple], list[str]]:
        head = ("matrix", "in", "out", "rank", "params", "gradient", "why")
        rows = [
            (r.key, r.in_features, r.out_features, r.rank, f"{r.params:,}", f"{r.share:.1%}", r.reason)
            for r in self.rows
        ]
        return head, rows, [f"{self.params:,} parameters of a budget of {self.budget:,}", *self.reasons]


def recommend(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    budget: int,
    *,
    steps: int | None = 8,
    progress: bool | Report | None = None,
) -> Recommendation:
    r"""Targets and ranks for ``budget`` trainable parameters of adapters, as a table with its reasons.

    .. math:: r = \max\{r : \textstyle\sum_m \min(r, N_m, K_m)(N_m + K_m) \le \text{budget}\}

    over the linears m that a gradient reaches; what is left, less than one rank everywhere, goes one rank a matrix to
    the largest ‖dL/dW‖² / (N + K), of ``steps`` backward passes (``calibrate``). Uniform over all linears is what the
    experiments leave standing, see ``docs/ranks.md``.

    ``steps`` items of ``batches`` (None: all) are taken; ``progress`` is as in :func:`calibrate`.
    ``model`` is the base, without adapters. It is not touched: the passes run through a copy of its modules that
    shares its weights. ``loss_fn(model, batch)`` gets that copy. A fused matrix counts as one.

    Raises ``TypeError`` or ``ValueError`` naming the argument, as ``inject`` and ``calibrate`` do, and for a budget
    that pays for no rank at all.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> found = fastlora.recommend(model, [torch.ones(4, 8)], lambda m, x: m(x).square().mean(), budget=60, steps=1)
    >>> found.ranks, found.params
    ({'0': 2, '2': 2}, 56)
    """
    check_model(model)
    refuse_parallel(model, "recommend")
    check_integer("budget", budget, 1)
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):  # factors are drawn
        twin = inject(_twin(model), LoraConfig(r=1, target_modules="all-linear"), check="off")
    squares = calibrate(twin, batches, loss_fn, steps=steps, method=_reached, progress=progress)
    sizes = {
        matrix_key(path, name): (layer.in_features, N)
        for path, layer in adapted_layers(twin).items()
        for name, N in layer.slices.items()
    }
    cheapest = min(sum(sizes[key]) for key in squares)
    if budget < cheapest:
        raise wrong_value("budget", f"at least {cheapest}, the parameters of one rank of the smallest matrix", budget)
    ranks, even = _ranks(squares, {key: sizes[key] for key in squares}, budget)
    total = sum(squares.values())
    rows = []
    for key, (K, N) in sizes.items():
        rank, share = ranks.get(key, 0), squares.get(key, 0.0) / total if total else 0.0
        rows.append(Recommended(key, K, N, rank, rank * (N + K), share, _why(key in squares, rank, min(even, N, K))))
    reasons = (SCARCE,) if even == 0 else (EVEN, REST)
    return Recommendation(tuple(rows), budget, reasons)


def _twin(model: nn.Module) -> nn.Module:
    """The same modules anew, with the same memory as weights: gradients, modes and classes of the model stay its own.

    Weights of other classes than ``nn.Parameter``, as quantised ones, are shared as they are.
    """
    plain = [p for p in model.parameters() if type(p) is nn.Parameter]
    shared: dict[int, Any] = {id(p): p for p in model.parameters()}
    shared.update({id(p): nn.Parameter(p.detach(), requires_grad=False) for p in plain})
    return copy.deepcopy(model, shared)


def _reached(tracker: Tracker) -> Mapping[str, float]:
    return tracker.scores("grad_sq", missing="skip")


def _ranks(
    squares: Mapping[str, float], sizes: Mapping[str, tuple[int, int]], budget: int
) -> tuple[dict[str, int], int]:
    """Ranks, and the even rank that all of them have at least where their size lets them."""

    def cost(rank: int) -> int:
        return sum(min(rank, K, N) * (K + N) for K, N in sizes.values())

    low, high = 0, max(min(size) for size in sizes.values())
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle - 1)
    bounds = [{key: min(rank, *size) for key, size in sizes.items()} for rank in (low, low + 1)]
    costs = {key: K + N for key, (K, N) in sizes.items()}
    ranks = allocate(
        squares, budget, unit="params", per="param", costs=costs, r_min=bounds[0], r_max=bounds[1], shares="raw"
    )
    return ranks, low


def _why(reached: bool, rank: int, even: int) -> str:
    if not reached:
        return "no gradient reaches it"
    if rank > even:
        return "a large gradient for its size"
    return "" if rank else "a small gradient for its size"
