"""Several adapters on one frozen base: add, delete and activate them, and route the rows of a batch to them."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .._utils.distributed import refuse_parallel, several_processes, unwrapped
from .._utils.errors import check_choice, check_instance, wrong_value
from .._utils.torch_compat import assert_async
from .._utils.types import ModelT
from ..config import LoraConfig, takes_weight
from ..nn.active import NO_ADAPTERS, adapted_models, configs_in, kept_inside, refuse_merged, refuse_part
from ..nn.linear import Adapted, adapted_layers
from ..nn.routing import Route, Router
from ..nn.token_rows import token_rows
from ..ops.layout import AdapterBatch, moved
from ..ops.reference import accumulate_dtype
from .fields import refuse_tying, with_tied
from .freezing import freeze
from .inject import (
    check_adapter_name,
    commit_injection,
    find_modules_to_save,
    find_targets,
    group_layers,
    plan_injection,
)
from .learning_check import watch_learning
from .modules import inside, named_by, refuse_shared, saved_with_any
from .overlaps import refuse_overlaps
from .peft_config import config_for
from .replaced_check import watch_places
from .resting_check import watch_resting
from .tokens import commit_rows, forget_rows, plan_rows, refuse_rows_of


def routers_of(model: nn.Module) -> list[Router]:
    """The routers of a model's adapted layers: one, unless they were built by hand. ``ValueError`` without any."""
    return _agreeing(adapted_layers(model))


def _agreeing(layers: Mapping[str, Adapted]) -> list[Router]:
    found = list({id(layer.router): layer.router for layer in layers.values()}.values())
    if not found:
        raise ValueError(NO_ADAPTERS)
    found.sort(key=lambda router: -len(router.slots))  # ids count on behind the most that were ever given
    if any(router.taken != found[0].taken for router in found):
        raise ValueError("model: its layers have different sets of adapters; add adapters with fastlora.add_adapter")
    return found


def add_name(routers: Sequence[Router], name: str) -> None:
    """Give a new adapter one id in all of a model's routers."""
    number = max(len(router.slots) for router in routers)
    for router in routers:
        router.add(name, number)


def adapter_names(model: nn.Module) -> list[str | None]:
    """Names of a model's adapters by id; None where one was removed.

    Raises ``TypeError`` for what is no model, ``ValueError`` without adapters.

    >>> model = nn.Sequential(fastlora.nn.Linear(8, 8, r=2))
    >>> fastlora.adapter_names(model)
    ['default']
    """
    return list(routers_of(model)[0].slots)


def _known(router: Router, name: Any, argument: str) -> str:
    return check_choice(argument, name, router.names)


