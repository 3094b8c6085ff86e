"""Keeps other libraries' savers from dropping adapters in silence."""

from __future__ import annotations

import logging
import sys
from typing import Any

from torch import nn

from ..nn.linear import adapted_layers
from ..nn.token_rows import LEAF, token_rows
from .state_differences import refuse_into_merged, refuse_other

logger = logging.getLogger(__name__)

_HOW = "fastlora.save writes the adapter, and fastlora.merge(model, unload=True) makes a plain model with its update"


def watch_savers(model: nn.Module) -> None:
    """See to it that transformers' ``save_pretrained`` is refused while the model has adapters that are not merged.

    Its files hold factors under names that ``from_pretrained`` drops. timm's saver and ``Trainer.save_model``, whose
    files an adapted model can take up, warn. Lightning's ``load_from_checkpoint`` takes up adapters alone. A merged
    model refuses factors that come without the weight.
    """
    model.fastlora_saving = model.register_state_dict_post_hook(_after_state_dict)
    model.fastlora_loading = model.register_load_state_dict_pre_hook(_before_load)
    model.fastlora_loaded = model.register_load_state_dict_post_hook(_after_load)


def _before_load(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Lightning's ``load_from_checkpoint`` takes up what its callback made small: the base may be missing."""
    refuse_into_merged(module, state, prefix)
    module.fastlora_optional = set()
    if any(function == "load_from_checkpoint" for _, function in running()):
        module.fastlora_optional = refuse_other(module, state, prefix)
    if module.fastlora_optional:
        logger.warning(
            "the checkpoint has adapters without the frozen base, which stays as the module's __init__ made it"
        )


def _after_load(module: nn.Module, incompatible: Any) -> None:
    optional = module.__dict__.pop("fastlora_optional", ())
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key not in optional]


def _after_state_dict(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    frames = running()
    hugging_face = ("transformers", "save_pretrained") in frames
    # A Trainer's checkpoints are for resuming, with the adapters in place.
    if ("transformers", "_save_checkpoint") in frames or not (hugging_face or ("timm", "_save") in frames):
        return
    layers = adapted_layers(module)
    unmerged = [path for path, layer in layers.items() if not layer.merged and layer.ranked]
    if unmerged and hugging_face and ("transformers", "save_model") not in frames:
        raise ValueError(f"model: from_pretrained would drop the adapter of {unmerged[0]!r}; {_HOW}")
    if unmerged:
        reader = "from_pretrained" if hugging_face else "a plain model"
        logger.warning("the file that is saved has adapters, which %s does not load; %s", reader, _HOW)
        return
    inside = [f"{prefix}{path}.lora_{side}." if path else f"{prefix}lora_{side}." for path in layers for side in "AB"]
    inside += [f"{prefix}{path}.{LEAF}." for path in token_rows(module)]
    for key in [key for key in state if key.startswith(tuple(inside))]:
        del state[key]


def running() -> set[tuple[str, str]]:
    """(library, function) of every frame that is running, from a state dict's hook."""
    found, frame = set(), sys._getframe(2)
    while frame is not None:
        found.add((frame.f_globals.get("__name__", "").partition(".")[0], frame.f_code.co_name))
        frame = frame.f_back
    return found
