"""Load adapters that PEFT or ``save`` wrote: everything is checked against the model before the model changes."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor, nn

from .._utils.distributed import like, refuse_parallel, reshard, unwrapped, whole
from .._utils.errors import listed, wrong_value
from .._utils.reporting import Report, check_progress, reporting
from .._utils.types import ModelT
from ..config import FROM_WEIGHT, LoraConfig
from ..model.adapters import add_adapter
from ..model.fields import refuse_tying
from ..model.inject import check_adapter_name, inject, refuse_adapted
from ..model.modules import fused_layouts, named_targets, refuse_shared, saved_modules, saved_with_any
from ..model.overlaps import refuse_overlaps
from ..model.tokens import find_rows
from ..nn.active import chosen_adapter, config_of
from ..nn.adapter import WHOLE, Slices
from ..nn.linear import DEFAULT, Linear, adapted_layers, matrix_key
from ..nn.token_rows import token_rows
from .effect import warn_of_convolutions
from .folder import CONFIG, SIDE, TENSORS, AdapterFolder, read_folder
from .frozen import embeddings_of, frozen_in_file, own_tensors, remember
from .matrices import Matrix, factor_pairs, matrix_in_file, refuse_keys, refuse_tensor
from .names import (
    BESIDE_KEY,
    LORA_KEY,
    PREFIX,
    StoredNames,
    base_names,
    bias_tensors,
    choose_targets,
    followers_of,
    is_copy_of_saved,
    rows_key,
    saved_by,
    saved_tensors,
    unranked_biases,
    without_containers,
)

logger = logging.getLogger(__name__)


@torch.inference_mode(False)  # what is made here is no inference tensor, wherever it is made
def load(
    model: ModelT, path: str | os.PathLike, adapter: str | None = None, *, progress: bool | Report | None = None
) -> ModelT:
    """Load PEFT's files from the folder ``path``, ours or foreign; returns the same model.

    ``adapter`` names the adapter here: the active one unless said otherwise, ``"default"`` where there is none yet. A
    model without adapters gets those of the file, as ``inject`` would, one with others gets one more, as from
    ``add_adapter``; one that has this adapter must have the same matrices, ranks, ``modules_to_save`` and ``bias``, and
    takes tensors and scales from the file. A fused q/k/v of a foreign file is one matrix; ours say in ``fastlora.json``
    what was split. A further adapter takes the slices that a layer has: each gets its rows of B, and A.

    A model on the meta device may have its base's tensors filled in later (``load_state_dict(..., assign=True)``): what
    is in the file is there at once, on the CPU.

    ``progress`` counts tensors, and is as in :func:`merge`.

    Under ``fully_shard`` every rank reads the files and keeps its part; adapters must have been injected before.

    All or nothing: ``TypeError`` or ``ValueError`` naming the argument, or the file and what is wrong with it
    (``FileNotFoundError`` for a missing one), leaves the model as it was. Only safetensors files in local folders are
    read.

    >>> fastlora.save(nn.Sequential(fastlora.nn.Linear(8, 8, r=2)), folder)
    >>> model = fastlora.load(nn.Sequential(nn.Linear(8, 8)), folder)
    >>> model[0].ranks()
    {'weight': 2}
    """
    if adapter is not None:
        check_adapter_name(adapter, "adapter")
    check_progress(progress)
    reshard(unwrapped(model))
    folder = read_folder(path, _most_bytes(unwrapped(model)))
    plan = load_folder(model, folder, adapter, progress)
    if folder.side is None:
        _warn_of_out_proj(folder, StoredNames(unwrapped(model)), plan.matrices)
        warn_of_convolutions(folder.path, unwrapped(model), plan.matrices)
    return model


def load_folder(
    model: nn.Module, folder: AdapterFolder, adapter: str | None = None, progress: bool | Report | None = False
) -> _Plan:
    """Put what was read from a folder into a model; says what it was."""
    given, model = model, unwrapped(model)
    layers = adapted_layers(model)
    if adapter is None:
        adapter = chosen_adapter(model) if layers else DEFAULT
    here = any(adapter in layer.adapter_names for layer in layers.values())
    if not layers:
        refuse_adapted(model)
    plan = _plan(model, folder, {} if here else {p: layer.slices for p, layer in layers.items()})
    if here:
        _refuse_differences(model, folder, plan, adapter)
    elif layers:
        _refuse_other_head(model, folder, plan)
    config = None if here else _config_for(model, folder, plan)
    dtypes = {n: p.dtype for n, p in _factors(model, plan, adapter).items()} if here else {}
    staged = _staged(folder, plan, dtypes, progress)
    if config is not None:
        refuse_parallel(given, "load")
        trained = [b for b in (model.get_submodule(path).bias for path in plan.unranked) if b.requires_grad]
        try:
            add_adapter(model, adapter, config) if layers else inject(model, config, adapter=adapter)
        except ValueError as error:
            raise ValueError(f"{folder.path}: {error}") from error
        for bias in trained:
            bias.requires_grad_()
        if plan.unranked:
            model.fastlora_biases = {**getattr(model, "fastlora_biases", {}), adapter: sorted(plan.unranked)}
    _copy(model, plan, adapter, staged)
    remember(model, plan.frozen)
    return plan


def _most_bytes(model: nn.Module) -> int:
    """No file for this model is larger: A and B of matrices in three slices at full rank, the whole model beside them.

    ``R <= 3 min(n, K)`` for ``W`` [3n, K], so that A [R, K] and B [3n, R] have at most four times its entries.
    """
    entries = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    return 2**27 + 8 * 5 * entries


@dataclass(frozen=True)
class _Plan:
    """What the file says, in terms of this model."""

    matrices: dict[str, Matrix]
    trained: list[str]  # modules to save
    others: dict[str, Tensor]  # key -> the model's parameter or buffer outside of the adapters
    unranked: set[str]  # modules of which the file has a bias alone, under "lora_only"
    rows: dict[str, tuple[int, ...]]  # trained rows by embedding
    frozen: list[str]  # names of tensors that the file has although nothing trains them


def _plan(model: nn.Module, folder: AdapterFolder, held: Mapping[str, Slices]) -> _Plan:
    """``held``: slices that layers have already and that a further adapter takes, whatever those of the file."""
    where, fields = folder.where(TENSORS), folder.fields
    parameters = fields.parameters(model, folder.where(CONFIG))
    names, known = base_names(model), StoredNames(model, parameters)
    pairs = factor_pairs(folder)
    for name in {known.module(stored) for stored in pairs} - {*names, *parameters}:
        raise ValueError(f"{where}: adapts {name!r}, and {type(model).__name__} has no module of that name")
    refuse_tying(model, fields, [known.path(stored) for stored in pairs])
    if fields.targets_known:
        selected = {n for n in names if fields.selects(n)}
        expected = {s for n in (*selected, *parameters) for s in known.keys_of(n)}
        refuse_keys(where, f"target_modules of {CONFIG}", expected, set(pairs), "adapters of ")
    saved = saved_by(fields.modules_to_save, base_names(model, remove_duplicate=False))
    trained = saved if folder.side is None else list(folder.side.modules_to_save)
    if not set(trained) <= set(saved):
        raise ValueError(f"{folder.where(SIDE)}: modules_to_save {trained} are not all in those of {CONFIG}, {saved}")
    stored = {known.path(name): name for name in pairs}
    if held:
        _refuse_overlaps(model, folder, stored, saved)
    others = saved_tensors(model, saved) | bias_tensors(model, fields.bias, stored, saved)
    rest = {k for k in folder.tensors if not LORA_KEY.fullmatch(k) and not BESIDE_KEY.fullmatch(k)}
    rows = _rows(model, folder)
    follow = _sharing(model, rows)
    frozen = frozen_in_file(model, sorted(rest - others.keys()), fields.bias, stored, {*rows, *follow})
    tensors = own_tensors(model)
    others |= {key: tensors[name] for key, name in frozen.items()}
    wrapped = [*saved, *followers_of(model, saved, fields)]
    rest = {k for k in rest if not is_copy_of_saved(k, wrapped, others)}
    unranked = _unranked(fields.bias, rest - set(others))
    others |= bias_tensors(model, fields.bias, {}, saved, unranked) if unranked else {}
    copies = {rows_key(n): rows_key(path) for n, path in follow.items() if rows_key(n) in rest}
    refuse_keys(where, "the model", {*others, *map(rows_key, rows)}, rest - copies.keys(), "")
    for path, indices in rows.items():
        weight = model.get_submodule(path).weight
        like = weight.new_empty(len(indices), weight.shape[1])
        refuse_tensor(where, rows_key(path), folder.tensors[rows_key(path)], like)
    refuse_shared(model, saved, where, fields.ensure_weight_tying)
    _refuse_values(model, folder, others, copies)
    modules = named_targets(model)
    matrices = {
        p: matrix_in_file(folder, known, p, name, modules[p], pairs[name], held.get(p)) for p, name in stored.items()
    }
    if folder.side is not None:
        split = set(folder.side.split)
        refuse_keys(folder.where(SIDE), where, split & set(stored), split, "split of ")
        if folder.side.sha256 != folder.sha256:
            raise ValueError(f"{folder.where(SIDE)}: was written for other tensors than those in {where}; remove it to load them as a foreign file")  # fmt: skip  # noqa: E501
    # A projection of an attention that has no adapter of its own is padded in the file.
    ranked = {p: m for p, m in matrices.items() if any(m.ranks.values())}
    return _Plan(ranked, trained, others, unranked, rows, [*frozen.values()])


def _refuse_values(
    model: nn.Module, folder: AdapterFolder, others: Mapping[str, Tensor], copies: Mapping[str, str]
) -> None:
    """``ValueError`` for tensors beside the adapters that the model's cannot take, or not all at once.

    ``copies``: keys of what another key is of, too.
    """
    where, tensors = folder.where(TENSORS), own_tensors(model)
    resizable = {id(tensors[name]) for name in embeddings_of(model)}
    for key, target in others.items():
        shape = tuple(folder.tensors[key].shape)
        if id(target) in resizable and shape != tuple(target.shape) and shape[1:] == target.shape[1:]:
            raise ValueError(
                f"{where}: {key!r} has shape {shape}, and the model's is {tuple(target.shape)}; call "
                f"model.resize_token_embeddings({shape[0]}) first"
            )
        refuse_tensor(where, key, folder.tensors[key], target)
    first: dict[int, str] = {}
    shared = {key: first.setdefault(id(target), key) for key, target in others.items()}
    for key, source in {**copies, **shared}.items():
        if key != source and not torch.equal(folder.tensors[key], folder.tensors[source]):
            of = source.removeprefix(PREFIX).rpartition(".")[0]
            raise ValueError(f"{where}: {key!r} differs from that of {of!r}, whose weight it is")


def _refuse_overlaps(model: nn.Module, folder: AdapterFolder, targets: Collection[str], saved: Collection[str]) -> None:
    """As ``add_adapter``, before keys are compared, of which the model has more where it adapts what a file saves."""
    try:
        refuse_overlaps(model, targets, saved, saved_with_any(model))
    except ValueError as error:
        raise ValueError(f"{folder.path}: {error}") from None


def _rows(model: nn.Module, folder: AdapterFolder) -> dict[str, tuple[int, ...]]:
    """The layers of which rows were trained."""
    try:
        found = find_rows(model, folder.fields.trainable_token_indices)
    except ValueError as error:
        raise ValueError(f"{folder.where(CONFIG)}: {error}") from None
    for path in found:
        if not isinstance(model.get_submodule(path), (nn.Embedding, nn.Linear)):
            raise wrong_value(
                f"{folder.where(CONFIG)}: trainable_token_indices", "names of embeddings or linears", path
            )
    return found


def _sharing(model: nn.Module, rows: Collection[str]) -> dict[str, str]:
    """Layers that share the weight of one of which rows were trained, and that one: PEFT writes those of both."""
    owner = {id(model.get_submodule(path).weight): path for path in rows}
    held = ((name, owner.get(id(module._parameters.get("weight")))) for name, module in model.named_modules())
    return {name: path for name, path in held if path is not None and name not in rows}


def _unranked(mode: str, keys: Collection[str]) -> set[str]:
    """Modules that keys give a bias and nothing else."""
    return {k[len(PREFIX) : -len(".bias")] for k in keys if mode == "lora_only" and k.endswith(".bias")}


def _warn_of_out_proj(folder: AdapterFolder, known: StoredNames, matrices: Mapping[str, Matrix]) -> None:
    trained = [
        path
        for path, matrix in matrices.items()
        if len(known.beside(path)) > 1
        and path.endswith(".out_proj")
        and any(bool(pair[1].any()) for pair in matrix.factors.values() if pair is not None)
    ]
    if trained:
        logger.warning(
            "%s: PEFT to 0.21 counts the update of out_proj twice in nn.MultiheadAttention; here it counts once, as "
            "the file says. Double lora_B where outputs must be those of such a training: %s",
            folder.path,
            listed(trained),
        )


def _refuse_other_head(model: nn.Module, folder: AdapterFolder, plan: _Plan) -> None:
    """``ValueError`` for a further adapter whose file would overwrite what the adapters of the model share."""
    for key, target in plan.others.items():
        if not torch.equal(whole(target).to(folder.tensors[key].dtype).cpu(), folder.tensors[key]):
            raise ValueError(
                f"{folder.where(TENSORS)}: {key!r} differs from the model's, which its adapters share; load this "
                "adapter into a model of its own"
            )


def _refuse_differences(model: nn.Module, folder: AdapterFolder, plan: _Plan, adapter: str) -> None:
    """An adapter that is there already must be the one of the file, or ``ValueError`` naming the differences."""
    layers = adapted_layers(model)
    merged = [n for n, layer in layers.items() if layer.merged]
    if merged:
        raise ValueError(f"model: {merged[0]!r} is merged; call fastlora.unmerge first")
    here = {p: layer.ranks(adapter) for p, layer in layers.items() if adapter in layer.adapter_names}
    differences, more = [], ""
    for path in sorted(here.keys() | plan.matrices.keys()):
        matrix = plan.matrices.get(path)
        if path in here and matrix is not None and layers[path].slices != matrix.rows:
            forms = [
                ("split into " + " ".join(m) if set(m) != {WHOLE} else "one matrix") for m in (here[path], matrix.rows)
            ]
            differences.append(f"{path} is {forms[0]} in the model and {forms[1]} in the file")
            more = "; adapter=<another name> loads it beside this one"
            continue
        mine, theirs = here.get(path, {}), {} if matrix is None else matrix.ranks
        differences += [
            f"{matrix_key(path, s)} has rank {mine.get(s, 0)} in the model and {theirs.get(s, 0)} in the file"
            for s in mine or theirs
            if mine.get(s, 0) != theirs.get(s, 0)
        ]
    config = config_of(model, adapter)
    bias = "none" if config is None else config.bias
    for field in ("lora_bias", "use_dora", "init_lora_weights"):
        mine, theirs = getattr(config, field, None), getattr(folder.fields, field)
        if config is not None and mine != theirs and (field != "init_lora_weights" or {mine, theirs} & {*FROM_WEIGHT}):
            differences.append(f"{field} is {mine!r} in the model and {theirs!r} in the file")
    saved, of_any, trained = (
        sorted(without_containers(model, names))
        for names in (saved_modules(model, adapter), saved_with_any(model), plan.trained)
    )
    if trained not in (saved, of_any):
        differences.append(f"modules_to_save are {saved} in the model and {trained} in the file")
    rows = {path: each.indices[adapter] for path, each in token_rows(model, adapter).items()}
    if rows != plan.rows:
        differences.append("trainable_token_indices are others in the model than in the file")
    if bias != folder.fields.bias:
        differences.append(f"bias is {bias!r} in the model and {folder.fields.bias!r} in the file")
    mine = unranked_biases(model, adapter, bias, plan.matrices)
    for path in sorted(mine ^ plan.unranked):
        places = ("model", "file") if path in mine else ("file", "model")
        differences.append(f"{path}.bias is trained in the {places[0]} and not in the {places[1]}")
    if differences:
        raise ValueError(f"{folder.path}: does not fit the model's adapter {adapter!r}: {listed(differences)}{more}")


def _config_for(model: nn.Module, folder: AdapterFolder, plan: _Plan) -> LoraConfig:
    """The LoraConfig that injects exactly what is in the file."""
    fields, side, stacks = folder.fields, folder.side, folder.fields.parameters(model, folder.where(CONFIG))
    stacks, modules = ([p for p in plan.matrices if (p in stacks) == wanted] for wanted in (True, False))
    names = [*base_names(model), *StoredNames(model).inputs]
    factors = [t for m in plan.matrices.values() for pair in m.factors.values() for t in pair or ()]
    stored = reduce(torch.promote_types, {t.dtype for t in factors})
    rule = {"r": fields.r, "lora_alpha": fields.lora_alpha, "use_rslora": fields.use_rslora, "scale": "per_rank"}
    dtype = torch.float64 if stored == torch.float64 else None
    if side is not None:
        rule = {**side.rule, "scale": side.rule["mode"]}
        del rule["mode"]
        dtype = stored
    try:
        config = LoraConfig(
            target_modules=choose_targets(modules, names) if modules else None,
            target_parameters=stacks or None,
            lora_dropout=fields.lora_dropout,
            bias=fields.bias,
            modules_to_save=plan.trained or None,
            trainable_token_indices=plan.rows or None,
            init_lora_weights=fields.init_lora_weights,
            lora_bias=fields.lora_bias,
            ensure_weight_tying=fields.ensure_weight_tying,
            use_dora=fields.use_dora,
            split_qkv={p: plan.matrices[p].rows for p in modules if set(plan.matrices[p].rows) != {WHOLE}} or False,
            adapter_dtype=dtype,
            **rule,
        )
        ranks = {matrix_key(p, s): r for p, m in plan.matrices.items() for s, r in m.ranks.items()}
        scales = {matrix_key(p, s): v for p, m in plan.matrices.items() for s, v in m.scale.items()}
        odd = {
            k: s / config.scaling(ranks[k], 1.0) for k, s in scales.items() if not _same(config.scaling(ranks[k]), s)
        }
        config = replace(config, rank_pattern={k: r for k, r in ranks.items() if r != config.r}, alpha_pattern=odd)
        config.any_rank = True
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder.where(CONFIG if side is None else SIDE)}: {error}") from error
    known = fused_layouts(model)
    for path, m in plan.matrices.items():
        possible = known.get(path)
        if path not in stacks and set(m.rows) != {WHOLE} and possible is not None and possible != m.rows:
            raise ValueError(f"{folder.where(SIDE)}: splits {path!r} into {m.rows}, and this model can {possible}")
    return config


def _same(s: float, other: float) -> bool:
    # s * r / r need not give s back to the last bit.
    return math.isclose(s, other, rel_tol=1e-12)


def _factors(model: nn.Module, plan: _Plan, adapter: str) -> dict[tuple[str, str, str], nn.Parameter]:
    """(path, slice, "A" or "B") -> the model's parameter, for every factor in the file."""
    layers: dict[str, Linear] = adapted_layers(model)
    out = {}
    for path, matrix in plan.matrices.items():
        for name in (n for n, pair in matrix.factors.items() if pair is not None):
            out[path, name, "A"] = layers[path].lora_A[adapter]._parameters[name]
            out[path, name, "B"] = layers[path].lora_B[adapter]._parameters[name]
        for name in matrix.beside:
            out[path, name, "beside"] = layers[path].lora_B[adapter]._parameters[name]
    rows = token_rows(model)
    return out | {(path, WHOLE, "rows"): rows[path].rows(adapter) for path in plan.rows}


