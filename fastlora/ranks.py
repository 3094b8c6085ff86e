"""Ranks from scores on a model: the total that it has, given where scores say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .allocation import allocate
from .config import check_rank
from .injection import set_ranks, suggestion
from .nn.linear import DEFAULT, adapted_layers
from .overview import summary


def reallocate(
    model: nn.Module,
    scores: Mapping[str, float],
    budget: int | None = None,
    r_min: int = 2,
    r_max: int | None = None,
    *,
    adapter: str = DEFAULT,
    reinit: bool = False,
    **options: Any,
) -> dict[str, int]:
    """``allocate`` and ``set_ranks`` in one: fresh factors at ranks that follow the scores. Returns the ranks.

    ``budget``: the ranks that the scored matrices have now, n r for a uniform r; with ``unit="params"`` their
    parameters. ``r_max``: twice the largest rank there is now. No rank exceeds min(N, K). The default floor is 2, as
    FIM-LoRA needs it: with 1 ranks split in two camps. Further ``options`` go to ``allocate``; ``reinit`` to
    ``set_ranks``, which refuses trained adapters without it.

    Raises ``ValueError`` for scores of unknown matrices and whatever the two functions refuse; the model is then as it
    was. Source: FIM-LoRA (rank proportional to the score at the same total), here without overspending.
    """
    rows = {row.key: row for row in summary(model, adapter).rows}
    if not rows or not adapted_layers(model):
        raise ValueError("model: has no adapters; call fastlora.inject first")
    if not isinstance(scores, Mapping):
        raise ValueError(f"scores: expected a mapping of matrix keys to numbers, got {type(scores).__name__}")
    check_rank(r_min, "r_min", minimum=0)
    if r_max is not None:
        check_rank(r_max, "r_max")
    for key in scores:
        if key not in rows:
            raise ValueError(f"scores: unknown matrix {key!r}{suggestion(str(key), list(rows))}")
    scored = [rows[key] for key in scores]
    if budget is None:
        budget = sum(row.params if options.get("unit") == "params" else row.rank for row in scored)
    ceiling = 2 * max((row.rank for row in scored), default=0) if r_max is None else r_max
    caps = {row.key: min(ceiling, row.in_features, row.out_features) for row in scored}
    floors = {key: min(r_min, cap) for key, cap in caps.items()} if r_max is None else r_min
    ranks = allocate(scores, budget, floors, caps, **options)
    set_ranks(model, ranks, adapter, reinit)
    return ranks
