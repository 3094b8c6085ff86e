"""to_peft, from_peft, load_layout (loralib, torchtune)."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import pathlib
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._utils.distributed import shards, unwrapped
from .._utils.errors import (
    check_choice,
    check_instance,
    check_mapping,
    check_model,
    check_number,
    listed,
    suggestion,
    wrong_type,
    wrong_value,
)
from .._utils.installed import blame_extra
from .._utils.types import ModelT
from ..config import FROM_WEIGHT
from ..model.eject import eject
from ..model.inject import check_adapter_name, sharing_copy
from ..model.modules import features, is_linear
from ..nn.active import chosen_adapter
from ..nn.experts import ExpertProjection
from ..nn.linear import DEFAULT, Linear, adapted_layers
from .effect import warn_of_convolutions
from .folder import CONFIG, AdapterFolder, Side, Slice
from .load import load_folder
from .names import PREFIX, StoredNames, base_names, choose_targets, parse_fields, patterns
from .save import write_adapter

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)


def _import_peft(asker: str) -> Any:
    """PEFT; ``ImportError`` that names the extra without it."""
    try:
        import peft
    except ModuleNotFoundError as error:
        blame_extra(error, asker, "peft", "peft")
        raise
    return peft


@torch.inference_mode(False)  # what is made here is no inference tensor, wherever it is made
def to_peft(model: nn.Module, adapter: str | None = None) -> PeftModel:
    r"""A ``peft.PeftModel`` with one adapter of ``model`` (the active one unless named), and the same outputs.

    .. math:: y = x W^\top + b + s\, x A^\top B^\top,\qquad s = \mathrm{lora\_alpha} / r

    with ``s`` and r of each matrix in ``alpha_pattern`` and ``rank_pattern``. ``model`` stays as it is. Frozen
    parameters are shared, not copied: merging in one of the two models would change both. Factors and what was trained
    besides are copies, trainable there. PEFT to 0.21 counts ``out_proj`` of ``nn.MultiheadAttention`` twice: its
    scaling is halved in the returned model, and not in what PEFT would save. PEFT has no dropout in
    ``nn.MultiheadAttention``. A warning names what PEFT runs otherwise all the same, as that of ``save``.

    Raises ``TypeError`` or ``ValueError`` naming the argument for what ``save`` refuses, a merged or sharded model, and
    an adapter that PEFT cannot run; ``ImportError`` without PEFT.

    >>> model = fastlora.to_peft(nn.Sequential(fastlora.nn.Linear(8, 8, r=2)))
    >>> model.peft_config["default"].r
    2
    """
    peft = _import_peft("fastlora.to_peft")
    inner = unwrapped(model)
    adapter = chosen_adapter(inner, adapter)
    if shards(inner):
        raise ValueError("model: is sharded by fully_shard; save the adapter, and load it into PEFT in one process")
    merged = [path for path, layer in adapted_layers(inner).items() if layer.merged]
    if merged:
        raise ValueError(f"model: {merged[0]!r} is merged; call fastlora.unmerge first")
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(inner, folder, adapter, save_embedding_layers=False, over_rest=True)
        init = _without_init(pathlib.Path(folder) / CONFIG)
        base = eject(sharing_copy(inner))
        modes = [(module, module.training) for module in base.modules()]
        try:
            handed = peft.PeftModel.from_pretrained(base, folder, adapter_name=adapter, is_trainable=True)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ValueError(f"model: PEFT cannot take adapter {adapter!r}: {error}") from error
    _refuse_lost(handed, inner, adapter)
    handed.peft_config[adapter].init_lora_weights = init
    handed.train(inner.training)
    for module, training in modes:
        module.training = training
    for attention in _peft_attentions(handed):
        attention.base_layer.out_proj.scaling[adapter] /= _out_proj_counts()
    return handed


def _refuse_lost(handed: Any, model: nn.Module, adapter: str) -> None:
    """``ValueError`` for matrices whose adapters PEFT put on other modules, as on stacked weights of experts."""
    names, modules = StoredNames(model), dict(handed.base_model.model.named_modules(remove_duplicate=False))
    lost = []
    for path, layer in adapted_layers(model).items():
        there = modules.get(names.module(names.stored(path)))
        if isinstance(layer, ExpertProjection):
            continue
        held = [getattr(there, side, {}) for side in ("lora_A", "lora_embedding_A")]
        if adapter in layer.ranked and not any(adapter in side for side in held):
            lost.append(path)
        elif adapter in layer.ranked and isinstance(layer, Linear) and names.stored(path) == path:
            mine = torch.cat([a.detach() for a in layer.lora_A[adapter].tensors().values() if a is not None])
            theirs = held[0][adapter].weight.detach()
            if not torch.allclose(mine.float(), theirs.float(), rtol=1e-2, atol=1e-6):
                lost.append(path)
    if lost:
        raise ValueError(
            f"model: PEFT puts the adapters of {listed(lost)} elsewhere: it takes their names for experts' weights"
        )


@torch.inference_mode(False)  # what is made here is no inference tensor, wherever it is made
def from_peft(peft_model: Any, adapter: str | None = None) -> nn.Module:
    """The base model under a ``peft.PeftModel``, injected, with one of its LoRA adapters and the same outputs.

    ``adapter`` names it, and may be left out where one is active. It becomes ``"default"``, trainable. ``peft_model``
    stays as it is. Frozen parameters are shared, not copied: merging in one of the two models would change both. A
    warning names convolutions that PEFT runs so when it has merged them alone, and an initialisation that nothing here
    goes on from (``pissa_niter_n``, ``corda``, ``lora_ga``, ``loftq``, ``mica``).

    Raises ``TypeError`` or ``ValueError`` naming the argument for a model of another kind, a merged one, several active
    adapters and variants that are not implemented (``use_qalora`` and others, by their field); ``ImportError`` without
    PEFT.

    >>> model = fastlora.to_peft(nn.Sequential(fastlora.nn.Linear(8, 8, r=2)))
    >>> fastlora.from_peft(model)[0].ranks()
    {'weight': 2}
    """
    peft = _import_peft("fastlora.from_peft")
    check_instance("peft_model", peft_model, peft.PeftModel, _accepted(peft_model))
    adapter = _chosen(peft_model, adapter)
    tuned = [(n, m) for n, m in peft_model.named_modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)]
    merged = [name for name, module in tuned if module.merged]
    if merged:
        raise ValueError(f"peft_model: {merged[0]!r} is merged; call unmerge_adapter() first")
    folder = _in_memory(peft_model, adapter, peft.get_peft_model_state_dict)
    trained = folder.fields.bias != "none"
    own = {id(p) for n, p in peft_model.named_parameters() if (trained and n.endswith("bias")) or _is_peft_s(n)}
    wrapped = sharing_copy(peft_model, own)
    wrapped.set_adapter(adapter)
    for name, parameter in wrapped.named_parameters():
        # An adapter that was loaded for inference is frozen there, with its head.
        if _is_peft_s(name) or (trained and name.endswith("bias")):
            parameter.requires_grad_()
    model = wrapped.base_model.unload()
    plan = load_folder(model, folder)
    init = _init_of(peft_model.peft_config[adapter].init_lora_weights)
    model.fastlora_configs[DEFAULT].init_lora_weights = init
    for layer in adapted_layers(model).values():
        layer.adapter_specs[DEFAULT] = replace(layer.adapter_specs[DEFAULT], init=init)
    _take_scales(model, tuned, adapter, folder.fields.parameters(model, folder.where(CONFIG)))
    warn_of_convolutions("peft_model", model, plan.matrices)
    return model


class _InMemory(AdapterFolder):
    """What PEFT's files would hold, of something that errors name instead."""

    def where(self, name: str) -> str:
        return str(self.path)