@torch.inference_mode(False)  # what is made here is no inference tensor, wherever it is made
def add_adapter(model: ModelT, name: str, config: Any) -> ModelT:
    """Add the adapter ``name`` to an adapted model, as ``config`` says it, with the next id; it trains beside others.

    ``y = x W^T + bias + s_g x A_g^T B_g^T`` for the rows of adapter g. Targets that have no adapter yet become adapted;
    ``modules_to_save`` are shared by all adapters and in the file of each; what one saves, no other adapts or has
    ``trainable_token_indices`` of. Names are those of ``model``, which may contain the adapted one, or be a part of it:
    the adapter is the whole's.
    Raises ``TypeError`` or ``ValueError`` naming the argument; the model is then as it was.

    >>> model = nn.Sequential(fastlora.nn.Linear(8, 8, r=2))
    >>> model = fastlora.add_adapter(model, "b", fastlora.LoraConfig(r=4, target_modules=["0"]))
    >>> fastlora.adapter_names(model)
    ['default', 'b']
    """
    refuse_parallel(model, "add_adapter")
    given, model = model, unwrapped(model)
    routers = routers_of(model)
    check_adapter_name(name, "name")
    refuse_merged(adapted_layers(model))
    if name in routers[0].names:
        raise wrong_value("name", f"one that is none of {routers[0].names}", name)
    config = with_tied(model, config_for(model, config))
    if config.bias != "none":
        raise wrong_value("bias", "'none' for an adapter that shares its base with others", config.bias)
    for each in (config, *[known for configs in configs_in(model) for known in configs.values()]):
        if takes_weight(each.init_lora_weights):
            raise ValueError(
                f"init_lora_weights: {each.init_lora_weights!r} changes the weight that adapters share, so that the "
                "files of the others would not fit the base; it takes a model with one adapter"
            )
    started = next((p for p, x in adapted_layers(model).items() if any(f.starts() for f in x.lora_A.values())), None)
    if started is not None:
        raise ValueError(f"model: the weight of {started!r} lies in part in its adapter, and another would not fit it")
    saved, known = find_modules_to_save(model, config), saved_with_any(model)
    names = find_targets(model, config, saved)
    free = [name for name in names if not inside(name, known)]
    if isinstance(config.target_modules, str) and free:
        names = free  # a role or an expression leaves out what is trained whole, as in inject
    refuse_tying(model, config, names)
    refuse_overlaps(model, names, saved, known)
    refuse_shared(model, saved, "config", config.ensure_weight_tying)
    refuse_rows_of(model, names)
    kept, rest = _configs_to_keep(model, config, saved)
    plan, rows = plan_injection(model, config, names), plan_rows(model, config, names, [*saved, *known])
    for planned in plan:
        if not isinstance(planned.layer, Adapted):
            continue
        if planned.layer.slices != planned.slices:
            raise ValueError(
                f"split_qkv: {planned.path!r} is adapted as {list(planned.layer.slices)} already, not as "
                f"{list(planned.slices)}; every adapter of a matrix is split as the first: leave split_qkv out"
            )
    new = [planned.layer for planned in plan if not isinstance(planned.layer, Adapted)]
    # Those of attention's stacked projection and of experts are their owner's.
    held = [p for layer in new for p in (layer.weight, getattr(layer, "bias", None), *layer.parameters())]
    freeze(model, [p for p in held if p is not None])
    for planned in plan:
        commit_injection(model, planned, config, _router_at(model, planned.path, routers), name)
    for each in rows:
        commit_rows(model, [each], _router_at(model, each.path, routers), name)
    modules = dict(model.named_modules())
    for path in saved:
        modules[path].requires_grad_(True)
    group_layers(model)
    add_name(routers, name)
    for configs, own in kept:
        configs[name] = own
    if rest is not None:
        model.fastlora_configs = {name: rest}
    for adapted in adapted_models(model).values():
        watch_learning(adapted)
        watch_places(adapted)
        watch_resting(adapted)
    return given


def _router_at(model: nn.Module, path: str, routers: Sequence[Router]) -> Router:
    """The router of the adapted model that a path lies in, the first for what lies outside of them."""
    homes = {
        at: configs for at, configs in kept_inside(model, "fastlora_configs").items() if not at or inside(path, [at])
    }
    nearest = homes[max(homes, key=len)] if homes else None
    return next((router for router in routers if router.configs is nearest), routers[0])


def _configs_to_keep(
    model: nn.Module, config: LoraConfig, saved: Sequence[str]
) -> tuple[list[tuple[dict[str, LoraConfig], LoraConfig]], LoraConfig | None]:
    """Where an adapter's config goes, with ``modules_to_save`` in the names of the adapted model there; and the config
    for ``model`` itself, where it has modules to save that lie outside of the adapted models."""
    kept, outside = [], list(saved)
    for path, adapted in adapted_models(model).items():
        own, inside = copy.deepcopy(config), f"{path}." if path else ""
        if inside:
            own.modules_to_save = [n.removeprefix(inside) for n in saved if n.startswith(inside)] or None
            more = {*named_by(adapted, own.modules_to_save or ())} - {*(own.modules_to_save or ())}
            if more:
                accepted = f"suffixes that mean {inside}{min(more)}, too, or others; or {path!r} as the model"
                raise wrong_value("modules_to_save", accepted, config.modules_to_save)
        outside = [n for n in outside if not n.startswith(inside)]
        kept += [(configs, own) for configs in configs_in(adapted)]
    rest = copy.deepcopy(config) if outside else None
    if rest is not None:
        rest.modules_to_save = outside
    return kept, rest


