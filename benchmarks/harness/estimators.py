"""How far estimates of ||G_W||^2 lie from the number itself, on given x and dy: any kind of probe, one entry each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora import Scores
from fastlora.ops import reference

from .interleave import quantile
from .recorded import Recorded

EMA = 0.98
DRAWS = 192  # independent P for each recorded call


class Kind(NamedTuple):
    """``draw(count, call, k, generator)``: probe rows [count, k, K] and what ``||dy^T x P^T||^2`` is divided by."""

    label: str
    draw: Callable[[int, Recorded, int, torch.Generator], tuple[Tensor, float]]


def _rademacher(count: int, call: Recorded, k: int, generator: torch.Generator) -> tuple[Tensor, float]:
    signs = torch.randint(2, (count, k, call.x.shape[1]), generator=generator, dtype=torch.float64)
    return 2 * signs - 1, float(k)


def _columns(count: int, call: Recorded, k: int, generator: torch.Generator) -> tuple[Tensor, float]:
    p = reference.column_shares(call.norms.unsqueeze(0), True, False)[0]
    index = torch.multinomial(p, count * k, replacement=True, generator=generator)
    one_hot = torch.nn.functional.one_hot(index, len(p)) / (k * p).sqrt()
    return one_hot.view(count, k, len(p)), 1.0


# A further kind of probe is one entry here and one in ``bench_statistics.TRACKED_BY``, which times it.
KINDS: dict[str, Kind] = {"rademacher": Kind("±1 rows", _rademacher), "columns": Kind("columns of x", _columns)}


def estimates(gradient: Tensor, call: Recorded, kind: str, k: int, seed: int) -> Tensor:
    """``DRAWS`` independent estimates over the truth, float64."""
    P, divisor = KINDS[kind].draw(DRAWS, call, k, torch.Generator().manual_seed(seed))
    Q = torch.einsum("nk,djk->dnj", gradient, P)
    return Q.square().sum(dim=(1, 2)) / divisor / gradient.square().sum()


def averaged(ratios: Tensor) -> Tensor:
    """Bias-corrected EMA over the draws of each call."""
    weights = EMA ** torch.arange(ratios.shape[1] - 1, -1, -1, dtype=torch.float64)
    return ratios @ weights / weights.sum()


def errors(calls: list[Recorded], kind: str, k: int) -> dict[str, Any]:
    """Root mean square of the relative error over calls: of one step, of the EMA; rank correlation of the EMA."""
    gradients = [call.dy.double().t() @ call.x.double() for call in calls]
    each = [estimates(g, call, kind, k, 1000 * k + i) for i, (g, call) in enumerate(zip(gradients, calls, strict=True))]
    ratios, names = torch.stack(each), [f"{call.layer} {call.step}" for call in calls]
    truth, ema = torch.stack([g.square().sum() for g in gradients]), averaged(ratios)
    exact = Scores(dict(zip(names, truth.tolist(), strict=True)), "grad_sq")
    found = Scores(dict(zip(names, (truth * ema).tolist(), strict=True)), "grad_sq")
    single = (ratios - 1).square().mean(dim=1).sqrt()
    return {
        "kind": kind, "k": k, "calls": len(calls), "draws": DRAWS, "single": float(single.square().mean().sqrt()),
        "single_p10": quantile(single.tolist(), 0.1), "single_p90": quantile(single.tolist(), 0.9),
        "ema": float((ema - 1).square().mean().sqrt()), "bias": float(ratios.mean()) - 1,
        "spearman": found.rank_correlation(exact),
    }  # fmt: skip


def rounding(calls: list[Recorded]) -> float:
    """Root mean square of the relative error of ``||dy^T x||^2`` in fp32: of the naive way, of hooks, of exact."""
    found = [(c.dy.t() @ c.x).square().sum() / (c.dy.double().t() @ c.x.double()).square().sum() for c in calls]
    return float((torch.stack(found).double() - 1).square().mean().sqrt())
