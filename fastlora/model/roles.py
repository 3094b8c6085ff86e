"""``roles``: what each role would take of a model, and why the rest is left."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .._utils.errors import check_model
from .._utils.reporting import Tabular
from ..config import ROLES
from ..nn.adapter import Slices
from ..nn.experts import ExpertStack
from ..nn.linear import Adapted
from .experts import expert_parameters, expert_stacks
from .modules import (
    class_name,
    features,
    fused_layouts,
    is_head,
    is_linear,
    is_projection,
    named_targets,
    refusal,
    role_targets,
)


@dataclass(frozen=True)
class RoleRow:
    """One matrix: the roles that take it, its slices if it holds several projections, and a remark."""

    name: str
    shape: tuple[int, ...]  # of the weight: [N, K], or [E, N, K] of experts
    roles: tuple[str, ...]
    slices: Slices | None
    remark: str


@dataclass(frozen=True)
class RoleTable(Tabular):
    """Every matrix of a model, by the roles that would take it."""

    _numbers = range(1, 2)

    rows: tuple[RoleRow, ...]

    def _parts(self) -> tuple[tuple[str, ...], list[tuple], tuple[()]]:
        cells = []
        for row in self.rows:
            parts = "" if row.slices is None else " ".join(f"{name}:{rows}" for name, rows in row.slices.items())
            if row.slices is not None and row.slices.blocks > 1:
                parts += f" in {row.slices.blocks} blocks"
            cells.append((row.name, "x".join(map(str, row.shape)), ", ".join(row.roles) or "-", parts, row.remark))
        return ("matrix", "shape", "roles", "slices", "remark"), cells, ()


def roles(model: nn.Module) -> RoleTable:
    """A table of what ``target_modules="qkv"`` and the other roles would take, and why the rest is left.

    One row a matrix: ``shape`` [N, K] ([E, N, K] for experts), ``roles``, ``slices`` (rows by name) and a ``remark``.
    The model is not changed. Raises ``TypeError`` for what is no module.

    >>> model = fastlora.nn.MultiheadAttention(8, 2)
    >>> len(fastlora.roles(model).rows)
    2
    """
    check_model(model)
    modules, layouts = named_targets(model), fused_layouts(model)
    taken = {role: frozenset(role_targets(model, role)) for role in ROLES}
    rows = []
    for name, module in modules.items():
        found = tuple(role for role in ROLES if name in taken[role])
        if is_linear(module) or (is_projection(module) and (found or isinstance(module, Adapted))):
            K, N = features(module)
            slices = module.slices if isinstance(module, Adapted) and len(module.slices) > 1 else layouts.get(name)
            remark = _remark(model, name, module, found, unknown=name in layouts and slices is None)
            rows.append(RoleRow(name, (N, K), found, slices, remark))
        elif isinstance(module, ExpertStack):
            remark = "adapted" if isinstance(module, Adapted) else refusal(model, name) or "a matrix of each expert"
            rows.append(RoleRow(name, tuple(module.weight.shape), found, None, remark))
        else:
            rows += _experts(name, module)
    return RoleTable(tuple(rows))


def _remark(model: nn.Module, name: str, module: nn.Module, found: tuple[str, ...], unknown: bool) -> str:
    if isinstance(module, Adapted):
        return "adapted"
    reason = refusal(model, name)
    if reason is not None:
        return f"cannot be adapted: {reason}"
    if is_head(model, name, module):
        return "part of the task head"
    if unknown:
        owner = ".".join(class_name(model.get_submodule(name.rpartition(".")[0])))
        return f"one matrix: how q, k and v lie in that of {owner} is not known"
    return "" if set(found) - {"all-linear"} else "of no attention, MLP or mixer that is known by its structure"


def _experts(name: str, module: nn.Module) -> list[RoleRow]:
    remark = "a parameter of experts, which no role takes: transformers' registry of experts does not run them"
    unknown = {n: shape for n, shape in expert_parameters(module).items() if n not in expert_stacks(module)}
    return [RoleRow(f"{name}.{n}", shape, (), None, remark) for n, shape in unknown.items()]