def delete_adapter(model: ModelT, name: str) -> ModelT:
    """Delete the adapter ``name``; its id is not used again.

    Refused for the active adapter, a merged or a tracked one, one with a forward that awaits its backward, and where
    ``model`` is a part of the one that was adapted and the adapter has layers outside of it. Raises
    ``TypeError`` or ``ValueError`` with the model as it was.

    >>> model = nn.Sequential(fastlora.nn.Linear(8, 8, r=2))
    >>> model = fastlora.add_adapter(model, "b", fastlora.LoraConfig(r=2, target_modules=["0"]))
    >>> fastlora.adapter_names(fastlora.delete_adapter(model, "b"))
    ['default', None]
    """
    refuse_parallel(model, "delete_adapter")
    routers = routers_of(model)
    _known(routers[0], name, "name")
    refuse_part(model, "delete_adapter", name)
    layers = {path: layer for path, layer in adapted_layers(model).items() if name in layer.adapter_specs}
    if any(router.default.adapter == name for router in routers):
        raise ValueError(f"name: {name!r} runs by default; call fastlora.set_adapter with another first")
    for path, layer in layers.items():
        if name in layer.merged:
            raise ValueError(f"name: {name!r} is merged into {path!r}; call fastlora.unmerge first")
        if name in layer.probes:
            raise ValueError(f"name: {name!r} is tracked; close its tracker first")
    if any(route.enabled and name in route.names for router in routers for route in router.open_contexts()):
        raise ValueError(f"name: {name!r} runs in a context of use_adapters that is open; leave it first")
    if any(router.awaits_backward(name) for router in routers):
        raise ValueError(f"name: a forward of {name!r} awaits its backward; run it, or let go of the forward's outputs")
    for layer in layers.values():
        layer.uninstall(name)
    forget_rows(model, name)
    for router in routers:
        router.remove(name)
    for configs in configs_in(model):
        configs.pop(name, None)
    return model


def set_adapter(model: ModelT, name: str) -> ModelT:
    """Make an adapter the active one: that of every forward outside of ``use_adapters``, and of functions that were
    given no other (``merge``, ``save``, ``summary``, ``track``, ...), also where ``model`` is a part of the one that
    was adapted: an adapter is active in the whole or not at all. Raises ``TypeError`` for what is no model,
    ``ValueError`` for an unknown ``name``, and while another adapter is merged.

    >>> model = nn.Sequential(fastlora.nn.Linear(8, 8, r=2))
    >>> model = fastlora.add_adapter(model, "b", fastlora.LoraConfig(r=4, target_modules=["0"]))
    >>> fastlora.set_adapter(model, "b")[0].ranks()
    {'weight': 4}
    """
    layers = adapted_layers(model)
    routers = _agreeing(layers)
    refuse_merged(layers, but=_known(routers[0], name, "name"))
    for router in routers:
        router.set_default(name)
    return model


@contextmanager
def use_adapters(
    model: ModelT,
    ids: str | Sequence[str | None] | Tensor | Mapping[str | None, tuple[int, int]],
    *,
    row_seeds: Tensor | None = None,
) -> Iterator[ModelT]:
    """Within, forwards of this thread or task run each sample or token with its id's adapter; -1 (or None): the base.

    ``ids``: an int64 tensor [S] (one a sample, dimension 0), [S, T] or [M] (one a token) of indices into
    ``adapter_names(model)``, a list of S names, one name for all, or one range (begin, end) for each name (None: the
    base), which together cover the samples or tokens. Ids on the CPU are checked, and adapters that do not occur get no
    gradient; ids on a GPU are not read back, so that these get zeros (see ``freeze_unused_adapters``). ``row_seeds``
    int64 [S] makes the dropout of a sample depend on its seed, the layer and the place in the sample alone, not on the
    batch.

    Backward may run after the context has closed, under activation checkpointing too. Raises ``TypeError`` or
    ``ValueError`` naming ids or names that are unknown or removed; a layer whose input the ids do not fit raises
    ``ValueError`` with both shapes.

    >>> model = nn.Sequential(fastlora.nn.Linear(8, 8, r=2))
    >>> model = fastlora.add_adapter(model, "b", fastlora.LoraConfig(r=4, target_modules=["0"]))
    >>> with fastlora.use_adapters(model, torch.tensor([0, 1, -1])):
    ...     tuple(model(torch.ones(3, 8)).shape)
    ...
    (3, 8)
    """
    layers = adapted_layers(model)
    routers = _agreeing(layers)
    refuse_merged(layers)
    devices = {layer.weight.device for layer in layers.values()}
    for name, given in (("ids", ids), ("row_seeds", row_seeds)):
        if isinstance(given, Tensor) and given.device.type != "cpu" and given.device not in devices:
            listed = ", ".join(sorted(map(str, devices)))
            raise ValueError(f"{name}: expected on the CPU or the model's device ({listed}), got {given.device}")
    route = _route(routers[0], ids, row_seeds)
    routers[0].explain_recompilation(route)
    opened = [(router, router.open(copy.copy(route))) for router in routers]
    try:
        yield model
    finally:
        for router, own in opened:
            router.close(own)


