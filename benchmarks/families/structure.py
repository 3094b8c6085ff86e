"""What the roles take of a model's structure, and why they leave the rest."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Iterable

from torch import nn

import fastlora
from fastlora.config import ROLES
from fastlora.model.modules import attention_blocks, is_linear, role_targets

_ELSEWHERE = {"all-linear"}  # roles that are not of this table


def role_counts(model: nn.Module) -> dict[str, int]:
    """How many matrices each role takes, of those that are about a part of the model."""
    found = {role: len(role_targets(model, role)) for role in ROLES if role not in _ELSEWHERE}
    return {role: count for role, count in found.items() if count}


def left_over(model: nn.Module) -> list[str]:
    """Last names of the matrices that none of these roles takes."""
    rows = fastlora.roles(model).rows
    left = {row.name.rpartition(".")[2] or row.name for row in rows if not set(row.roles) - _ELSEWHERE}
    return sorted(left)


def unknown_layouts(model: nn.Module) -> list[str]:
    """Fused matrices that are adapted whole because nobody read how their rows lie."""
    return [name for block in attention_blocks(model) for name, layout in block.layouts.items() if layout is None]


def contained(model: nn.Module, roles: Iterable[str]) -> set[str]:
    """Roles all of whose matrices another one takes."""
    taken = {role: set(role_targets(model, role)) for role in roles}
    return {role for role, names in taken.items() if any(names < other for other in taken.values())}


def attention_code(model: nn.Module) -> str:
    """A name for the forwards of the owners of q, k and v, alike for classes that differ in their names alone."""
    owners = [model.get_submodule(block.owner) for block in attention_blocks(model)]
    kinds = {(type(owner), type(getattr(owner, "processor", None))) for owner in owners}
    found = set()
    for owner, processor in kinds:
        functions = [owner.forward] if processor is type(None) else [owner.forward, processor.__call__]
        code = [inspect.getsource(inspect.unwrap(function)) for function in functions]
        words = re.sub(r"[A-Z]\w*", "Name", "".join(code))
        found.add(hashlib.sha1(words.encode()).hexdigest()[:8])
    return " ".join(sorted(found))


def experts_left(model: nn.Module) -> str:
    """Why no role takes the matrices of some experts, or nothing."""
    taken = set(role_targets(model, "experts"))
    for path, owner in model.named_modules():
        for leaf, parameter in owner._parameters.items() if "expert" in type(owner).__name__.lower() else ():
            if parameter is not None and parameter.dim() > 1 and "bias" not in leaf and f"{path}.{leaf}" not in taken:
                return (
                    f"{leaf} of {type(owner).__name__} is in no role: transformers' registry of experts does not run it"
                )
    return ""


NO_ATTENTION = "no attention"
_OF_ATTENTION = re.compile(r"attn|attention|mhsa|mla$|token_mixer", re.IGNORECASE)


def why_no_attention(model: nn.Module) -> str:
    """Why a model has no q, k and v for a role."""
    blocks = {
        name: m for name, m in model.named_modules()
        if _OF_ATTENTION.search(type(m).__name__) and "squeezeex" not in type(m).__name__.lower()
    }  # fmt: skip
    inside = [(n, c) for n, m in blocks.items() for p, c in m.named_modules(prefix=n) for n in [p]]
    if any(is_linear(c) for _, c in inside):
        return "linears in " + ", ".join(sorted({type(m).__name__ for m in blocks.values()})[:3]) + " of no known names"
    convolution = next((n for n, c in inside if isinstance(c, (nn.Conv1d, nn.Conv2d))), None)
    if convolution is not None:
        return (
            f"its attention is of convolutions in groups or over several positions ({convolution}), which are adapted "
            "by name and are in no role"
        )
    other = next((c for _, c in inside if getattr(getattr(c, "weight", None), "ndim", 0) == 2), None)
    if other is not None and not isinstance(other, nn.Embedding):
        return f"its attention is of {type(other).__name__}, which is no nn.Linear"
    return NO_ATTENTION
