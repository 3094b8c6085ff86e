"""Merge adapters into the frozen weights and unmerge them; run a model without its adapters."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .._utils.distributed import refuse_parallel, refuse_partitioned, shards
from .._utils.errors import check_flag
from .._utils.reporting import Report, check_progress, reporting
from .._utils.types import ModelT
from ..nn.active import NO_ADAPTERS, chosen_adapter, refuse_merged, refuse_part
from ..nn.linear import Adapted, adapted_layers
from ..nn.quantized import dequantized, foreign_base, kept_weight, put_back, replace_weight, requantized
from ..nn.routing import Route
from ..nn.token_rows import token_rows
from .eject import eject
from .freezing import give_back
from .modules import recomputed, users_of_parameters
from .optimizer_check import watch_optimizers

logger = logging.getLogger(__name__)


def _layers(model: nn.Module) -> dict[str, Adapted]:
    layers = adapted_layers(model)
    if not layers:
        raise ValueError(NO_ADAPTERS)
    return layers


@torch.no_grad()
def merge(
    model: ModelT,
    adapter: str | None = None,
    *,
    requantize: bool = False,
    unload: bool = False,
    progress: bool | Report | None = None,
) -> ModelT:
    """``W ← W + s B A``, summed in fp32 (float64 for float64) by blocks of rows and rounded once to the weight's dtype.

    ``adapter``: the active one (``set_adapter``) unless named. Until ``unmerge`` every forward is this adapter's and
    the base's alone, also in layers that have others. All layers or none: a delta or a merged weight that is not finite
    raises ``ValueError`` naming the layer before any weight changes, as do a layer that is merged already and an open
    context of ``use_adapters`` or ``disable_adapters`` in any thread or task; ``TypeError`` names an argument of
    another type. ``unload`` then removes every adapter, as :func:`unload` does: the modules are plain ones again, and
    ``unmerge`` has nothing to put back.

    A quantized base is refused, because rounding to its grid may lose the update; with ``requantize`` the sum is
    quantized anew, as the weight was, and a warning says how much of the update the rounding moved. ``progress``: True
    for a bar (needs tqdm), None for one in a terminal when it takes a second, or the log; False; or a callable.

    >>> model = nn.Sequential(fastlora.nn.Linear(8, 8, r=2))
    >>> y = model(torch.ones(1, 8))
    >>> torch.allclose(fastlora.merge(model)(torch.ones(1, 8)), y)
    True
    """
    layers, adapter = adapted_layers(model), chosen_adapter(model, adapter)
    check_flag("requantize", requantize)
    if check_flag("unload", unload):
        refuse_parallel(model, "merge with unload")
        refuse_part(model, "merge")
    check_progress(progress)
    refuse_partitioned(model)
    if shards(model):
        raise ValueError("model: is sharded by fully_shard; save the adapter, and load and merge it in one process")
    if any(layer.router.open_contexts() for layer in layers.values()):
        raise ValueError("model: use_adapters or disable_adapters is open; merge outside of such contexts")
    every = layers.values()
    layers = {path: layer for path, layer in layers.items() if layer.merged or adapter in layer.adapter_specs}
    users = users_of_parameters(model)
    for path, layer in layers.items():
        _refuse(path, layer, users, requantize)
        added = layer.lora_B[adapter].beside() if adapter in layer.ranked else {}
        if "bias" in added and layer.bias is None:
            raise ValueError(f"model: {path!r} has no bias, and that of adapter {adapter!r} (lora_bias) needs one")
    merged: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}
    losses: dict[str, float] = {}
    with reporting(progress, len(layers), "merge", "layer") as report:
        for done, (path, layer) in enumerate(layers.items(), 1):
            if foreign_base(layer) is None:
                weight = layer.merged_weight(adapter)
            else:
                weight, losses[path] = _quantized_sum(path, layer, adapter)
            bias = layer.merged_bias(adapter)
            if weight is None or not (bias is None or bias.isfinite().all()):
                raise ValueError(f"model: merging {path!r} gives weights that are not finite")
            merged[path] = weight, bias
            report(done, len(layers), math.nan)
    rows = token_rows(model, adapter)
    new = {path: each.merged_rows(adapter, model.get_submodule(path).weight) for path, each in rows.items()}
    for path, values in new.items():
        if values is None:
            raise ValueError(f"model: merging {path!r} gives weights that are not finite")
    try:
        for path, layer in layers.items():
            _put_in(layer, *merged[path])
        for path, values in new.items():
            rows[path].put_in(adapter, model.get_submodule(path).weight, values)
        for each in token_rows(model).values():
            each.merged = (adapter,)
        _mark(every, (adapter,))
    except BaseException:  # no memory to keep a weight, or Ctrl-C
        _take_out(model, every)
        raise
    watch_optimizers(model)  # one that steps now trains no adapter
    if losses:
        worst = max(losses, key=losses.__getitem__)
        logger.warning(
            "merge: rounding to the quantized grid moved the merged weight of %r by %.2f of its update, the most of %d "
            "layers; merge into the model in full precision to lose nothing",
            worst, losses[worst], len(losses),
        )  # fmt: skip
    if not unload:
        return model
    give_back(model)
    return eject(model)


def merge_and_unload(model: ModelT, adapter: str | None = None, **options: Any) -> ModelT:
    """``merge(model, adapter, unload=True)``, by PEFT's name; ``options`` and errors are those of :func:`merge`.

    >>> model = nn.Sequential(fastlora.nn.Linear(8, 8, r=2))
    >>> type(fastlora.merge_and_unload(model)[0])
    <class 'torch.nn.modules.linear.Linear'>
    """
    return merge(model, adapter, unload=True, **options)


def _refuse(path: str, layer: Adapted, users: Mapping[int, list[str]], requantize: bool) -> None:
    """``ValueError`` for a layer that cannot be merged."""
    foreign = foreign_base(layer)
    if foreign is not None and not requantize:
        raise ValueError(
            f"model: {path!r} is quantized ({foreign}), and rounding may lose the update; save the adapter, and load "
            "and merge it into the model in full precision, or accept the rounding with requantize=True"
        )
    if foreign is None and layer.weight.dtype.itemsize == 1:
        kind = str(layer.weight.dtype).removeprefix("torch.")
        raise ValueError(f"model: {path!r} is in {kind}, to which the update would be rounded; cast it with .to first")
    # An attention module holds the weight of its stacked projection.
    holder = path if "weight" in layer._parameters else path.rpartition(".")[0]
    if id(layer.weight) not in users:
        raise ValueError(f"model: {path!r} cannot be merged into: {recomputed(layer)}")
    sharing = [name for name in users[id(layer.weight)] if name != holder]
    if sharing:
        raise ValueError(f"model: {path!r} and {sharing[0]!r} share one weight and cannot be merged")
    if layer.merged:
        raise ValueError(f"model: {path!r} is merged already")
    if layer.groups > 1:
        raise ValueError(
            f"model: {path!r} is a convolution in {layer.groups} groups, and its adapter runs over all channels, which "
            "no such weight does; it cannot be merged"
        )


def _quantized_sum(path: str, layer: Adapted, adapter: str) -> tuple[torch.Tensor | None, float]:
    """The merged weight, quantized as the layer's is, and the rounding's norm over the update's."""
    if not any(layer.ranks(adapter).values()):
        return layer.weight, 0.0
    delta = layer.delta(adapter)
    exact = dequantized(layer) + delta
    if not exact.isfinite().all():
        return None, math.nan
    try:
        weight = requantized(layer, exact)
    except ValueError as error:
        raise ValueError(f"model: {path!r}: {error}") from error
    moved = dequantized(layer, weight) - exact
    if not moved.isfinite().all():
        return None, math.nan
    return weight, float(moved.norm() / delta.norm().clamp(min=torch.finfo(torch.float32).tiny))


