"""Save adapters as PEFT's files and load PEFT's files: ``save``, ``load``."""

from __future__ import annotations

import math
import os
import pathlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._utils.distributed import once, ranks_of, reshard, shards, unwrapped, whole
from .._utils.errors import check_choice, check_flag, check_instance, check_mapping, listed, wrong_value
from ..config import FROM_WEIGHT, LoraConfig, power_iterations
from ..model.merge import before_merge
from ..model.modules import named_targets, refuse_shared, saved_with_any
from ..model.replaced_check import refuse_replaced
from ..nn.active import chosen_adapter, config_of, configs_in, kept_inside, own_modules
from ..nn.adapter import WHOLE
from ..nn.experts import ExpertProjection
from ..nn.layer_view import Conv1D
from ..nn.linear import Linear, adapted_layers
from ..nn.plain import CONVOLUTIONS, Plain, kernel_shapes
from ..nn.pointwise import Pointwise
from ..nn.token_rows import token_rows
from .effect import warn_of_peft
from .experts import experts_stacked
from .folder import FORMAT_VERSION, Slice, write_folder
from .frozen import frozen_to_save
from .names import (
    BESIDE,
    PREFIX,
    StoredNames,
    base_names,
    bias_tensors,
    choose_saved,
    choose_targets,
    factor_key,
    followers_of,
    patterns,
    rows_key,
    saved_tensors,
    unranked_biases,
    without_containers,
)


def save(
    model: nn.Module,
    path: str | os.PathLike,
    adapter: str | None = None,
    *,
    fold_scale: bool = False,
    importance: Mapping[str, float] | None = None,
    save_embedding_layers: bool | str = "auto",
) -> None:
    r"""Write an adapter into the folder ``path`` as PEFT's two files, and ``fastlora.json`` beside them.

    ``adapter``: the active one (``set_adapter``) unless named. Keys ``base_model.model.<path>.lora_A.weight`` [R, K]
    and ``.lora_B.weight`` [N, R]; a split q/k/v leaves as one matrix, A stacked and B block-diagonal, R = r_q + r_k +
    r_v. Each matrix gets ``lora_alpha = s R``, so that PEFT computes the same ``s``; with ``fold_scale`` it is 1 and B
    is multiplied by s. Matrices of rank 0 are left out.
    ``nn.MultiheadAttention`` has one rank and one ``s`` for both projections there: zeros fill the smaller one.
    ``modules_to_save``, which the adapters of a model share, and the biases of ``bias=`` go along, with ``"lora_only"``
    those of targets without a rank, too; ``importance`` (scores by matrix) goes into the side file.

    ``save_embedding_layers``: also the frozen input and output embeddings, as in PEFT. ``"auto"``: where
    ``model.config`` has another size of the vocabulary than that of the checkpoint the model was made from, of targets
    named ``embed_tokens`` and ``lm_head`` these, and what a loaded file brought. The config of the base is read from
    disk only; a warning names the embeddings where it is not there.

    The first rank alone writes under data-parallel training; of a sharded model (``fully_shard``) every rank must call
    this, and waits for the files. They appear complete or not at all, also when the process is killed. A warning names
    the matrices that PEFT would load and run otherwise, or not at all. Raises ``TypeError`` for an argument of another
    type and ``ValueError``, before anything is written, for a model without this adapter and for trained parameters
    that the files have no place for, by name; ``OSError`` where they cannot be written, with the old ones still there.

    >>> model = nn.Sequential(fastlora.nn.Linear(8, 8, r=2))
    >>> fastlora.save(model, folder)
    >>> sorted(file.name for file in folder.iterdir())
    ['adapter_config.json', 'adapter_model.safetensors', 'fastlora.json']
    """
    write_adapter(
        model,
        path,
        adapter,
        fold_scale=fold_scale,
        importance=importance,
        save_embedding_layers=save_embedding_layers,
    )


