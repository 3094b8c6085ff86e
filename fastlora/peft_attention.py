"""PEFT's names for ``nn.MultiheadAttention``: both projections go by the attention's name, with one rank and scale."""

from __future__ import annotations

from torch import nn

from .targets import torch_attentions

_OUTPUT = ".base_layer.out_proj"


class StoredNames:
    """Three names of a matrix: its path here, its path in the file's keys, and the module that PEFT adapts.

    ``attn.in_proj`` is ``attn`` and ``attn`` there, ``attn.out_proj`` is ``attn.base_layer.out_proj`` and ``attn``; any
    other path is the same everywhere.
    """

    def __init__(self, model: nn.Module):
        self.attentions = set(torch_attentions(model))

    def stored(self, path: str) -> str:
        owner, _, leaf = path.rpartition(".")
        if owner not in self.attentions or leaf not in ("in_proj", "out_proj"):
            return path
        return owner if leaf == "in_proj" else owner + _OUTPUT

    def path(self, stored: str) -> str:
        if stored in self.attentions:
            return f"{stored}.in_proj"
        owner = self.module(stored)
        return stored if owner == stored else f"{owner}.out_proj"

    def module(self, stored: str) -> str:
        owner = stored.removesuffix(_OUTPUT)
        return owner if owner in self.attentions else stored

    def keys_of(self, module: str) -> tuple[str, ...]:
        """The paths in keys of what PEFT adapts under a module's name."""
        return (module, module + _OUTPUT) if module in self.attentions else (module,)

    @property
    def inputs(self) -> list[str]:
        """Paths of the stacked projections, which are modules here only where they have an adapter."""
        return [f"{attention}.in_proj" for attention in self.attentions]

    def beside(self, path: str) -> tuple[str, ...]:
        """The paths that share a rank and a scale in the file with this one, itself among them."""
        owner = self.module(self.stored(path))
        return (f"{owner}.in_proj", f"{owner}.out_proj") if owner in self.attentions else (path,)