def _staged(folder: AdapterFolder, plan: _Plan, dtypes: Mapping, progress: bool | Report | None) -> dict:
    """Every tensor in the dtype that it will have, so that copying cannot fail half-way."""
    where, given, lossy = folder.where(TENSORS), {}, []
    for path, matrix in plan.matrices.items():
        for name, pair in matrix.factors.items():
            for factor, value in zip("AB", pair or (), strict=False):
                given[path, name, factor] = value, f"{where}: lora_{factor} of {matrix_key(path, name)!r}"
        for name, value in matrix.beside.items():
            given[path, name, "beside"] = value, f"{where}: {name} of {path!r}"
    for path in plan.rows:
        given[path, WHOLE, "rows"] = folder.tensors[rows_key(path)], f"{where}: {rows_key(path)!r}"
    given |= {key: (folder.tensors[key], f"{where}: {key!r}") for key in plan.others}
    dtypes = {**dtypes, **{key: target.dtype for key, target in plan.others.items()}}
    staged = {}
    with reporting(progress, len(given), "load", "tensor") as report:
        for done, (key, (value, label)) in enumerate(given.items(), 1):
            staged[key] = _converted(value, dtypes.get(key, value.dtype), label, lossy)
            report(done, len(given), math.nan)
    if lossy:
        logger.warning("rounded on loading, because the model's dtype holds less: %s", listed(lossy))
    return staged