def write_adapter(
    model: nn.Module,
    path: str | os.PathLike,
    adapter: str | None,
    *,
    fold_scale: bool = False,
    importance: Mapping[str, float] | None = None,
    save_embedding_layers: bool | str = "auto",
    over_rest: bool = False,
) -> None:
    """``save``; with ``over_rest`` for the frozen weight as it is, although a part of it was taken into the factors."""
    check_instance("path", path, (str, os.PathLike), "the path of a folder")
    check_flag("fold_scale", fold_scale)
    check_choice("save_embedding_layers", save_embedding_layers, ("auto", True, False))
    given, ranks, model = model, ranks_of(model), unwrapped(model)
    sharded = bool(shards(model))
    reshard(model)
    adapter = _saveable_adapter(model, adapter)
    refuse_replaced(given)
    layers = _saveable(model, adapter)
    config = config_of(model, adapter) or _config_of(layers, adapter)
    if fold_scale and config.init_lora_weights == "olora":
        raise ValueError("fold_scale: expected False for init_lora_weights='olora', whose frozen weight depends on s")
    if config.init_lora_weights in ("corda", "lora_ga") or power_iterations(config.init_lora_weights) is not None:
        config = replace(config, init_lora_weights=True)  # the file's factors say what was taken out of the weight
    if any(each.ensure_weight_tying for configs in configs_in(model) for each in configs.values()):
        config = replace(config, ensure_weight_tying=True)  # of an adapter that shares its modules to save
    names = StoredNames(model, [path for path, layer in layers.items() if isinstance(layer, ExpertProjection)])
    matrices = _matrices(model, names, layers, adapter, fold_scale, over_rest)
    stored = {path: names.stored(path) for path in matrices}
    adapted = {names.module(name): matrices[path] for path, name in stored.items()}
    saved = without_containers(model, saved_with_any(model))
    every_name = base_names(model, remove_duplicate=False)
    spec, taken = choose_saved(saved, config.modules_to_save or (), every_name, list(adapted))
    refuse_shared(model, taken, "model", config.ensure_weight_tying)
    biases = bias_tensors(model, config.bias, stored, taken, unranked_biases(model, adapter, config.bias, stored))
    _refuse_untold(model, taken, biases)
    fields = _fields(model, config, adapted, spec)
    tensors = _tensors(model, layers, matrices, stored, adapter, fold_scale) | biases
    tensors |= saved_tensors(model, [*taken, *followers_of(model, taken, config)])
    rows = token_rows(model, adapter)
    tensors |= {rows_key(path): each.rows(adapter) for path, each in rows.items()}
    frozen = frozen_to_save(model, save_embedding_layers, layers, adapter, stored, rows)
    own = {id(t) for t in tensors.values()}  # of tied weights that are trained, too, once is enough
    tensors |= {key: t for key, t in frozen.items() if id(t) not in own}
    if rows:
        fields["trainable_token_indices"] = {path: list(each.indices[adapter]) for path, each in rows.items()}
    interleaved = any(s.blocks > 1 for m in matrices.values() for s in m.slices)
    side = {
        "format_version": FORMAT_VERSION if interleaved else 1,
        "split": {n: [asdict(s) for s in m.slices] for n, m in matrices.items() if m.slices},
        "scale": _rule(config, fields, fold_scale),
        "modules_to_save": saved,
        **({} if importance is None else {"importance": _plain(importance)}),
    }
    base = before_merge(model)
    whole_tensors = {k: _detached(k, base.get(id(t), t)) for k, t in tensors.items()}
    once(ranks, sharded, lambda: write_folder(pathlib.Path(path), fields, whole_tensors, side))
    warn_of_peft(model, layers)


@dataclass(frozen=True)
class _Stored:
    """One matrix as PEFT stores it."""

    A: Tensor
    B: Tensor
    alpha: float
    slices: tuple[Slice, ...]
    rank_of_each: int | None = None  # of experts, whose ranks lie beside each other in A

    @property
    def rank(self) -> int:
        return self.A.shape[0] if self.rank_of_each is None else self.rank_of_each


def _tensors(
    model: nn.Module,
    layers: Mapping[str, Linear],
    matrices: Mapping[str, _Stored],
    stored: Mapping[str, str],
    adapter: str,
    fold: bool,
) -> dict[str, Tensor]:
    """PEFT's keys of the adapter's own tensors."""
    modules, out = named_targets(model), {}
    for path, matrix in matrices.items():
        out |= {factor_key(stored[path], f, modules[path]): t for f, t in (("A", matrix.A), ("B", matrix.B))}
        own = layers[path].lora_B[adapter].beside() if path in layers else {}
        if fold and "bias" in own:
            own["bias"] = own["bias"] * layers[path].bias_scale(adapter)
        out |= {f"{PREFIX}{stored[path]}.lora_{key}": own[here] for key, here in BESIDE.items() if here in own}
    return out


