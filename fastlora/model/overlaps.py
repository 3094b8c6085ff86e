"""Where adapters of one model get into each other's way: what one trains whole, another adapts or has rows of."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from ..nn.linear import adapted_layers
from ..nn.token_rows import embeddings_with_rows
from .modules import inside

_OTHER = "of another adapter; a module is adapted or trained, not both"


def refuse_overlaps(model: nn.Module, targets: Collection[str], saved: Collection[str], known: Collection[str]) -> None:
    """``ValueError`` where a new adapter's ``targets`` are among the ``known`` modules that others save, or the modules
    that it would save hold what others adapt."""
    for path, layer in adapted_layers(model).items():
        if layer.adapter_specs and inside(path, saved):
            raise ValueError(f"modules_to_save: {path!r} is a target {_OTHER}")
    for path in embeddings_with_rows(model):
        if inside(path, saved):
            raise ValueError(f"modules_to_save: {path!r} has trained rows {_OTHER}")
    for path in targets:
        if inside(path, known):
            raise ValueError(f"target_modules: {path!r} is in modules_to_save {_OTHER}")
