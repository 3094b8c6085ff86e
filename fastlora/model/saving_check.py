"""Keeps other libraries' savers from dropping adapters in silence."""

from __future__ import annotations

import logging
import sys
from typing import Any

from torch import nn

from ..nn.linear import adapted_layers

logger = logging.getLogger(__name__)

_SAVERS = {("save_pretrained", "transformers"): "from_pretrained", ("_save", "timm"): "a plain model"}
_HOW = "fastlora.save writes the adapter, and fastlora.merge(model, unload=True) makes a plain model with its update"


def watch_savers(model: nn.Module) -> None:
    """See to it that ``save_pretrained`` of transformers is refused while the model has adapters, and timm's saver warns.

    Their files hold factors under names that ``from_pretrained`` and plain models drop.
    """
    model.fastlora_saving = model.register_state_dict_post_hook(_after_state_dict)


def _after_state_dict(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    reader, library = _saver()
    layers = adapted_layers(module) if reader is not None else {}
    unmerged = [path for path, layer in layers.items() if not layer.merged and layer.ranked]
    if unmerged and library == "transformers":
        raise ValueError(f"model: {reader} would drop the adapter of {unmerged[0]!r}; {_HOW}")
    if unmerged:
        logger.warning("the checkpoint has adapters, which %s does not load; %s", reader, _HOW)
        return
    for path, layer in layers.items():
        inside = tuple(f"{prefix}{path}.lora_{side}." if path else f"{prefix}lora_{side}." for side in "AB")
        for key in [key for key in state if key.startswith(inside)]:
            del state[key]


def _saver() -> tuple[str | None, str]:
    """Who reads what the running saver writes, and the saver's library."""
    frame = sys._getframe(2)
    while frame is not None:
        library = frame.f_globals.get("__name__", "").partition(".")[0]
        reader = _SAVERS.get((frame.f_code.co_name, library))
        if reader is not None:
            return reader, library
        frame = frame.f_back
    return None, ""
