"""Ranks and targets by how hard a task is."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from .choices import unknown
from .config import LoraConfig

# difficulty -> (r, lora_alpha, target_modules)
PRESETS: Mapping[str, tuple[int, int, str]] = MappingProxyType(
    {
        "simple": (8, 16, "attention"),
        "medium": (16, 32, "all-linear"),
        "complex": (32, 64, "all-linear"),
        "very_complex": (64, 128, "all-linear"),
    }
)


def preset(difficulty: str, **fields: Any) -> LoraConfig:
    """A ``LoraConfig`` for a task: r / alpha 8 / 16 on the attention, 16 / 32, 32 / 64 or 64 / 128 on all linears.

    ``difficulty``: ``"simple"``, ``"medium"``, ``"complex"``, ``"very_complex"``. ``fields`` override any field. A
    fused qkv gets one dense adapter unless ``split_qkv=True``. Raises ``ValueError`` for an unknown difficulty and for
    fields that ``LoraConfig`` refuses.
    """
    if not isinstance(difficulty, str) or difficulty not in PRESETS:
        raise unknown("difficulty", difficulty, tuple(PRESETS))
    r, alpha, targets = PRESETS[difficulty]
    return LoraConfig(**{"r": r, "lora_alpha": alpha, "target_modules": targets, "split_qkv": False, **fields})