def _route(router: Router, ids: Any, row_seeds: Tensor | None) -> Route:
    if row_seeds is not None:
        check_instance("row_seeds", row_seeds, Tensor, "an int64 tensor [S]")
        if row_seeds.dtype != torch.int64 or row_seeds.dim() != 1:
            raise wrong_value("row_seeds", "an int64 tensor [S]", row_seeds)
    if isinstance(ids, str):
        name = _known(router, ids, "ids")
        if row_seeds is None:
            return Route(True, name)
        return Route(True, name, AdapterBatch([name], torch.zeros_like(row_seeds), row_seeds))
    if isinstance(ids, Mapping):
        ids = _of_ranges(router, ids)
    if not isinstance(ids, Tensor):
        check_instance("ids", ids, Sequence, "an int64 tensor, names, one name or ranges")
        ids = torch.tensor(
            [-1 if n is None else router.slots.index(_known(router, n, "ids")) for n in ids],
            dtype=torch.int64,
            device="cpu",
        )
    if ids.dtype != torch.int64 or ids.dim() not in (1, 2):
        raise wrong_value("ids", "an int64 tensor [S], [S, T] or [M]", ids)
    if row_seeds is not None and row_seeds.shape != ids.shape:
        raise wrong_value("row_seeds", f"one for each of {ids.shape[0]} ids", row_seeds)
    names, compact = _compact(router, ids)
    return Route(True, router.default.adapter, AdapterBatch(names, compact, row_seeds))


def _of_ranges(router: Router, ranges: Mapping[str | None, tuple[int, int]]) -> Tensor:
    """Ids [S] from ranges by name, which follow each other from 0 without gaps."""
    for name, given in ranges.items():
        if name is not None:
            _known(router, name, "ids")
        whole = isinstance(given, Sequence) and len(given) == 2 and all(type(v) is int for v in given)
        if not whole or not 0 <= given[0] <= given[1]:
            raise wrong_value("ids", f"a range (begin, end) with 0 <= begin <= end for {name!r}", given)
    ids, before = [], ("the start", 0)
    for name, (begin, end) in sorted(ranges.items(), key=lambda item: tuple(item[1])):
        if begin < before[1]:
            raise ValueError(f"ids: expected {name!r} to begin at {before[1]}, where {before[0]} ends, got {begin}")
        if begin > before[1]:
            raise ValueError(
                f"ids: expected {name!r} to begin at {before[1]}, got {begin}; None names the base for rows between"
            )
        number = -1 if name is None else router.slots.index(name)
        ids.append(torch.full((end - begin,), number, dtype=torch.int64, device="cpu"))
        before = (repr(name), end)
    return torch.cat(ids) if ids else torch.zeros(0, dtype=torch.int64, device="cpu")


def _compact(router: Router, ids: Tensor) -> tuple[list[str], Tensor]:
    """The names that occur, and ids that index them.

    All names on a GPU, from which nothing is read back, and under data-parallel training, whose ranks must agree on
    which parameters have gradients.
    """
    slots = router.slots
    if ids.device.type == "cpu":
        used = torch.unique(ids).tolist()
        for value in used:
            if not -1 <= value < len(slots) or (value >= 0 and slots[value] is None):
                where = int((ids.reshape(-1) == value).nonzero()[0])
                state = ", which was removed" if 0 <= value < len(slots) else ""
                raise ValueError(
                    f"ids: expected -1 (base only), {_known_ids(slots)}, got {value} at position {where}{state}"
                )
        live = [value for value in used if value >= 0]
    if ids.device.type != "cpu" or several_processes():
        live = [i for i, name in enumerate(slots) if name is not None]
    table = torch.full((len(slots) + 1,), -1, dtype=torch.int64, device="cpu")
    table[live] = torch.arange(len(live), device="cpu")
    if ids.device.type != "cpu":
        table = moved(table, ids.device)
        known = (ids >= -1) & (ids < len(slots)) & ((ids < 0) | (table[ids] >= 0))
        assert_async(known.all(), f"ids: expected -1 (base only), {_known_ids(slots)}, got others")
    return [slots[i] for i in live], table[ids]


