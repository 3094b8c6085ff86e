"""What a parameter is to an optimiser or a count: adapter, norm, bias, head, or something else."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from .blocks import is_norm
from .nn.linear import DEFAULT, adapted_layers
from .roles import HEADS, is_head

ROLES_OF_PARAMETERS = ("lora", "norm", "bias", "head", "other")


class AppliedPolicy(NamedTuple):
    """Which policy a model carries, and its head; kept as ``model.fastlora_policy``."""

    name: str
    heads: tuple[str, ...]


def parameter_roles(model: nn.Module, adapter: str = DEFAULT) -> dict[int, str]:
    """id of each parameter -> its role (``ROLES_OF_PARAMETERS``).

    ``head``: inside a module that is trained and saved whole and is no norm. ``norm``: of a norm outside the head; its
    bias is a ``bias`` where the weight stays frozen.
    """
    roles = {id(p): "bias" if n == "bias" or n.endswith(".bias") else "other" for n, p in model.named_parameters()}
    for module in model.modules():
        if is_norm(module):
            own = dict(module.named_parameters(recurse=False))
            if any(p.requires_grad for n, p in own.items() if n != "bias"):
                roles.update((id(p), "norm") for p in own.values())
    modules = dict(model.named_modules())
    for name in head_modules(model, adapter):
        roles.update((id(p), "head") for p in modules[name].parameters())
    for layer in adapted_layers(model).values():
        roles.update((id(p), "lora") for f in (layer.lora_A, layer.lora_B) for p in f.parameters())
    return roles


def saved_modules(model: nn.Module, adapter: str = DEFAULT) -> list[str]:
    """Full names of the modules that are trained and saved whole (``modules_to_save``)."""
    config = getattr(model, "fastlora_configs", {}).get(adapter)
    wanted = list(config.modules_to_save or ()) if config is not None else []
    return [n for n, _ in model.named_modules() if any(n == w or n.endswith("." + w) for w in wanted)]


def task_heads(model: nn.Module) -> list[str]:
    """Full names of the modules that classify; the output embedding of a language model is none."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and is_head(model, name, module) and not _embeds(model, module):
            top = name.partition(".")[0]
            found.append(top if top in HEADS else name)
    return list(dict.fromkeys(found))


def _embeds(model: nn.Module, head: nn.Module) -> bool:
    getters = [getattr(m, "get_output_embeddings", None) for m in model.modules()]
    return any(get() is head for get in getters if callable(get))


def head_modules(model: nn.Module, adapter: str = DEFAULT) -> list[str]:
    """Full names of the modules that are trained whole and are no norms."""
    applied = getattr(model, "fastlora_policy", None)
    names = [*saved_modules(model, adapter), *(applied.heads if applied is not None else ())]
    modules = dict(model.named_modules())
    return [n for n in dict.fromkeys(names) if not is_norm(modules[n])]
