"""Which parameters hold the matrices of experts, and which linears are experts."""

from __future__ import annotations

import re

from torch import nn

from .._utils.distributed import is_sharded
from ..nn.experts import UNREGISTERED, ExpertProjection, ExpertStack, class_path

_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")
_LISTS = re.compile(r"(^|\.)(?!shared)\w*experts$")


def expert_parameters(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes [E, N, K] of the parameters that hold the matrices of several experts."""
    named = module._parameters.items()
    expert = "expert" in type(module).__name__.lower()
    return {name: tuple(p.shape) for name, p in named if expert and p is not None and p.dim() == 3}


def expert_stacks(module: nn.Module) -> dict[str, ExpertStack]:
    """Those of an experts module that transformers' registry runs, by name; adapted ones as they are."""
    registered = hasattr(type(module), "_apply_gate") and hasattr(module, "is_transposed")
    if not registered and class_path(module) not in UNREGISTERED:
        return {}
    adapted = {p.leaf: p for p in module.children() if isinstance(p, ExpertProjection)}
    names = [name for name in expert_parameters(module) if name in _PARAMETERS]
    return {name: adapted.get(name) or ExpertStack(module, name) for name in names}


def stack_refusal(stack: ExpertStack) -> str | None:
    """Why the parameter of an experts module cannot be adapted, or None."""
    owner, weight = stack.owner, stack.weight
    kind, gated = class_path(owner), getattr(owner, "has_gate", True)
    if getattr(owner, "_is_expert_parallel", False) or is_sharded(weight):
        return "its experts are spread over processes (expert or tensor parallel)"
    known = hasattr(type(owner).forward, "__wrapped__") or kind in UNREGISTERED
    if not known or "forward" in vars(owner):
        return f"the forward of {kind} is not the one that transformers' registry of experts runs"
    if not weight.is_floating_point() or weight.dtype.itemsize == 1:
        return f"it is in {str(weight.dtype).removeprefix('torch.')}, quantized"
    up, down = (ExpertStack(owner, name) for name in ("gate_up_proj" if gated else "up_proj", "down_proj"))
    sizes = [(s.weight.shape[0], s.out_features // s.weight.shape[0], s.in_features) for s in (up, down)]
    count, inner = owner.num_experts, down.in_features * (2 if gated else 1)
    if {n for n, _, _ in sizes} != {count} or sizes[0][1] != inner or sizes[0][2] != sizes[1][1]:
        shapes = f"{tuple(up.weight.shape)} and {tuple(down.weight.shape)}"
        said = f"is_transposed={up.transposed}, {count} experts"
        return f"{shapes} of {kind} are not the layout that it says: {said}"
    return None


def expert_linears(model: nn.Module) -> set[str]:
    """Full names of the linears of experts that are modules in a list."""
    lists = [n for n, m in model.named_modules() if isinstance(m, (nn.ModuleList, nn.ModuleDict)) and _LISTS.search(n)]
    below = tuple(f"{name}." for name in lists)
    return {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(below)} if below else set()
