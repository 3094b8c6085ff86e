"""A config for a model: what a ``peft.LoraConfig`` means in this model, where PEFT asks the model itself."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from .._utils.errors import listed
from ..config import LoraConfig
from ..nn.active import own_modules
from .modules import has_suffix, named_by

# What peft.get_peft_model trains and saves for a task, where the model has it.
_TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def config_for(model: nn.Module, config: Any) -> LoraConfig:
    """``LoraConfig.coerce``, and of a ``peft.LoraConfig`` what ``peft.get_peft_model`` makes of it in this model.

    Raises what that raises, and ``ValueError`` for targets that PEFT takes for what has no adapter here.
    """
    taken = LoraConfig.coerce(config)
    if taken is config:
        return taken
    given, names = copy.deepcopy(config), [name for name in own_modules(model) if name]
    heads = [h for h in _TASK_HEADS.get(given.task_type, ()) if _ends(h, names)]
    given.modules_to_save = list(dict.fromkeys([*(given.modules_to_save or ()), *heads])) or None
    _take_experts(model, given, names)
    if given.target_modules is None:
        given.target_modules = _targets_of_type(model, names)
    taken = LoraConfig.coerce(given)
    saved: list[str] = []
    for entry in taken.modules_to_save or ():
        hits = _ends(entry, names)
        saved += [entry] if set(hits) <= {*named_by(model, [entry])} else hits
    taken.modules_to_save = saved or None
    return taken


def _ends(entry: str, names: Iterable[str]) -> list[str]:
    """What an entry of ``modules_to_save`` means to PEFT, which compares the ends of names, and not at dots."""
    return [name for name in names if name.endswith(entry)]


def every_linear(model: nn.Module, linears: Iterable[str]) -> list[str]:
    """What ``"all-linear"`` means to PEFT: the linears but the output embedding of a model of transformers."""
    output = model.get_output_embeddings() if _is_transformers(model) else None
    return [name for name in linears if model.get_submodule(name) is not output]


def _is_transformers(model: nn.Module) -> bool:
    kinds = ((kind.__module__.partition(".")[0], kind.__name__) for kind in type(model).__mro__)
    return ("transformers", "PreTrainedModel") in kinds


def _take_experts(model: nn.Module, config: Any, names: Collection[str]) -> None:
    """Let PEFT change a config in place as for a model whose experts transformers 5 has stacked."""
    if not _is_transformers(model):
        return
    try:
        from peft.utils.transformers_weight_conversion import (
            convert_peft_config_for_transformers,
            get_model_conversion_mapping,
        )
    except ImportError:  # a PEFT, or transformers, before that change
        return
    before, parameters = config.target_modules, set(config.target_parameters or ())
    try:
        convert_peft_config_for_transformers(config, model=model, conversions=get_model_conversion_mapping(model))
    except ValueError as error:
        raise ValueError(f"target_modules: PEFT does not take it for {type(model).__name__}: {error}") from error
    routers = sorted(p for p in set(config.target_parameters or ()) - parameters if p.endswith(".weight"))
    if routers:
        raise ValueError(
            f"target_modules: PEFT takes {before!r} in {type(model).__name__} for {listed(routers)}, too, a router, "
            "which has no adapter here; name the others in a list"
        )
    if isinstance(before, str) and not isinstance(config.target_modules, str):
        # Names out of an expression, of parameters and containers among others.
        config.target_modules = _found(config.target_modules, names)


def _targets_of_type(model: nn.Module, names: Collection[str]) -> str | list[str] | None:
    """PEFT's own targets for a type of model; as there, those that this one has."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as table

    targets = table.get(getattr(getattr(model, "config", None), "model_type", None))
    return targets if targets is None or isinstance(targets, str) else _found(targets, names) or None


def _found(suffixes: Iterable[str], names: Collection[str]) -> list[str]:
    return sorted(suffix for suffix in suffixes if any(has_suffix(name, suffix) for name in names))
