"""Fold adapters into the frozen weights and take them out again; switch them off for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .nn.foreign import foreign_base
from .nn.linear import DEFAULT, Linear, adapted_layers
from .parallel import shards
from .routing import Route


def _layers(model: nn.Module) -> dict[str, Linear]:
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("model: has no adapters; call fastlora.inject first")
    return layers


@torch.no_grad()
def merge(model: nn.Module, adapter: str = DEFAULT) -> nn.Module:
    """``W ← W + s B A``, summed in fp32 (float64 for float64) by blocks of rows and rounded once to the weight's dtype.

    The forward is then the base's alone. All layers or none: a delta or a merged weight that is not finite raises
    ``ValueError`` naming the layer before any weight changes, as does a layer that is merged already.
    """
    layers = _layers(model)
    if shards(model):
        raise ValueError("model: is sharded by fully_shard; save the adapter, and load and merge it in one process")
    names = sorted({name for layer in layers.values() for name in layer.adapter_names})
    if adapter not in names:
        raise ValueError(f"adapter: expected one of {names}, got {adapter!r}")
    layers = {path: layer for path, layer in layers.items() if layer.merged or adapter in layer.adapter_specs}
    merged: dict[str, torch.Tensor] = {}
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            users.setdefault(id(parameter), []).append(name)
    for path, layer in layers.items():
        foreign = foreign_base(layer)
        if foreign is not None:
            raise ValueError(
                f"model: {path!r} is quantised ({foreign}), and rounding would lose the update; save the adapter, and "
                "load and merge it into the model in full precision"
            )
        # An attention module holds the weight of its stacked projection.
        holder = path if "weight" in layer._parameters else path.rpartition(".")[0]
        sharing = [name for name in users[id(layer.weight)] if name != holder]
        if sharing:
            raise ValueError(f"model: {path!r} and {sharing[0]!r} share one weight and cannot be merged")
        if layer.merged:
            raise ValueError(f"model: {path!r} is merged already")
        weight = layer.merged_weight(adapter)
        if weight is None:
            raise ValueError(f"model: merging {path!r} gives weights that are not finite")
        merged[path] = weight
    for path, layer in layers.items():
        # The rounding of a low-precision merge cannot be undone by subtraction: keep the original.
        layer.unmerged_weight = layer.weight.detach().clone()
        layer.weight.copy_(merged[path])
        layer.merged = (adapter,)
    return model


@torch.no_grad()
def unmerge(model: nn.Module) -> nn.Module:
    """Put back the weights as they were before ``merge``, bit for bit; ``ValueError`` if nothing is merged."""
    layers = [layer for layer in _layers(model).values() if layer.merged]
    if not layers:
        raise ValueError("model: nothing is merged")
    for layer in layers:
        layer.weight.copy_(layer.unmerged_weight)
        del layer.unmerged_weight
        layer.merged = ()
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, every forward of this thread is the base model's; so is one that checkpointing repeats later."""
    routers = {layer.router for layer in _layers(model).values()}
    before = [(router, router.open(Route(False, router.default.adapter))) for router in routers]
    try:
        yield model
    finally:
        for router, route in before:
            router.open(route, reopened=True)