def _in_memory(peft_model: Any, adapter: str, state_dict_of: Callable[..., dict[str, Tensor]]) -> AdapterFolder:
    """One adapter as files would hold it, but that its patterns keep their order: the first that matches counts.

    Its factors are taken as they are, over the frozen weight as it is, whatever they started from.
    """
    raw = {**peft_model.peft_config[adapter].to_dict(), "init_lora_weights": True}
    fields = parse_fields(json.loads(json.dumps(raw, default=sorted)), "peft_model")
    held = state_dict_of(peft_model, adapter_name=adapter, save_embedding_layers=False)
    tensors = {key: value.detach() for key, value in held.items() if isinstance(value, Tensor)}
    return _InMemory(pathlib.Path("peft_model"), fields, tensors, None, "")


def _accepted(peft_model: Any) -> str:
    if getattr(peft_model, "_hf_peft_config_loaded", False):
        return (
            "a peft.PeftModel (what model.add_adapter has made goes by files: model.save_pretrained(folder), then "
            "fastlora.load(base, folder) with the base made anew)"
        )
    return "a peft.PeftModel"


def _init_of(init: bool | str) -> bool | str:
    """The start that the new model's config names, with a warning where it cannot be that of ``peft_model``."""
    known = init.lower() if isinstance(init, str) else init
    if known in (True, False, "gaussian", "orthogonal", "eva", *FROM_WEIGHT):
        return known
    then = "the frozen weights are what it left of the base's, and files of the new model are for these alone"
    if known == "mica":
        then = "both factors train here, and PEFT trains A alone"
    logger.warning("peft_model: init_lora_weights=%r becomes True: %s", init, then)
    return True


