"""How a state dict with adapters differs from a model that is to take it up."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .._utils.errors import listed
from ..nn.active import configs_in, refuse_merged
from ..nn.linear import adapted_layers, matrix_key
from .modules import saved_with_any


def refuse_other(model: nn.Module, state: Mapping[str, Tensor], prefix: str = "", partial: bool = False) -> set[str]:
    """``ValueError`` naming how a state dict with adapters differs from the model's; returns the keys it may lack.

    ``partial``: it is known to be one without the frozen base; otherwise names have to tell.
    """
    layers = adapted_layers(model)
    if not layers and not configs_in(model):
        return set()
    refuse_into_merged(model, state, prefix)
    given = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    if not partial and not any(_matrix(key) for key in given):
        return set()
    names = named(model)
    trained = trained_names(model)
    weights, frozen = {id(layer.weight) for layer in layers.values()}, names.keys() - trained
    base = {name for name in frozen if id(names[name]) in weights} or frozen
    # A base may have been put back into what was known to be without it.
    partial = base.isdisjoint(given) or (partial and not names.keys() <= given.keys())
    started = {n: b for n, b in model.named_buffers() if _matrix(n)}
    differences = _rank_differences({n: p for n, p in names.items() if _matrix(n)} | started, given)
    differences += [
        f"{n} is another in the checkpoint: the model was initialized from other data, or another seed"
        for n, b in started.items()
        if n in given and b.shape == given[n].shape and not torch.equal(b, given[n].to(b))
    ]
    if partial:
        differences += _other_differences(model, names, trained, given)
    if differences:
        raise ValueError(f"checkpoint: does not fit the model: {listed(differences)}")
    return {prefix + name for name in names if name not in given} if partial else set()


def refuse_into_merged(model: nn.Module, state: Mapping[str, Tensor], prefix: str = "") -> None:
    """``ValueError`` for factors without the weights, in which those that are merged would stay."""
    merged = {path: layer for path, layer in adapted_layers(model).items() if layer.merged}
    if not merged or not any(key.startswith(prefix) and _matrix(key) for key in state):
        return
    weights = {id(layer.weight) for layer in merged.values()}
    if not any(id(p) in weights and prefix + name in state for name, p in named(model).items()):
        refuse_merged(merged)


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    """Under every name, also of tied ones."""
    return dict(model.named_parameters(remove_duplicate=False))


def trained_names(model: nn.Module) -> set[str]:
    """Names of the parameters that a checkpoint holds; a schedule may hold some of them frozen for a while."""
    found = {name for name, p in named(model).items() if p.requires_grad or _matrix(name)}
    for saved in saved_with_any(model):
        found.update(name for name in named(model) if name.startswith(f"{saved}."))
    return found


def _matrix(name: str) -> tuple[str, str, str] | None:
    """(matrix key, adapter, "A" or "B") of a factor's name."""
    for factor in "AB":
        path, found, rest = name.rpartition(f".lora_{factor}.")
        adapter, dot, part = rest.rpartition(".")
        if found and dot:
            return matrix_key(path, part), adapter, factor
    return None


def _rank_differences(names: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    differences = {}
    for name in [*names, *(key for key in given if _matrix(key) and key not in names)]:
        key, adapter, factor = _matrix(name)
        mine, theirs = (d[name].shape if name in d else None for d in (names, given))
        if mine == theirs:
            continue
        ranks = [0 if shape is None else shape[0 if factor == "A" else 1] for shape in (mine, theirs)]
        text = f"{key} has rank {ranks[0]} in the model and {ranks[1]} in the checkpoint"
        if ranks[0] == ranks[1]:
            text = f"{key} has shape {tuple(mine)} in the model and {tuple(theirs)} in the checkpoint"
        differences.setdefault((key, adapter), text + ("" if adapter == "default" else f" (adapter {adapter!r})"))
    return list(differences.values())


def _other_differences(
    model: nn.Module, names: Mapping[str, nn.Parameter], trained: set[str], given: Mapping[str, Tensor]
) -> list[str]:
    """What is trained besides adapters, in the model or in the checkpoint alone."""
    there = {id(names[key]) for key in given if key in names}
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    found = []
    for name in sorted(trained):
        if not _matrix(name) and id(names[name]) not in there:
            found.append(f"{name} is trained in the model and not in the checkpoint")
    for key, tensor in given.items():
        if _matrix(key) or key in buffers:
            continue
        if key not in names:
            if not key.endswith("_extra_state"):
                found.append(f"{key} is in the checkpoint and not in the model")
        elif key not in trained:
            found.append(f"{key} is trained in the checkpoint and frozen in the model")
        elif names[key].shape != tensor.shape:
            shapes = tuple(names[key].shape), tuple(tensor.shape)
            found.append(f"{key} has shape {shapes[0]} in the model and {shapes[1]} in the checkpoint")
    return found