def _fields(model: nn.Module, config: LoraConfig, matrices: Mapping[str, _Stored], saved: list[str]) -> dict[str, Any]:
    """adapter_config.json: fields that every version of PEFT knows, and no others."""
    ranks, alphas = {n: m.rank for n, m in matrices.items()}, {n: m.alpha for n, m in matrices.items()}
    stacks = [name for name, layer in named_targets(model).items() if isinstance(layer, ExpertProjection)]
    parameters = [name for name in matrices if name in stacks]
    modules = [name for name in matrices if name not in stacks]
    told = {}
    if parameters:
        suffixes = choose_targets(parameters, stacks)
        told["target_parameters"] = parameters if isinstance(suffixes, str) else suffixes
    unused = ("exclude_modules", "layers_pattern", "layers_to_transform", "revision")
    return {
        **_auto_class(model, saved),
        **patterns(ranks, alphas),
        **dict.fromkeys(unused),
        "peft_type": "LORA",
        "target_modules": choose_targets(modules, base_names(model)) if modules else [],
        **told,
        "modules_to_save": saved or None,
        "bias": config.bias,
        "lora_dropout": config.lora_dropout,
        "init_lora_weights": config.init_lora_weights,
        "use_rslora": False,
        **({"lora_bias": True} if config.lora_bias else {}),
        **({"ensure_weight_tying": True} if config.ensure_weight_tying else {}),
        "use_dora": config.use_dora,
        "fan_in_fan_out": bool(modules) and all(isinstance(model.get_submodule(path), Conv1D) for path in modules),
        "inference_mode": True,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
    }


# What PEFT calls the task of a model of transformers, by the end of its class's name.
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


_HEADS = ("classifier", "score", "qa_outputs")  # which PEFT trains for some tasks, asked or not


def _auto_class(model: nn.Module, saved: list[str]) -> dict[str, Any]:
    """What PEFT's ``AutoPeftModel...`` make the base by: its task, or its class where it has none."""
    # A sharded model's class is made from its own, which comes behind FSDP's in the order of resolution.
    kind = next(k for k in type(model).__mro__ if not k.__name__.startswith("FSDP"))
    task = next((task for end, task in _TASKS.items() if kind.__name__.endswith(end)), None)
    sequences = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if not kind.__module__.startswith("transformers.") or (task == "SEQ_2_SEQ_LM" and not sequences):
        task = None
    heads = {name for name in own_modules(model) if name.rpartition(".")[2] in _HEADS}
    if not task or (not task.endswith("_LM") and not heads <= set(saved)):
        task = None  # the class alone says as much, and no frozen head is trained
    mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return {"task_type": task, "auto_mapping": None if task else mapping}


def _saveable_adapter(model: nn.Module, adapter: str | None) -> str:
    applied = list(kept_inside(model, "fastlora_policy").values())
    if applied and not adapted_layers(model):
        raise ValueError(
            f"model: policy {applied[0].name!r} trains no adapter, and PEFT has no file without one; save the "
            "parameters that require gradients, for instance with safetensors.torch.save_file"
        )
    return chosen_adapter(model, adapter)


def _saveable(model: nn.Module, adapter: str) -> dict[str, Linear]:
    """Layers in which the adapter has a rank, or ``ValueError``."""
    layers = {n: x for n, x in adapted_layers(model).items() if adapter in x.adapter_names}
    for name, layer in layers.items():
        parts = [p for f in (layer.lora_A, layer.lora_B) for p in f[adapter].tensors().values() if p is not None]
        if any(p.dim() != 2 for p in parts):
            raise ValueError(
                f"model: a factor of {name!r} is {[tuple(p.shape) for p in parts]}, no matrix: training by "
                "FullyShardedDataParallel (FSDP1) holds the rest of it; use torch.distributed.fsdp.fully_shard"
            )
    chosen = {n: x for n, x in layers.items() if any(x.ranks(adapter).values())}
    if not chosen:
        raise ValueError(f"adapter: every matrix of {adapter!r} has rank 0; PEFT has no file without a matrix")
    if "" in chosen or (isinstance(model, nn.MultiheadAttention) and {"in_proj", "out_proj"} & chosen.keys()):
        raise ValueError("model: is itself the adapted layer, which has no name in a file; put it inside a module")
    names = Counter(id(m) for n, m in model.named_modules(remove_duplicate=False))
    for name, layer in chosen.items():
        if names[id(layer)] > 1:
            raise ValueError(
                f"model: {name!r} is one of several names of one module; PEFT would adapt only one of them"
            )
    return chosen


