"""``initialize_eva``: A from the leading directions of what a layer sees."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .._utils.distributed import refuse_parallel
from .._utils.errors import check_mapping, listed, suggestion, wrong_value
from .._utils.reporting import Report, check_progress, reporting
from .._utils.types import ModelT
from ..nn.active import chosen_adapter
from ..nn.linear import Linear, adapted_layers


@torch.no_grad()
def initialize_eva(
    model: ModelT,
    covariances: Mapping[str, Tensor],
    *,
    adapter: str | None = None,
    progress: bool | Report | None = None,
) -> ModelT:
    r"""EVA: A of each linear becomes the r leading eigenvectors of the second moment of its inputs; returns the model.

    .. math:: C = x^\top x / M = V \Lambda V^\top,\qquad A = V_{:r}^\top

    ``covariances``: C [K, K] by module path, as ``tracker.covariances("act_cov")`` of an exact tracker gives them for
    the adapter's layers. B stays zero, so that outputs do; ranks stay (``set_ranks``). ``adapter``: the active one
    unless named. ``progress``: as in :func:`merge`, by layer. PEFT takes the mean of x off first, and may move ranks
    between layers (its ``rho``). On one model it did worse than the default start at as many steps: -0.81 ± 0.24 points
    of accuracy (``docs/experiment.md``).

    Raises ``TypeError`` or ``ValueError`` naming the argument, with the model as it was, for a layer without a matrix,
    one of another shape or with values that are not finite, and an adapter that has been trained (B is not zero).
    Source: Paischer et al., "Parameter Efficient Fine-tuning via Explained Variance Adaptation" (NeurIPS 2025).

    >>> model = nn.Sequential(fastlora.nn.Linear(8, 8, r=2))
    >>> model = fastlora.initialize_eva(model, {"0": torch.diag(torch.arange(8.0))})
    >>> model[0].lora_A["default"].weight.abs().argmax(dim=1)
    tensor([7, 6])
    """
    refuse_parallel(model, "initialize_eva")
    check_progress(progress)
    adapter = chosen_adapter(model, adapter)
    found = {p: x for p, x in adapted_layers(model).items() if isinstance(x, Linear) and adapter in x.ranked}
    given = covariances_of(covariances, found)
    for path, layer in found.items():
        K = layer.in_features
        layer.lora_A[adapter].own(adapter)
        if any(b is not None and bool(b.any()) for b in layer.lora_B[adapter]().values()):
            raise ValueError(
                f"model: {path!r} has been trained (B is not zero), and another A would change its outputs"
            )
        most = max(layer.ranks(adapter).values())
        if most > K:
            raise ValueError(f"model: {path!r} has rank {most}, above its {K} inputs")
    directions = {}
    with reporting(progress, len(found), "initialize_eva", "layer") as report:
        for done, (path, layer) in enumerate(found.items(), 1):
            _, V = torch.linalg.eigh(given[path].to(torch.promote_types(given[path].dtype, torch.float32)))
            directions[path] = V.flip(1)[:, : max(layer.ranks(adapter).values())].t()
            report(done, len(found), math.nan)
    for path, rows in directions.items():
        factors = found[path].lora_A[adapter]
        for a in map(factors.own(adapter).get, factors.slices):
            if a is not None:
                a.copy_(rows[: len(a)])
    return model


def covariances_of(covariances: Mapping[str, Tensor], layers: Mapping[str, Linear]) -> dict[str, Tensor]:
    """The matrix [K, K] of each of ``layers``; ``TypeError`` or ``ValueError`` for any other mapping."""
    check_mapping("covariances", covariances, "module paths to matrices [K, K]")
    for path in covariances:
        if path not in layers:
            near = suggestion(str(path), list(layers))
            raise wrong_value("covariances", "paths of linears of the adapter", path, near)
    missing = [path for path in layers if path not in covariances]
    if missing:
        raise ValueError(
            f"covariances: expected a matrix for every linear of the adapter, got none for {listed(missing)}"
        )
    for path, layer in layers.items():
        C, K = covariances[path], layer.in_features
        if not isinstance(C, Tensor) or C.shape != (K, K) or not bool(C.isfinite().all()):
            raise wrong_value(f"covariances[{path!r}]", f"a finite matrix [{K}, {K}]", C)
    return {path: covariances[path] for path in layers}
