"""A config for a model: what a ``peft.LoraConfig`` means in this model, where PEFT asks the model itself."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from ..config import LoraConfig
from .modules import has_suffix

# What peft.get_peft_model trains and saves for a task, where the model has it (it matches the ends of names).
_TASK_HEADS = {
    "SEQ_CLS": ("classifier", "pre_classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def config_for(model: nn.Module, config: Any) -> LoraConfig:
    """``LoraConfig.coerce``, with what PEFT adds for this model."""
    return _with_task_head(model, LoraConfig.coerce(config), getattr(config, "task_type", None))


def _with_task_head(model: nn.Module, config: LoraConfig, task: str | None) -> LoraConfig:
    modules = [n for n, _ in model.named_modules()]
    saved = list(config.modules_to_save or ())
    heads = [h for h in _TASK_HEADS.get(task, ()) if h not in saved and any(has_suffix(n, h) for n in modules)]
    if not heads:
        return config
    config = copy.copy(config)
    config.modules_to_save = saved + heads
    return config