def _config_of(layers: Mapping[str, Linear], adapter: str) -> LoraConfig:
    """The config of layers that were built by hand, or injected by several configs, as far as a file says it once."""
    specs = {path: layer.adapter_specs[adapter] for path, layer in layers.items()}
    beside = {path: sorted(layer.lora_B[adapter].beside()) for path, layer in layers.items()}
    first, spec = next(iter(specs.items()))
    for path, other in specs.items():
        if beside[path] != beside[first] or (other.init != spec.init and {other.init, spec.init} & {*FROM_WEIGHT}):
            raise ValueError(
                f"model: {first!r} and {path!r} differ in init_lora_weights, use_dora or lora_bias, which a file says "
                "once; save the models that inject was called on each by itself"
            )
    own = {"use_dora": "magnitude" in beside[first], "lora_bias": "bias" in beside[first]}
    return LoraConfig(lora_dropout=spec.dropout, init_lora_weights=spec.init, **own)


def _matrices(
    model: nn.Module, names: StoredNames, layers: Mapping[str, Linear], adapter: str, fold: bool, over_rest: bool
) -> dict[str, _Stored]:
    """Every matrix of the file by path; those that share a rank and a scale in it, padded and scaled to the same."""
    out = {}
    for path in layers:
        if path in out:
            continue
        together = {p: layers[p] for p in names.beside(path) if p in layers}
        factors = {
            p: {} if isinstance(layer, ExpertProjection) else _factors(layer, adapter, over_rest)
            for p, layer in together.items()
        }
        rank = max(
            sum(len(a) for a, _ in of.values()) if of else _rank(together[p], adapter) for p, of in factors.items()
        )
        s = max((_scale(layer, adapter) for layer in together.values()), key=abs)
        for other in names.beside(path):
            if other in layers:
                out[other] = _stored(layers[other], factors[other], adapter, fold, s, rank)
            else:
                base, like = named_targets(model)[other], _stored(layers[path], factors[path], adapter, fold, s, rank)
                A = like.A.new_zeros(rank, base.in_features)
                B = like.B.new_zeros(base.out_features, rank)
                out[other] = _Stored(A, B, like.alpha, (Slice(WHOLE, base.out_features, 0, 1.0),))
    return out


def _rank(layer: Linear, adapter: str) -> int:
    """The rank of a layer's file entry: experts have one, and lie beside each other."""
    ranks = layer.ranks(adapter).values()
    return max(ranks) if layer.parts > 1 else sum(ranks)


def _scale(layer: Linear, adapter: str) -> float:
    """The ``s`` of a layer's file entry: that of the slice where it is largest."""
    ranks, scales = layer.ranks(adapter), layer.adapter_specs[adapter].scale
    return max((scales[name] for name in layer.slices if ranks[name]), key=abs)


