"""Which adapter a function means that was given none: the active one; and what is kept of adapters in a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from .._utils.errors import check_choice, check_model
from ..config import LoraConfig
from .linear import Linear, adapted_layers
from .token_rows import token_rows

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


def join(path: str, name: str) -> str:
    """The path of what is called ``name`` inside the module at ``path``."""
    return f"{path}.{name}" if path else name


def own_modules(model: nn.Module, remove_duplicate: bool = True) -> dict[str, nn.Module]:
    """Every module by name but for what adapters brought, whose names are those of adapters: factors, trained rows."""
    brought = [rows for rows in token_rows(model).values()]
    brought += [factors for layer in adapted_layers(model).values() for factors in (layer.lora_A, layer.lora_B)]
    inside = {id(part) for each in brought for part in each.modules()}
    named = model.named_modules(remove_duplicate=remove_duplicate)
    return {name: module for name, module in named if id(module) not in inside}


def kept_inside(model: nn.Module, attribute: str) -> dict[str, Any]:
    """What is kept as an attribute of modules inside ``model``, itself among them, by their paths."""
    return {path: vars(m)[attribute] for path, m in check_model(model).named_modules() if attribute in vars(m)}


def adapted_models(model: nn.Module) -> dict[str, nn.Module]:
    """The models inside ``model`` that ``inject`` was called on by path, or ``model``: a part of one, or made by hand.

    Whoever is given a model around them, or a part, finds here and in ``config_of`` what belongs to its layers.
    """
    return {path: model.get_submodule(path) for path in kept_inside(model, "fastlora_configs")} or {"": model}


def configs_in(model: nn.Module) -> list[dict[str, LoraConfig]]:
    """The configs by adapter of each adapted model inside ``model``; of a part of one, those of the whole."""
    routers = [layer.router for layer in adapted_layers(model).values()]
    return list(kept_inside(model, "fastlora_configs").values()) or [router.configs for router in routers]


def config_of(model: nn.Module, adapter: str | None) -> LoraConfig | None:
    """The config of an adapter; None for layers built by hand, and where those of models inside ``model`` differ."""
    found = [configs[adapter] for configs in configs_in(model) if adapter in configs]
    alike = [replace(config, modules_to_save=None) for config in found]  # which each model has by its own names
    return found[0] if found and alike.count(alike[0]) == len(alike) else None


def refuse_merged(layers: Mapping[str, Linear], but: str | None = None) -> None:
    """``ValueError`` where another adapter than ``but`` is merged: only that one can run."""
    for path, layer in layers.items():
        if layer.merged and layer.merged != (but,):
            raise ValueError(f"model: {layer.merged[0]!r} is merged into {path!r}; call fastlora.unmerge first")


def refuse_part(model: nn.Module, function: str, adapter: str | None = None) -> None:
    """``ValueError`` for a part of what was adapted: layers outside would go on with the adapter, or with any."""
    inside = [*adapted_layers(model).values(), *token_rows(model).values()]
    known, routers = {id(holder) for holder in inside}, {id(holder.router): holder.router for holder in inside}
    around = [holder for router in routers.values() for holder in router.holders if id(holder) not in known]
    names = [name for holder in around for name in holder.adapter_names if adapter in (None, name)]
    if names:
        raise ValueError(
            f"model: adapter {names[0]!r} has layers outside of it, too; call fastlora.{function} with a model around "
            "them all"
        )
