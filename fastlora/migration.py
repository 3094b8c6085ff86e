"""State dicts of loralib and torchtune as adapters: ``load_layout``."""

from __future__ import annotations

import hashlib
import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from .choices import suggestion, unknown
from .nn.linear import DEFAULT, check_adapter
from .peft_files import AdapterFolder, Side, Slice
from .peft_load import load_folder
from .peft_names import PREFIX, base_names, choose_targets, listed, parse_fields, patterns
from .targets import features, is_linear

LAYOUTS = {
    "loralib": re.compile(r"(?P<path>.+)\.lora_(?P<factor>[AB])"),
    "torchtune": re.compile(r"(?P<path>.+)\.lora_(?P<factor>[ab])\.weight"),
}


@dataclass(frozen=True)
class _Converted:
    """One matrix: A [R, K], B [N, R], its scale, and the slices of loralib's ``MergedLinear``."""

    A: Tensor
    B: Tensor
    scale: float
    slices: tuple[Slice, ...]


def load_layout(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    layout: str,
    *,
    lora_alpha: float,
    rename: Mapping[str, str] | Callable[[str], str] | None = None,
    enable_lora: Sequence[bool] | None = None,
    adapter: str = DEFAULT,
) -> nn.Module:
    r"""Load the adapters of a ``state_dict`` in the layout of another library; returns the same model, injected.

    .. math:: y = x W^\top + b + s\, x A^\top B^\top,\qquad s = \mathrm{lora\_alpha} / r

    ``"loralib"``: ``<path>.lora_A`` [r, K] and ``<path>.lora_B`` [N, r], as from ``loralib.lora_state_dict``. Its
    ``MergedLinear`` stacks the parts of a fused q, k, v that ``enable_lora`` names: A [r e, K], B [N e / 3, r]; they
    become one adapter each. ``"torchtune"``: ``<path>.lora_a.weight`` and ``<path>.lora_b.weight``.

    ``rename`` maps a path there to the path here. A model with adapters gets one more, named ``adapter``. All or
    nothing: ``ValueError`` naming the argument, or the key and what is wrong with it, leaves the model as it was; keys
    that are no adapters (biases, a head) are refused, because they belong to ``model.load_state_dict``.
    Source: https://github.com/microsoft/LoRA, https://github.com/pytorch/torchtune
    """
    if isinstance(lora_alpha, bool) or not isinstance(lora_alpha, (int, float)) or not math.isfinite(lora_alpha):
        raise ValueError(f"lora_alpha: expected a finite number, got {lora_alpha!r}")
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    check_adapter(adapter)
    if enable_lora is not None and not (
        isinstance(enable_lora, Sequence) and enable_lora and all(isinstance(flag, bool) for flag in enable_lora)
    ):
        raise ValueError(f"enable_lora: expected True or False for each part of a fused matrix, got {enable_lora!r}")
    pairs = _renamed(_pairs(state_dict, layout), rename)
    modules = dict(model.named_modules())
    unknown = [path for path in pairs if not is_linear(modules.get(path))]
    if unknown:
        near = suggestion(unknown[0], [n for n, m in modules.items() if is_linear(m)])
        raise ValueError(f"state_dict: adapts {listed(unknown)}, which {type(model).__name__} has no linear for{near}")
    matrices = {p: _converted(p, *pair, features(modules[p]), lora_alpha, enable_lora) for p, pair in pairs.items()}
    targets = choose_targets(list(matrices), base_names(model))
    load_folder(model, _folder(matrices, layout, targets, lora_alpha), adapter)
    return model