def _mark(layers: Iterable[Adapted], merged: tuple[str, ...]) -> None:
    for layer in layers:
        layer.merged = merged
        layer.router.changed(None)


def _put_in(layer: Adapted, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    # The rounding of a low-precision merge cannot be undone by subtraction: keep the original.
    if foreign_base(layer) is None:
        layer.unmerged_weight = layer.weight.detach().clone()
        layer.weight.copy_(weight)
    else:
        layer.unmerged_weight = kept_weight(layer)
        replace_weight(layer, weight)
    if bias is not None:
        layer.unmerged_bias = layer.bias.detach().clone()
        layer.bias.copy_(bias)


@torch.no_grad()
def unmerge(model: ModelT) -> ModelT:
    """Put back the weights as they were before ``merge``, bit for bit; a call that was interrupted can be repeated.

    Raises ``TypeError`` for what is no model, ``ValueError`` if nothing is merged.

    >>> model = fastlora.merge(nn.Sequential(fastlora.nn.Linear(8, 8, r=2)))
    >>> fastlora.unmerge(model)[0].merged
    ()
    """
    layers = [layer for layer in _layers(model).values() if layer.merged]
    if not layers:
        raise ValueError("model: nothing is merged")
    refuse_partitioned(model)
    _take_out(model, layers)
    return model


def _take_out(model: nn.Module, layers: Iterable[Adapted]) -> None:
    """Put back what ``_put_in`` kept, wherever it came to; what was interrupted begins anew."""
    for layer in layers:
        if hasattr(layer, "unmerged_weight"):  # not where the adapter is not on this layer
            if foreign_base(layer) is None:
                layer.weight.copy_(layer.unmerged_weight)
            else:
                put_back(layer, layer.unmerged_weight)
            del layer.unmerged_weight
        if hasattr(layer, "unmerged_bias"):
            layer.bias.copy_(layer.unmerged_bias)
            del layer.unmerged_bias
    for path, rows in token_rows(model).items():
        rows.take_out(model.get_submodule(path).weight)
    _mark([layer for layer in layers if layer.merged], ())


def before_merge(model: nn.Module) -> dict[int, torch.Tensor]:
    """id of each parameter that an adapter is merged into -> its values before; of a quantized one there are none."""
    found = {}
    for layer in adapted_layers(model).values():
        for name in ("weight", "bias"):
            kept = layer.__dict__.get(f"unmerged_{name}")
            if isinstance(kept, torch.Tensor):
                found[id(getattr(layer, name))] = kept
    return found


@contextmanager
def disable_adapters(model: ModelT) -> Iterator[ModelT]:
    """Within, forwards of this thread or task are the base model's, and so is their recomputation under checkpointing.

    Raises ``TypeError`` for what is no model, ``ValueError`` while an adapter is merged: the base is not there then.

    >>> model = nn.Sequential(fastlora.nn.Linear(8, 8, r=2))
    >>> with fastlora.disable_adapters(model):
    ...     y = model(torch.ones(1, 8))
    ...
    >>> torch.equal(y, torch.nn.functional.linear(torch.ones(1, 8), model[0].weight, model[0].bias))
    True
    """
    layers = _layers(model)
    refuse_merged(layers)
    opened = [
        (router, router.open(Route(False, router.default.adapter)))
        for router in {layer.router for layer in layers.values()}
    ]
    try:
        yield model
    finally:
        for router, route in opened:
            router.close(route)