def _known_ids(slots: Sequence[str | None]) -> str:
    return ", ".join(f"{i}: {name}" for i, name in enumerate(slots) if name is not None)


def per_adapter_mean(losses: Tensor, ids: Tensor) -> Tensor:
    """``sum_g mean(losses of adapter g)``: the loss with which adapters train together as each would train alone.

    losses [S] or [M], ids int64 of the same shape; -1 does not count. Summed in fp32 (float64 for float64), returned in
    the dtype of the losses. Raises ``TypeError`` for what is no tensor, ``ValueError`` for other dtypes and shapes that
    differ.

    >>> fastlora.per_adapter_mean(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1]))
    tensor(7.)
    """
    if not check_instance("losses", losses, Tensor, "a floating tensor").is_floating_point():
        raise wrong_value("losses", "a floating tensor", losses)
    if check_instance("ids", ids, Tensor, "an int64 tensor").dtype != torch.int64:
        raise wrong_value("ids", "an int64 tensor", ids)
    if losses.shape != ids.shape:
        raise wrong_value("losses", f"the shape of ids {tuple(ids.shape)}", losses)
    own, wide = ids.to(losses.device).reshape(-1), losses.reshape(-1).to(accumulate_dtype(losses.dtype))
    _, place, counts = torch.unique(own, return_inverse=True, return_counts=True)
    return torch.where(own >= 0, wide / counts[place], 0.0).sum().to(losses.dtype)


def freeze_unused_adapters(model: nn.Module, optimizer: torch.optim.Optimizer) -> RemovableHandle:
    """Leave adapters that were in no batch since the optimizer's last step unchanged: weights and optimizer state.

    Where their gradient is zero rather than None (ids on a GPU, torch.compile, data-parallel training) an optimizer
    would still decay and move them. A hook before each step reads back once which adapters occurred, in contexts or by
    default, on all data-parallel ranks, and sets the gradients of the others to None. Returns the hook's handle.
    Raises ``TypeError`` for what is no optimizer, ``ValueError`` without adapters.

    >>> model = nn.Sequential(fastlora.nn.Linear(8, 8, r=2))
    >>> optimizer = torch.optim.AdamW(fastlora.param_groups(model))
    >>> handle = fastlora.freeze_unused_adapters(model, optimizer)
    >>> handle.remove()
    """
    routers = routers_of(model)
    check_instance("optimizer", optimizer, torch.optim.Optimizer, "a torch.optim.Optimizer")
    watched = [(router, router.watch()) for router in routers]

    def hook(*_: Any) -> None:
        for router, ways in watched:
            router.gather()
            present = _present(router, ways)
            ways.clear()
            if present is None:
                continue
            for path_layer in adapted_layers(model).values():
                for name in path_layer.adapter_names:
                    if name not in present:
                        for factors in (path_layer.lora_A[name], path_layer.lora_B[name]):
                            for parameter in factors.parameters():
                                parameter.grad = None
            for rows in token_rows(model).values():
                for name in rows.indices.keys() - present:
                    rows.rows(name).grad = None

    return optimizer.register_step_pre_hook(hook)


def _present(router: Router, ways: Collection[Route]) -> set[str] | None:
    """The adapters that a graph was built through, on any data-parallel rank; None where none was built at all."""
    ran = [way for way in ways if way.enabled]
    found = {name for way in ran for name in (way.names if way.batch is None else way.batch.present())}
    names = router.names
    flags = torch.tensor([bool(ways), *(name in found for name in names)], dtype=torch.int64, device="cpu")
    if several_processes():
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        flags = flags.to(device)
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    any_way, *present = flags.tolist()
    return {name for name, flag in zip(names, present, strict=True) if flag} if any_way else None