def _factors(layer: Linear, adapter: str, over_rest: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each slice that has a rank; what was taken out of the weight goes beside them, with B negated."""
    A, B, out = layer.lora_A[adapter], layer.lora_B[adapter], {}
    starts = ({}, {}) if over_rest else (A.starts(), B.starts())
    effective = A(), B()
    for name, rank in layer.ranks(adapter).items():
        if rank:
            a, b = (whole(side[name].detach()) for side in effective)
            if name in starts[0]:
                a, b = torch.cat([a, starts[0][name]]), torch.cat([b, -starts[1][name]], dim=1)
            out[name] = a, b
    return out


def _stored(
    layer: Linear, factors: Mapping[str, tuple[Tensor, Tensor]], adapter: str, fold: bool, s: float, rank: int
) -> _Stored:
    """A layer's matrix for a file entry of this scale and rank."""
    if isinstance(layer, ExpertProjection):
        pairs = dict(zip(layer.slices, layer.pairs(adapter), strict=True))
        if layer.taken_for_untransposed:
            pairs = {name: (b.t(), a.t(), scale) for name, (a, b, scale) in pairs.items()}
        As, Bs, slices = experts_stacked(pairs, s, rank, fold)
        return _Stored(As, Bs, _alpha(1.0 if fold else s, rank), slices, rank)
    scales, live = layer.adapter_specs[adapter].scale, [*factors]
    ranks = {name: len(factors[name][0]) if name in factors else 0 for name in layer.slices}
    if isinstance(layer, Plain) and not isinstance(layer, Pointwise):
        return _kernels(layer, *factors[WHOLE], s, fold)
    ratios = {name: scales[name] / s if s and not fold else 1.0 for name in layer.slices}
    own = sum(ranks.values())
    stacked = torch.cat([a for a, _ in factors.values()])
    stacked = F.pad(stacked, (0, 0, 0, rank - own))
    block = stacked.new_zeros(sum(layer.slices.values()), rank, dtype=factors[live[0]][1].dtype)
    column = 0
    for name in live:
        factor = scales[name] if fold else ratios[name]
        b = factors[name][1]
        # Products of low-precision factors are rounded once.
        b = b if factor == 1 else (b.double() * factor).to(b.dtype)
        block[layer.slices.rows(name), column : column + ranks[name]] = b
        column += ranks[name]
    told = set(layer.slices) != {WHOLE} or own < rank or any(ratio != 1.0 for ratio in ratios.values())
    blocks = layer.slices.blocks
    slices = tuple(Slice(n, rows, ranks[n], ratios[n], blocks) for n, rows in layer.slices.items()) if told else ()
    if isinstance(layer, Pointwise):
        stacked, block = (t.view(shape) for t, shape in zip((stacked, block), kernel_shapes(layer, rank), strict=True))
    return _Stored(stacked, block, _alpha(1.0 if fold else s, rank), slices)


def _kernels(layer: Plain, A: Tensor, B: Tensor, s: float, fold: bool) -> _Stored:
    """The factors of a convolution or an embedding in PEFT's shapes."""
    rank = len(A)
    B = (B.double() * s).to(B.dtype) if fold else B
    if isinstance(layer, CONVOLUTIONS):
        A, B = (t.view(shape) for t, shape in zip((A, B), kernel_shapes(layer, rank), strict=True))
    return _Stored(A, B, _alpha(1.0 if fold else s, rank), ())


def _alpha(s: float, rank: int) -> float:
    """``s * rank``, as the integer that PEFT's type asks for where that is exact."""
    alpha = s * rank
    if not math.isfinite(alpha):
        raise ValueError(f"model: a scale of {s} at rank {rank} makes a lora_alpha that no file can hold")
    return round(alpha) if round(alpha) / rank == s else alpha


def _rule(config: LoraConfig, fields: Mapping[str, Any], fold: bool) -> dict[str, Any]:
    """How ranks make scales in this adapter's config, which the files express as one alpha a matrix."""
    if fold:
        return {"mode": "constant", "r": fields["r"], "lora_alpha": fields["r"], "use_rslora": False}
    return {"mode": config.scale, "r": config.r, "lora_alpha": config.lora_alpha, "use_rslora": config.use_rslora}


def _plain(importance: Mapping[str, float]) -> dict[str, float]:
    out: dict[str, float] = {}
    check_mapping("importance", importance, "matrix keys to scores")
    for key, value in importance.items():
        try:
            out[key] = float(value)
        except (TypeError, ValueError):
            out[key] = math.nan
        if not isinstance(key, str) or not math.isfinite(out[key]):
            raise wrong_value("importance", "finite scores by name", {key: value})
    return out


def _detached(key: str, tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        raise ValueError(f"model: {key!r} is on the meta device and has no values")
    return whole(tensor.detach()).to("cpu", copy=True).contiguous()


def _refuse_untold(model: nn.Module, saved: list[str], biases: Mapping[str, Tensor]) -> None:
    """Everything that was trained is in the files, or ``ValueError`` with the names of what is not."""
    told = {id(t) for t in (*biases.values(), *saved_tensors(model, saved).values())}
    for layer in adapted_layers(model).values():
        told.update(id(p) for factors in (layer.lora_A, layer.lora_B) for p in factors.parameters())
    told.update(id(p) for rows in token_rows(model).values() for p in rows.parameters())
    lost = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in told]
    if lost:
        raise ValueError(
            f"model: these trained parameters are neither adapters, nor in modules_to_save, nor covered by bias=, and "
            f"would be lost: {listed(lost)}; name their modules in modules_to_save or freeze them"
        )