def _without_init(path: pathlib.Path) -> Any:
    """Let a saved config start from nothing: the base that is handed over is already what its initialisation left."""
    fields = json.loads(path.read_text())
    init, fields["init_lora_weights"] = fields["init_lora_weights"], True
    path.write_text(json.dumps(fields))
    return init


def _take_scales(model: nn.Module, tuned: list[tuple[str, Any]], adapter: str, parameters: Sequence[str]) -> None:
    """The ``s`` that PEFT's layers run with, which need not be the one of their config."""
    layers, names = adapted_layers(model), StoredNames(model, parameters)
    for name, module in tuned:
        path = names.path(name.removeprefix(PREFIX))
        if path in layers and adapter in module.scaling:
            twice = path != names.stored(path) and path.endswith(".out_proj")
            s = module.scaling[adapter] * (_out_proj_counts() if twice else 1)
            layers[path].rescale(DEFAULT, dict.fromkeys(layers[path].slices, s))


def _chosen(peft_model: Any, adapter: str | None) -> str:
    """The adapter that is meant, a LoRA one."""
    known = sorted(peft_model.peft_config)
    if adapter is None:
        active = list(peft_model.active_adapters)
        if len(active) != 1:
            raise ValueError(f"adapter: expected the name of one of {known}, since several are active: {active}")
        adapter = active[0]
    check_choice("adapter", adapter, known)
    kind = getattr(peft_model.peft_config[adapter].peft_type, "value", None)
    if kind != "LORA":
        raise ValueError(f"peft_model: expected {adapter!r} to be of type LORA, got {kind}")
    return adapter


def _is_peft_s(name: str) -> bool:
    return any(part in name for part in (".lora_", ".modules_to_save.", ".original_module."))


def _peft_attentions(peft_model: nn.Module) -> list[Any]:
    from peft.tuners.lora.layer import MultiheadAttention

    return [m for m in peft_model.modules() if isinstance(m, MultiheadAttention)]


@functools.cache
def _out_proj_counts() -> int:
    """How often this PEFT adds the update of an attention's out_proj (0.21.2: twice; huggingface/peft#3774)."""
    import peft

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = nn.ModuleDict({"attn": nn.MultiheadAttention(2, 1)})
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=1, lora_alpha=1, target_modules=["attn"]))
        attention = _peft_attentions(wrapped)[0]
        layer = attention.base_layer.out_proj
        for factor in (layer.lora_A, layer.lora_B):
            factor["default"].weight.fill_(1.0)
        before = layer.get_base_layer().weight.clone()
        attention.merge()
        return round(float((layer.get_base_layer().weight - before).mean()))


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
    model: ModelT,
    state_dict: Mapping[str, Tensor],
    layout: str,
    *,
    lora_alpha: float,
    rename: Mapping[str, str] | Callable[[str], str] | None = None,
    enable_lora: Sequence[bool] | None = None,
    adapter: str | None = None,
) -> ModelT:
    r"""Load the adapters of a ``state_dict`` in the layout of another library; returns the same model, injected.

    .. math:: y = x W^\top + b + s\, x A^\top B^\top,\qquad s = \mathrm{lora\_alpha} / r

    ``"loralib"``: ``<path>.lora_A`` [r, K] and ``<path>.lora_B`` [N, r], as from ``loralib.lora_state_dict``. Its
    ``MergedLinear`` stacks the parts of a fused q, k, v that ``enable_lora`` names: A [r e, K], B [N e / 3, r]; they
    become one adapter each. ``"torchtune"``: ``<path>.lora_a.weight`` and ``<path>.lora_b.weight``.

    ``rename`` maps a path there to the path here. ``adapter`` names the adapter here, as for ``load``. All or nothing:
    ``TypeError`` or ``ValueError`` naming the argument, or the key and what is wrong with it, leaves the model as it
    was; keys that are no adapters (biases, a head) are refused, because they belong to ``model.load_state_dict``.
    Source: https://github.com/microsoft/LoRA, https://github.com/pytorch/torchtune

    >>> state = {"0.lora_A": torch.ones(2, 8), "0.lora_B": torch.ones(8, 2)}
    >>> model = fastlora.load_layout(nn.Sequential(nn.Linear(8, 8)), state, "loralib", lora_alpha=4)
    >>> model[0].ranks()
    {'weight': 2}
    """
    check_number("lora_alpha", lora_alpha)
    check_model(model)
    if adapter is not None:
        check_adapter_name(adapter, "adapter")
    _check_flags(enable_lora)
    pairs = _renamed(_pairs(state_dict, layout), rename)
    modules = dict(model.named_modules())
    unknown = [path for path in pairs if not is_linear(modules.get(path))]
    if unknown:
        near = suggestion(unknown[0], [n for n, m in modules.items() if is_linear(m)])
        raise ValueError(f"state_dict: expected linears of {type(model).__name__}, got {listed(unknown)}{near}")
    matrices = {p: _converted(p, *pair, features(modules[p]), lora_alpha, enable_lora) for p, pair in pairs.items()}
    targets = choose_targets(list(matrices), base_names(model))
    load_folder(model, _folder(matrices, layout, targets, lora_alpha), adapter)
    return model


