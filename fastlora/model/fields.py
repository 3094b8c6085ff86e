"""What fields of a config ask beyond factors on a list of layers, and where they cannot be had."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from .._utils.errors import suggestion, wrong_value
from ..config import FROM_WEIGHT, LoraConfig, indices_of, layer_index, takes_weight
from ..nn.active import own_modules
from ..nn.adapter import WHOLE
from ..nn.experts import ExpertStack
from ..nn.layer_view import Conv1D
from ..nn.linear import Linear, QKVLinear
from ..nn.plain import CONVOLUTIONS
from ..nn.quantized import foreign_base
from .modules import (
    PLAIN_LINEARS,
    adapted_class,
    features,
    has_suffix,
    pattern_matches,
    tied_embeddings,
    users_of_parameters,
)


def of_layers(config: LoraConfig, names: list[str]) -> list[str]:
    """Those of the layers that ``layers_to_transform`` gives; as in PEFT, a full name in a list is always meant."""
    wanted, target = indices_of(config.layers_to_transform), config.target_modules
    if not wanted:
        return names
    own = () if isinstance(target, str) else target
    index_of = {n: layer_index(n, config.layers_pattern) for n in names}
    missing = sorted(set(wanted) - set(index_of.values()))
    if missing:
        known = sorted({i for i in index_of.values() if i is not None})
        raise wrong_value("layers_to_transform", f"indices of layers that hold targets, of {known}", missing)
    return [n for n in names if n in own or index_of[n] in wanted]


def with_tied(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """``ensure_weight_tying``: the input embedding in the place of all in ``modules_to_save`` that share its weight."""
    source, *followers = tied_embeddings(model) if config.ensure_weight_tying and config.modules_to_save else [""]
    names, saved, taken = own_modules(model), [], False
    for entry in config.modules_to_save or () if followers else ():
        hits = [n for n in names if has_suffix(n, entry)]
        taken |= not {source, *followers}.isdisjoint(hits)
        saved += [n for n in hits if n not in followers] if not set(followers).isdisjoint(hits) else [entry]
    if not taken:
        return config
    covered = any(has_suffix(source, entry) for entry in saved)
    config = copy.copy(config)
    config.modules_to_save = saved if covered else [*saved, source]
    return config


def refuse_tying(model: nn.Module, config: Any, names: Collection[str]) -> None:
    """``ensure_weight_tying``: ``ValueError`` where a target is tied."""
    if not config.ensure_weight_tying:
        return
    for paths in users_of_parameters(model).values():
        tied = [path for path in paths if path in names]
        if tied and len(paths) > 1:
            raise ValueError(
                f"ensure_weight_tying: {paths[0]!r} and {paths[1]!r} share one weight, and adapters of the two would "
                f"not be one; adapt one of them without ensure_weight_tying, or name {tied[0]!r} in modules_to_save"
            )


def refuse_beyond_factors(
    name: str, layer: nn.Module, config: LoraConfig, ranks: Mapping[str, int], users: Mapping[int, list[str]]
) -> None:
    """``ValueError`` for a layer that cannot have what a config asks for beside factors that start anyhow."""
    init = config.init_lora_weights
    wanted = [field for field in ("use_dora", "lora_bias") if getattr(config, field)]
    wanted += ["init_lora_weights"] if init == "orthogonal" or takes_weight(init) else []
    linear = type(layer) in (*PLAIN_LINEARS, Linear, QKVLinear) or adapted_class(layer, False) is Conv1D
    linear |= isinstance(layer, Conv1D)
    if isinstance(layer, CONVOLUTIONS) and wanted == ["lora_bias"]:
        return
    if isinstance(layer, ExpertStack) and init == "eva":
        raise wrong_value("init_lora_weights", f"one that needs no covariance, for experts as {name!r}", init)
    if isinstance(layer, ExpertStack) and config.lora_dropout:
        raise wrong_value(
            "lora_dropout", f"0 with experts, as in PEFT, of which {name!r} are some", config.lora_dropout
        )
    if wanted and (not linear or foreign_base(layer) is not None):
        kind = "of experts" if isinstance(layer, ExpertStack) else foreign_base(layer) or type(layer).__name__
        raise ValueError(
            f"{wanted[0]}: {getattr(config, wanted[0])!r} is implemented for nn.Linear and Conv1D, and {name!r} is "
            f"{kind}; leave it out by exclude_modules, or use plain LoRA"
        )
    if layer.weight.is_meta and (config.use_dora or takes_weight(init)):
        raise ValueError(f"{wanted[0]}: takes the values of a weight, and that of {name!r} is on the meta device")
    if init in FROM_WEIGHT and set(ranks) != {WHOLE}:
        raise ValueError(
            f"init_lora_weights: {init!r} takes a matrix as a whole, as who reads the file does, and {name!r} is split "
            f"into {list(ranks)}; pass split_qkv=False"
        )
    if takes_weight(init) and len(users[id(layer.weight)]) > 1:
        raise ValueError(f"init_lora_weights: {init!r} changes the weight of {name!r}, which other modules share")
    if takes_weight(init) and not bool(layer.weight.isfinite().all()):
        raise ValueError(
            f"init_lora_weights: {init!r} takes a part of the weight, and that of {name!r} has values that are not "
            "finite"
        )
    if takes_weight(init) and max(ranks.values()) > min(features(layer)):
        raise ValueError(
            f"init_lora_weights: {init!r} takes ranks up to {min(features(layer))} in {name!r}, got {ranks}"
        )


def pattern_lookup(config: LoraConfig, field: str, keys: list[str], attentions: Collection[str]) -> dict[str, Any]:
    """Value of each matrix: its exact key wins, then its path, then the first suffix or PEFT pattern that matches.

    A pattern that is a matrix's exact name means it alone. A ``peft.LoraConfig`` keeps PEFT's rule: the first match.
    The name of an ``nn.MultiheadAttention`` means both of its projections.
    """
    found: dict[str, tuple[int, Any]] = {}
    known = {*keys}
    for pattern, value in getattr(config, field).items():
        if not config.peft_rules and pattern in known:
            found[pattern] = (3, value)
            continue
        strengths = {k: _match_strength(pattern, k, not config.peft_rules, attentions) for k in keys}
        best = max(strengths.values())
        if best == 0:
            raise wrong_value(field, "patterns that match an adapted matrix", pattern, suggestion(pattern, keys))
        for key, strength in strengths.items():
            wanted = strength > 0 if best == 1 else strength > 1
            if wanted and (key not in found or strength > found[key][0]):
                found[key] = (strength, value)
    return {key: value for key, (_, value) in found.items()}


def _match_strength(pattern: str, key: str, exact_names_first: bool, attentions: Collection[str]) -> int:
    path = key.partition("[")[0]
    owner = path.rpartition(".")[0]
    if owner in attentions and (has_suffix(owner, pattern) or pattern_matches(pattern, owner)):
        return 1
    if exact_names_first and pattern in (key, path):
        return 3 if pattern == key else 2
    return int(has_suffix(key, pattern) or pattern_matches(pattern, path))