def _pairs(state_dict: Mapping[str, Tensor], layout: str) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) by path, both there and both matrices."""
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise unknown("layout", layout, tuple(LAYOUTS))
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"state_dict: expected a mapping of names to tensors, got {type(state_dict).__name__}")
    found: dict[str, dict[str, Tensor]] = {}
    others = []
    for key, tensor in state_dict.items():
        match = LAYOUTS[layout].fullmatch(key) if isinstance(key, str) else None
        if match is None:
            others.append(key)
            continue
        if not isinstance(tensor, Tensor) or tensor.ndim != 2 or not tensor.is_floating_point():
            shape = (tensor.dtype, tuple(tensor.shape)) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"state_dict: {key!r}: expected a floating matrix, got {shape}")
        found.setdefault(match["path"], {})[match["factor"].upper()] = tensor.detach()
    if others:
        raise ValueError(
            f"state_dict: these keys are no adapters in {layout}'s layout: {listed(map(str, others))}; load them with "
            "model.load_state_dict(..., strict=False) first and leave them out here"
        )
    if not found:
        raise ValueError(f"state_dict: has no keys of {layout}'s layout")
    for path, pair in found.items():
        for factor in "AB":
            if factor not in pair:
                raise ValueError(f"state_dict: {path!r} has no {factor}")
    return {path: (pair["A"], pair["B"]) for path, pair in found.items()}


def _renamed(pairs: dict[str, tuple[Tensor, Tensor]], rename: Mapping[str, str] | Callable[[str], str] | None):
    if rename is None:
        return pairs
    if isinstance(rename, Mapping):
        unknown = [path for path in rename if path not in pairs]
        if unknown:
            raise ValueError(f"rename: {unknown[0]!r} is not in state_dict{suggestion(str(unknown[0]), list(pairs))}")
        names = {path: rename.get(path, path) for path in pairs}
    elif callable(rename):
        names = {path: rename(path) for path in pairs}
    else:
        raise ValueError(f"rename: expected a mapping or a function of paths, got {type(rename).__name__}")
    for path, name in names.items():
        if not isinstance(name, str) or list(names.values()).count(name) > 1:
            raise ValueError(f"rename: {path!r} becomes {name!r}, expected one name for each path")
    return {names[path]: pair for path, pair in pairs.items()}


def _converted(
    path: str, A: Tensor, B: Tensor, sizes: tuple[int, int], alpha: float, enable_lora: Sequence[bool] | None
) -> _Converted:
    r, (in_features, out_features) = B.shape[1], sizes
    if r == 0 or A.shape[0] == 0:
        raise ValueError(f"state_dict: {path!r} has rank 0")
    if A.shape[1] != in_features:
        raise ValueError(f"state_dict: {path!r} has A {tuple(A.shape)}, expected {in_features} columns")
    if A.shape[0] == r and B.shape[0] == out_features:
        return _Converted(A, B, alpha / r, ())
    flags = list(enable_lora) if enable_lora is not None else []
    parts = sum(map(bool, flags))
    if not parts or A.shape[0] != r * parts or B.shape[0] * len(flags) != out_features * parts:
        given = f"enable_lora={enable_lora!r}" if flags else "enable_lora, which a loralib.MergedLinear needs"
        raise ValueError(
            f"state_dict: {path!r} has A {tuple(A.shape)} and B {tuple(B.shape)} for {out_features} outputs; "
            f"that does not go with {given}"
        )
    return _Converted(A, _block_diagonal(A, B, flags), alpha / r, _slices(path, flags, out_features, r))


def _block_diagonal(A: Tensor, B: Tensor, flags: Sequence[bool]) -> Tensor:
    """loralib's grouped B [N e / g, r] as [N, e r], the rows of parts without an adapter zero."""
    r, rows = B.shape[1], B.shape[0] // sum(map(bool, flags))
    full, used = B.new_zeros(rows * len(flags), A.shape[0]), 0
    for index, flag in enumerate(flags):
        if flag:
            block = B[used * rows : (used + 1) * rows]
            full[index * rows : (index + 1) * rows, used * r : (used + 1) * r] = block
            used += 1
    return full


def _slices(path: str, flags: Sequence[bool], out_features: int, r: int) -> tuple[Slice, ...]:
    if len(flags) != 3:
        raise ValueError(f"enable_lora: expected a flag for each of q, k and v, as {path!r} is one matrix of the three")
    return tuple(Slice(n, out_features // 3, r if f else 0, 1.0) for n, f in zip("qkv", flags, strict=True))


def _folder(matrices: Mapping[str, _Converted], layout: str, targets: list[str] | str, alpha: float) -> AdapterFolder:
    """What PEFT's files would hold."""
    ranks = {path: m.A.shape[0] for path, m in matrices.items()}
    fields = {
        **patterns(ranks, {path: m.scale * ranks[path] for path, m in matrices.items()}),
        "peft_type": "LORA",
        "target_modules": targets,
    }
    tensors = {f"{PREFIX}{p}.lora_{f}.weight": t for p, m in matrices.items() for f, t in (("A", m.A), ("B", m.B))}
    where = pathlib.Path(f"state_dict ({layout})")
    split = {path: m.slices for path, m in matrices.items() if m.slices}
    r = next(x.rank for slices in (*split.values(), [Slice("", 1, 1, 1.0)]) for x in slices if x.rank)
    rule = {"mode": "per_rank", "r": r, "lora_alpha": alpha, "use_rslora": False}
    digest = hashlib.sha256(layout.encode()).hexdigest()
    side = Side(split, rule, (), digest, None) if split else None
    return AdapterFolder(where, parse_fields(fields, str(where)), tensors, side, digest)