def _check_flags(enable_lora: Any) -> None:
    accepted = "True or False for each part of a fused matrix"
    if enable_lora is None:
        return
    if not isinstance(enable_lora, Sequence) or not all(isinstance(flag, bool) for flag in enable_lora):
        raise wrong_type("enable_lora", accepted, enable_lora)
    if not enable_lora:
        raise wrong_value("enable_lora", accepted, enable_lora)


def _pairs(state_dict: Mapping[str, Tensor], layout: str) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) by path, both there and both matrices."""
    check_choice("layout", layout, LAYOUTS)
    check_mapping("state_dict", state_dict, "names to tensors")
    found: dict[str, dict[str, Tensor]] = {}
    others = []
    for key, tensor in state_dict.items():
        match = LAYOUTS[layout].fullmatch(key) if isinstance(key, str) else None
        if match is None:
            others.append(key)
            continue
        if not isinstance(tensor, Tensor) or tensor.ndim != 2 or not tensor.is_floating_point():
            raise wrong_value(f"state_dict[{key!r}]", "a floating matrix", tensor)
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
        for path in rename:
            if path not in pairs:
                raise wrong_value("rename", "paths in state_dict", path, suggestion(str(path), list(pairs)))
        names = {path: rename.get(path, path) for path in pairs}
    elif callable(rename):
        names = {path: rename(path) for path in pairs}
    else:
        raise wrong_type("rename", "a mapping or a function of paths", rename)
    for path, name in names.items():
        if not isinstance(name, str) or list(names.values()).count(name) > 1:
            raise wrong_value("rename", f"one name for each path, for {path!r} too", name)
    return {names[path]: pair for path, pair in pairs.items()}


def _converted(
    path: str, A: Tensor, B: Tensor, sizes: tuple[int, int], alpha: float, enable_lora: Sequence[bool] | None
) -> _Converted:
    r, (in_features, out_features) = B.shape[1], sizes
    if r == 0 or A.shape[0] == 0:
        raise ValueError(f"state_dict: {path!r} has rank 0")
    if A.shape[1] != in_features:
        raise ValueError(f"state_dict: expected A of {path!r} with {in_features} columns, got {tuple(A.shape)}")
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


def layout_files(
    state_dict: Mapping[str, Tensor], layout: str, lora_alpha: float
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """adapter_config.json and the tensors of PEFT's files for a ``state_dict`` of another library, without the model.

    Raises as ``load_layout``, and for a fused matrix in parts, whose rows only the model knows.
    """
    check_number("lora_alpha", lora_alpha)
    pairs = _pairs(state_dict, layout)
    for path, (A, B) in pairs.items():
        if len(A) != B.shape[1] or not len(A):
            raise ValueError(
                f"state_dict: {path!r} has A {tuple(A.shape)} and B {tuple(B.shape)}, which are not of one rank; "
                "fastlora.load_layout takes parts of a fused matrix (enable_lora), and fastlora.save writes them"
            )
    ranks = {path: len(A) for path, (A, _) in pairs.items()}
    fields = {**patterns(ranks, dict.fromkeys(ranks, lora_alpha)), "peft_type": "LORA", "target_modules": list(pairs)}
    return fields, _keys(pairs)


def _keys(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return {
        f"{PREFIX}{path}.lora_{f}.weight": t for path, pair in pairs.items() for f, t in zip("AB", pair, strict=True)
    }


def _folder(matrices: Mapping[str, _Converted], layout: str, targets: list[str] | str, alpha: float) -> AdapterFolder:
    """What PEFT's files would hold."""
    ranks = {path: m.A.shape[0] for path, m in matrices.items()}
    fields = {
        **patterns(ranks, {path: m.scale * ranks[path] for path, m in matrices.items()}),
        "peft_type": "LORA",
        "target_modules": targets,
    }
    tensors = _keys({path: (m.A, m.B) for path, m in matrices.items()})
    where = pathlib.Path(f"state_dict ({layout})")
    split = {path: m.slices for path, m in matrices.items() if m.slices}
    r = next(x.rank for slices in (*split.values(), [Slice("", 1, 1, 1.0)]) for x in slices if x.rank)
    rule = {"mode": "per_rank", "r": r, "lora_alpha": alpha, "use_rslora": False}
    digest = hashlib.sha256(layout.encode()).hexdigest()
    side = Side(split, rule, (), digest, None) if split else None
    return _InMemory(where, parse_fields(fields, str(where)), tensors, side, digest)
