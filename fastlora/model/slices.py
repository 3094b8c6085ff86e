"""Which targets are adapted slice by slice, and the rank that a role gives to each slice."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from torch import nn

from .._utils.errors import listed, suggestion, wrong_value
from ..config import LoraConfig
from ..nn.adapter import WHOLE, Slices, check_slice_name
from ..nn.experts import ExpertStack
from ..nn.linear import Linear
from ..nn.pointwise import Pointwise
from .modules import class_name, features, fused_layouts, has_suffix, is_projection, named_targets

logger = logging.getLogger(__name__)


def slices_of(model: nn.Module, config: LoraConfig, names: Sequence[str]) -> dict[str, Slices]:
    """How each of ``names`` is adapted: the slices of a fused matrix that is to be split, else one matrix.

    Where a config does not say, a layer that has adapters keeps its slices.
    """
    modules, split = named_targets(model), config.split_qkv
    rows = {name: features(modules[name])[1] for name in names}
    stacks = {name: modules[name].matrices() for name in names if isinstance(modules[name], ExpertStack)}
    found = {name: Slices({WHOLE: N}) for name, N in rows.items()} | stacks
    adapted = {name: modules[name].slices for name in names if isinstance(modules[name], (Linear, Pointwise))}
    held = adapted if split is None else {}
    if split is False or (split is None and _parts(config) is None):
        return found | held
    fused, unknown = fused_layouts(model), []
    if isinstance(split, Mapping):
        return found | _as_told(split, rows, fused, modules)
    for name in names:
        if name in fused and fused[name] is not None:
            found[name] = fused[name]
        elif name in fused and split is True and rows[name] % 3 == 0:
            found[name] = Slices(dict.fromkeys("qkv", rows[name] // 3))
        elif name in fused:
            unknown.append(name)
    if unknown and split is True:
        owner = ".".join(class_name(modules[unknown[0].rpartition(".")[0]]))
        raise ValueError(
            f"split_qkv: {unknown[0]!r} of {owner} does not hold q, k and v in a way that is known; split_qkv=False "
            "adapts it as one matrix"
        )
    if unknown:
        logger.warning(
            "target_modules: %s: nothing is known of how q, k and v lie in it, so that it is adapted as one matrix "
            "(fastlora.roles); split_qkv=True takes thirds of its rows", listed(unknown)
        )  # fmt: skip
    return found | held


def _as_told(
    split: Mapping[str, Mapping[str, int]],
    rows: Mapping[str, int],
    known: Mapping[str, Slices | None],
    modules: Mapping[str, nn.Module],
) -> dict[str, Slices]:
    """Slices of the matrices that ``split`` names, ``ValueError`` where they are none or are known to be others."""
    found = {}
    for pattern, told in split.items():
        hits = [pattern] if pattern in rows else [name for name in rows if has_suffix(name, pattern)]
        if not hits:
            raise wrong_value("split_qkv", "names of adapted modules", pattern, suggestion(pattern, list(rows)))
        for name in hits:
            if not is_projection(modules[name]):
                kind = type(modules[name]).__name__
                raise ValueError(
                    f"split_qkv: expected linears, or convolutions with kernels of size 1, one group and no padding, "
                    f"got {name!r}, a {kind}"
                )
            argument = f"split_qkv[{pattern!r}]"
            slices = Slices({check_slice_name(argument, n): N for n, N in told.items()}, getattr(told, "blocks", 1))
            if sum(slices.values()) != rows[name]:
                raise wrong_value(argument, f"slices of the {rows[name]} rows of {name!r}", dict(told))
            if known.get(name, slices) not in (slices, None):
                raise wrong_value(f"split_qkv[{pattern!r}]", f"the slices of {name!r}, {known[name]}", dict(told))
            found[name] = slices
    return found


# The slices that a role means, of matrices that hold others, too.
_PARTS = {"qkv": "qkv", "attention": "qkv", "mlp": ("gate", "up", "mlp")}


def _parts(config: LoraConfig) -> Sequence[str] | None:
    target = config.target_modules
    return _PARTS.get(target) if isinstance(target, str) and not config.peft_rules else None


def default_rank(config: LoraConfig, name: str, most: int) -> int:
    """The rank of a slice that no pattern speaks of: ``config.r``, or ``most`` where its few rows can have no more."""
    parts = _parts(config)
    if parts is None or name == WHOLE:
        return config.r
    return min(config.r, most) if name in parts or name.isdecimal() else 0