def _converted(value: Tensor, dtype: torch.dtype, label: str, lossy: list[str]) -> Tensor:
    if value.dtype == dtype:
        return value
    converted = value.to(dtype)
    if torch.promote_types(value.dtype, dtype) != dtype:
        lossy.append(f"{label} {value.dtype} to {dtype}")
        if bool((value.isfinite() & ~converted.isfinite()).any()):
            raise ValueError(f"{label} has values too large for the model's {dtype}")
    return converted


@torch.no_grad()
def _copy(model: nn.Module, plan: _Plan, adapter: str, staged: Mapping) -> None:
    targets = {**_factors(model, plan, adapter), **plan.others}
    places: dict[int, list[tuple[dict, str]]] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and (tensor.is_meta or tensor.is_inference()):
                    places.setdefault(id(tensor), []).append((held, name))
    for key, target in targets.items():
        if id(target) not in places:
            target.copy_(like(staged[key], target))
            continue
        # A tensor that cannot be written to, on the meta device or made in inference mode, makes way for a new one.
        value = staged[key].clone() if target.is_meta else staged[key].to(target.device, copy=True)
        made = nn.Parameter(value, target.requires_grad) if isinstance(target, nn.Parameter) else value
        for held, name in places[id(target)]:
            held[name] = made
    layers = adapted_layers(model)
    for path, matrix in plan.matrices.items():
        spec = layers[path].adapter_specs[adapter]
        if not all(_same(spec.scale[name], s) for name, s in matrix.scale.items()):
            layers[path].rescale(adapter, matrix.scale)
