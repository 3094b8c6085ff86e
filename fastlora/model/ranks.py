"""Change the ranks of a model's matrices: to given ones, or to those that follow from scores."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .._utils.distributed import refuse_parallel, unwrapped
from .._utils.errors import check_flag, check_integer, check_mapping, suggestion, wrong_value
from .._utils.types import ModelT
from ..config import FROM_WEIGHT, LoraConfig
from ..importance.allocation import allocate
from ..nn.active import adapted_models, chosen_adapter, config_of
from ..nn.adapter import AdapterSpec, Factors, checked_ranks, new_factors
from ..nn.initialise import new_bias, new_magnitude
from ..nn.linear import Adapted, Linear, adapted_layers, matrix_key
from ..ops.multi_tensor import copy_overlap_
from .learning_check import watch_learning
from .summary import summary


@torch.inference_mode(False)  # what is made here is no inference tensor, wherever it is made
def set_ranks(
    model: ModelT,
    ranks: Mapping[str, int],
    *,
    adapter: str | None = None,
    reinit: bool = False,
    keep: bool = False,
) -> ModelT:
    """Give matrices new ranks, with fresh factors; the scale ``s`` stays (``scale="per_rank"``: follows the rank).

    ``adapter``: the active one unless named. Keys are matrix keys; others keep their rank and factors. Rank 0 removes
    the adapter of a matrix; with the last of a layer go what ``lora_bias`` and ``use_dora`` have there. Refused once B
    is not zero, or these have been trained, because training would be lost, unless ``reinit``, or ``keep``: then the
    first min(r, r') rows of A and columns of B stay, all matrices copied in one launch, and further columns of B are
    zero, so that a matrix which grows computes what it did; B (an embedding's A) is multiplied by s / s' where ``s``
    changes. Factors are new parameters: an optimizer needs to be made anew. On one model ranks shared out anew after
    every tenth of training (``keep``) did as well as those of the start: +0.06 ± 0.29 points of accuracy
    (``docs/experiment.md``). Raises ``TypeError`` or ``ValueError`` with the model unchanged.

    >>> model = nn.Sequential(fastlora.nn.Linear(8, 8, r=2))
    >>> model = fastlora.set_ranks(model, {"0": 4})
    >>> model[0].ranks()
    {'weight': 4}
    """
    refuse_parallel(model, "set_ranks")
    given, model = model, unwrapped(model)
    layers = adapted_layers(model)
    adapter = chosen_adapter(model, adapter)
    check_flag("reinit", reinit)
    if check_flag("keep", keep) and reinit:
        raise ValueError("keep: expected keep or reinit, got both")
    layers = {path: layer for path, layer in layers.items() if adapter in layer.adapter_specs}
    known = {matrix_key(path, s): (path, s) for path, layer in layers.items() for s in layer.slices}
    config = config_of(model, adapter)
    check_mapping("ranks", ranks, "matrix keys to ranks")
    wanted: dict[str, dict[str, int]] = {}
    for key, rank in ranks.items():
        if key not in known:
            raise wrong_value("ranks", "keys of the adapter's matrices", key, suggestion(str(key), list(known)))
        path, name = known[key]
        wanted.setdefault(path, {})[name] = rank
    trains = tuple(_trains([getattr(x, side)[adapter] for x in layers.values()]) for side in ("lora_A", "lora_B"))
    replaced = []
    for path, changed in wanted.items():
        layer = layers[path]
        _refuse_change(path, layer, changed, adapter, reinit, keep)
        own = config or layer.router.configs.get(adapter)  # models inside one may have others each
        replaced.append((layer, *_resized(layer, changed, adapter, own, trains)))
    if keep:
        _keep_trained(replaced, adapter)
    # Before anything changes, since memory may end.
    started = [_beside_afresh(*each, each[-1].beside()) if reinit else {} for each in replaced]
    for (layer, spec, A, B), beside, changed in zip(replaced, started, wanted.values(), strict=True):
        before, bias = layer.bias_scale(adapter), layer.lora_B[adapter].beside().get("bias")
        layer.install(adapter, spec, A, B)
        if keep and bias is not None and B.beside().get("bias") is bias:
            bias.data.mul_(_ratio(before, layer.bias_scale(adapter)))
        for kept, value in beside.items():
            for rows in map(layer.slices.rows, changed):
                B.beside()[kept].data[rows] = value[rows]
    for adapted in adapted_models(model).values():
        watch_learning(adapted)  # the factors are new
    return given


def _refuse_change(
    path: str, layer: Adapted, changed: Mapping[str, int], adapter: str, reinit: bool, keep: bool
) -> None:
    """``ValueError`` for a layer whose ranks cannot be changed, or not in this way."""
    if layer.adapter_specs[adapter].init in FROM_WEIGHT or layer.lora_A[adapter].starts():
        raise ValueError(
            f"ranks: {path!r} has a part of its weight in the factors (init_lora_weights="
            f"{layer.adapter_specs[adapter].init!r}); give ranks to inject, by rank_pattern"
        )
    for side in (layer.lora_A, layer.lora_B):
        side[adapter].own(adapter)
    checked_ranks(changed, layer.in_features, layer.slices, path, groups=layer.groups)
    if keep and layer.groups > 1:
        raise ValueError(f"keep: {path!r} is a convolution in groups, whose rows of A have other columns of B then")
    # Of an embedding A is zero at first.
    factors = layer.lora_A[adapter].tensors() if layer.lookup else layer.lora_B[adapter].tensors()
    trained = any(p is not None and bool(p.detach().any()) for p in factors.values())
    what = "B is not zero" if trained else _trained_beside(layer, adapter)
    if what and not (reinit or keep) and layer.adapter_specs[adapter].init is not False:
        raise ValueError(
            f"ranks: {path!r} has been trained ({what}); pass reinit=True to start it afresh, or keep=True"
        )
    if layer.merged:
        raise ValueError(f"ranks: {path!r} is merged; call fastlora.unmerge first")
    if layer.router.awaits_backward(adapter):
        raise ValueError(
            f"ranks: a forward of {adapter!r} awaits its backward, whose gradients would be lost; run it, or let "
            "go of the forward's outputs"
        )


def _trains(sides: Iterable[Factors]) -> bool:
    """Whether one of these factors has a gradient, or there are none."""
    found = [p.requires_grad for side in sides for p in side.parameters()]
    return any(found) or not found


def _trained_beside(layer: Adapted, adapter: str) -> str | None:
    """What of ``lora_bias`` and ``use_dora`` has been trained, where B is zero; None: nothing."""
    beside = layer.lora_B[adapter].beside()
    if "bias" in beside and bool(beside["bias"].detach().any()):
        return "lora_bias is not zero"
    if "magnitude" in beside:
        lengths = layer.row_lengths(adapter).norms().to(beside["magnitude"].dtype)
        if not torch.allclose(beside["magnitude"], lengths):
            return "the magnitude of use_dora is not that of the weight"
    return None


@torch.no_grad()
def _keep_trained(replaced: list[tuple], adapter: str) -> None:
    """Copy what both ranks have from the old factors into the new ones, which begin at zero besides."""
    to: list[Tensor] = []
    source: list[Tensor] = []
    rescaled: list[tuple[Tensor, float]] = []
    for layer, spec, A, B in replaced:
        for name, b in B.tensors().items():
            a, old_A, old_B = (f.own(adapter)[name] for f in (A, layer.lora_A[adapter], layer.lora_B[adapter]))
            if b is None or b is old_B:
                continue
            a, b = a.detach(), b.detach()
            begins = a if layer.lookup else b  # at zero; the other must not be, or neither would ever learn
            if old_B is None:
                begins.zero_()
                continue
            kept = min(len(old_A), len(a))
            if layer.lookup:
                b[:, :kept].copy_(old_B[:, :kept])
            to += [a] if layer.lookup else [a[:kept], b]
            source += [old_A.detach()] if layer.lookup else [old_A.detach(), old_B.detach()]
            rescaled.append((begins, _ratio(layer.adapter_specs[adapter].scale[name], spec.scale[name])))
    copy_overlap_(to, source)
    for factor, ratio in rescaled:
        if ratio != 1:
            factor.mul_(ratio)


def _beside_afresh(
    layer: Linear, spec: AdapterSpec, A: Factors, B: Factors, names: Collection[str]
) -> dict[str, Tensor]:
    """What stands beside B, as at the start: those of ``names``, "bias" and "magnitude"."""
    made: dict[str, Tensor] = {}
    if "bias" in names:
        made["bias"] = new_bias(layer.out_features, spec, A, layer.weight.device)
    if "magnitude" in names:
        made["magnitude"] = new_magnitude(layer.as_matrix(layer.weight), layer.slices, spec, A, B)
    return made


def _ratio(before: float, now: float) -> float:
    """What a factor is multiplied by, so that its product with the scale stays."""
    return 1.0 if before == now or not now else before / now


def _resized(
    layer: Linear, changed: Mapping[str, int], adapter: str, config: LoraConfig | None, trains: Sequence[bool]
) -> tuple[AdapterSpec, Factors, Factors]:
    """New factors; ``trains``: whether A, and B, have gradients in the rest of the adapter."""
    spec, ranks = layer.adapter_specs[adapter], layer.ranks(adapter)
    old_A, old_B = (side[adapter].own(adapter) for side in (layer.lora_A, layer.lora_B))
    scale = dict(spec.scale)
    for name, rank in changed.items():
        if config is not None and config.scale == "per_rank":
            exponent = 0.5 if config.use_rslora else 1.0
            scale[name] *= ((ranks[name] or config.r) / (rank or config.r)) ** exponent
    # The factors may have been moved to another dtype since the adapter was made.
    dtype = next((p.dtype for p in layer.lora_B[adapter].parameters()), spec.dtype)
    spec = replace(spec, scale=scale, dtype=dtype)
    with torch.no_grad():
        made = (layer.slices, {**ranks, **changed}, layer.in_features, spec, layer.weight.device)
        A, B = new_factors(*made, groups=layer.groups, lookup=layer.lookup)
        for name in layer.slices:
            if name not in changed and ranks[name]:
                A._parameters[name], B._parameters[name] = old_A[name], old_B[name]
    beside = layer.lora_B[adapter].beside()
    if not any(p is not None for p in A.tensors().values()):
        beside = {}  # it would do nothing, and never learn
    elif adapter not in layer.ranked and config is not None:
        names = [name for name, there in (("bias", config.lora_bias), ("magnitude", config.use_dora)) if there]
        beside = {name: nn.Parameter(t) for name, t in _beside_afresh(layer, spec, A, B, names).items()}
    for name, parameter in beside.items():
        B.register_parameter(name, parameter)
    sides = zip((A, B), (old_A, old_B), (layer.lora_A, layer.lora_B), trains, strict=True)
    for factors, old, side, learns in sides:
        factors.train(side[adapter].training)
        for name, parameter in factors.named_parameters():
            before = old.get(name)
            parameter.requires_grad_(learns if before is None else before.requires_grad)
    return spec, A, B


def reallocate(
    model: nn.Module,
    scores: Mapping[str, float],
    budget: int | None = None,
    *,
    r_min: int = 2,
    r_max: int | None = None,
    adapter: str | None = None,
    reinit: bool = False,
    keep: bool = False,
    **options: Any,
) -> dict[str, int]:
    """``allocate`` and ``set_ranks`` in one: new factors at ranks that follow the scores. Returns the ranks.

    ``budget``: the ranks that the scored matrices have now, n r for a uniform r; with ``unit="params"`` their
    parameters. ``r_max``: twice the largest rank there is now. No rank exceeds min(N, K). ``adapter``: the active one
    unless named. The default floor ``r_min`` is 2, as FIM-LoRA needs it: with a floor of 1 its ranks are bimodal.
    Further ``options`` go to ``allocate``; ``reinit`` and ``keep`` to ``set_ranks``, which refuses trained adapters
    without either.

    Raises ``ValueError`` for scores of unknown matrices, and ``TypeError`` or ``ValueError`` for whatever the two
    functions refuse; the model is then as it was. Source: FIM-LoRA (rank proportional to the score at the same total),
    here without overspending.

    >>> model = nn.Sequential(fastlora.nn.Linear(8, 8, r=4), fastlora.nn.Linear(8, 8, r=4))
    >>> fastlora.reallocate(model, {"0": 3.0, "1": 1.0}, reinit=True)
    {'0': 6, '1': 2}
    """
    adapter = chosen_adapter(model, adapter)
    rows = {row.key: row for row in summary(model, adapter).rows}
    check_mapping("scores", scores, "matrix keys to numbers")
    check_integer("r_min", r_min, 0)
    if r_max is not None:
        check_integer("r_max", r_max, 1)
    for key in scores:
        if key not in rows:
            raise wrong_value("scores", "keys of the adapter's matrices", key, suggestion(str(key), list(rows)))
    scored = [rows[key] for key in scores]
    if budget is None:
        budget = sum(row.params if options.get("unit") == "params" else row.rank for row in scored)
    ceiling = 2 * max((row.rank for row in scored), default=0) if r_max is None else r_max
    caps = {row.key: min(ceiling, row.in_features, row.out_features) for row in scored}
    floors = {key: min(r_min, cap) for key, cap in caps.items()} if r_max is None else r_min
    ranks = allocate(scores, budget, r_min=floors, r_max=caps, **options)
    set_ranks(model, ranks, adapter=adapter, reinit=reinit, keep=keep)
    return ranks
