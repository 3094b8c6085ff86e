"""Which adapter a function means that was given none: the active one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from .._utils.errors import check_choice
from .linear import Linear, adapted_layers

NO_ADAPTERS = "model: has no adapters; call fastlora.inject first"


def names_of(layers: Iterable[Linear]) -> list[str]:
    """The adapters of these layers, in the order in which they were added."""
    layers = list(layers)
    order = dict.fromkeys(name for layer in layers for name in layer.router.names)
    here = dict.fromkeys(name for layer in layers for name in layer.adapter_names)
    return [name for name in {**order, **here} if name in here]


def chosen_adapter(model: nn.Module, adapter: Any = None) -> str:
    """The adapter of this name, or the active one: that of forwards outside of every context (``set_adapter``).

    Raises ``ValueError`` for a model without adapters, for a name that no layer has, and where layers that were built
    by hand have several active ones.
    """
    layers = list(adapted_layers(model).values())
    names = names_of(layers)
    if not names:
        raise ValueError(NO_ADAPTERS)
    if adapter is not None:
        return check_choice("adapter", adapter, names)
    active = list(dict.fromkeys(layer.router.default.adapter for layer in layers))
    if len(active) > 1:
        raise ValueError(f"adapter: expected a name, since the layers have different active ones: {active}")
    return active[0]


def refuse_merged(layers: Mapping[str, Linear], but: str | None = None) -> None:
    """``ValueError`` where another adapter than ``but`` is merged: only that one can run."""
    for path, layer in layers.items():
        if layer.merged and layer.merged != (but,):
            raise ValueError(f"model: {layer.merged[0]!r} is merged into {path!r}; call fastlora.unmerge first")
