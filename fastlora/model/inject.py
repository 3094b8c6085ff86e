"""``inject``: find the targets, plan every change, then commit."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._utils.distributed import refuse_parallel
from .._utils.errors import check_choice, check_flag, check_instance, check_model, listed, suggestion, wrong_value
from .._utils.types import ModelT
from ..config import FROM_DATA, ROLES, LoraConfig, takes_weight
from ..nn.active import own_modules
from ..nn.adapter import WHOLE, AdapterSpec, Factors, Slices, adapter_dtype_of, checked_ranks, new_factors
from ..nn.attention import InProjection, StackedProjection
from ..nn.experts import ExpertStack
from ..nn.frozen import FrozenLinear
from ..nn.initialise import new_bias, new_magnitude, start_from_weight, take_out
from ..nn.linear import (
    DEFAULT,
    ENGINE_OF_PREPACK,
    Adapted,
    Linear,
    adapted_layers,
    attach_state,
    matrix_key,
)
from ..nn.projection_group import group_projections
from ..nn.quantized import check_weight, foreign_base
from ..nn.routing import Router
from ..nn.token_rows import token_rows
from .embedding_outputs import keep_changeable
from .experts import expert_parameters
from .fields import of_layers, pattern_lookup, refuse_beyond_factors, refuse_tying, with_tied
from .freezing import freeze
from .learning_check import MODES, watch_learning
from .modules import (
    PLAIN_LINEARS,
    adapted_class,
    attention_blocks,
    class_name,
    features,
    has_suffix,
    inside,
    is_linear,
    named_targets,
    refusal,
    refuse_shared,
    role_targets,
    torch_attentions,
    users_of_parameters,
)
from .owners import change_class, passed_by, take_over
from .peft_config import config_for, every_linear
from .replaced_check import watch_places
from .saving_check import watch_savers
from .slices import default_rank, slices_of
from .tokens import commit_rows, plan_rows

logger = logging.getLogger(__name__)


@dataclass
class _Planned:
    path: str
    layer: nn.Linear
    slices: Slices
    spec: AdapterSpec
    factors: tuple[Factors, Factors]

    def matrix(self) -> Tensor:
        """The weight of a linear or a Conv1D as [N, K]."""
        kind = type(self.layer) if isinstance(self.layer, Adapted) else adapted_class(self.layer, False)
        return kind.as_matrix(self.layer, self.layer.weight)


@torch.inference_mode(False)  # what is made here is no inference tensor, wherever it is made
def inject(
    model: ModelT,
    config: Any,
    *,
    adapter: str = DEFAULT,
    accelerate_frozen: bool = False,
    check: str = "raise",
) -> ModelT:
    """Adapt the targets of ``config`` in place and freeze the rest; returns the same model.

    ``y = x W^T + bias + s x A^T B^T`` with ``B = 0`` at first, so outputs equal the base model's. ``nn.Linear`` targets
    become ``fastlora.nn.Linear`` by a change of class: keys, hooks, ties, deepcopy and pickle survive.

    ``adapter`` names the adapter, which is the active one from then on; others come by ``add_adapter``.
    ``accelerate_frozen`` moves every other frozen ``nn.Linear`` to the CPU's fastest matmul engine too (``explain``).
    ``check``: what happens, after the first backward, if an owner has read the weight of an adapted layer instead of
    calling it, so that the adapter never learns: ``"raise"`` (``RuntimeError`` with the names), ``"warn"``, ``"off"``.
    Such reads are warned of where they happen, also in eval mode.

    Raises ``TypeError`` or ``ValueError`` naming the field for unknown targets or patterns, ranks a matrix cannot have,
    a model that is already adapted, wrapped by PEFT or DDP, or sharded; the model is then as it was.

    >>> model = fastlora.inject(nn.Sequential(nn.Linear(8, 8)), fastlora.LoraConfig(r=2, target_modules=["0"]))
    >>> fastlora.summary(model).adapter_params
    32
    """
    check_model(model)
    check_adapter_name(adapter, "adapter")
    check_choice("check", check, MODES)
    refuse_parallel(model, "inject")
    check_flag("accelerate_frozen", accelerate_frozen)
    refuse_adapted(model)
    config = with_tied(model, config_for(model, config))
    saved = find_modules_to_save(model, config)
    names = find_targets(model, config, saved)
    refuse_tying(model, config, names)
    refuse_shared(model, saved, "config", config.ensure_weight_tying)
    plan, rows = plan_injection(model, config, names), plan_rows(model, config, names, saved)
    router = Router(adapter)
    for planned in plan:
        commit_injection(model, planned, config, router, adapter)
    commit_rows(model, rows, router, adapter)
    model.register_forward_pre_hook(router.enter)
    model.register_forward_hook(router.leave, always_call=True)
    group_layers(model)
    _freeze(model, config, saved)
    if accelerate_frozen:
        _accelerate(model, config)
    router.configs[adapter] = copy.deepcopy(config)
    model.fastlora_configs = router.configs
    watch_learning(model, check)
    watch_savers(model)
    watch_places(model)
    keep_changeable(model)
    if config.init_lora_weights in FROM_DATA:
        name = config.init_lora_weights
        logger.warning("init_lora_weights=%r: A is random until fastlora.%s", name, FROM_DATA[name])
    return model


def check_adapter_name(name: Any, argument: str) -> str:
    """``name`` as that of a new adapter: part of the keys of a state dict, and of a ``nn.ModuleDict``."""
    accepted = "a non-empty string without dots"
    if not check_instance(argument, name, str, accepted) or "." in name:
        raise wrong_value(argument, accepted, name)
    if hasattr(nn.ModuleDict(), name):
        raise wrong_value(argument, "a name that nn.ModuleDict does not use itself", name)
    return name


def refuse_adapted(model: nn.Module) -> None:
    """``ValueError`` for a model that has adapters, ours or PEFT's."""
    refuse_peft(model)
    for name, module in model.named_modules():
        if isinstance(module, Adapted):
            raise ValueError(f"model: {name!r} already has an adapter; use set_ranks to change ranks")


def refuse_peft(model: nn.Module) -> None:
    """``ValueError`` for a model that PEFT has wrapped, as a whole or in part."""
    for name, module in model.named_modules():
        if type(module).__module__.split(".")[0] == "peft":
            where = f"{name!r} is" if name else "it is"
            way = "fastlora.from_peft takes its adapter over, PEFT's unload() drops it"
            if getattr(model, "_hf_peft_config_loaded", False):  # by add_adapter of transformers
                way = "model.save_pretrained(folder) writes its adapter, and fastlora.load reads it into a new base"
            raise ValueError(f"model: {where} wrapped by PEFT ({type(module).__name__}); {way}")


def _select(model: nn.Module, config: LoraConfig, field: str, others: bool = False) -> list[str]:
    """Names chosen by a role, a regular expression or a list of suffixes; every entry must choose something.

    ``others``: whether the config has other targets. PEFT's rules know one role, and no names but of modules.
    """
    spec, roles = getattr(config, field), ROLES
    if config.peft_rules:
        roles = ("all-linear",) if field == "target_modules" else ()
    modules = named_targets(model) if field != "modules_to_save" else own_modules(model)
    if field == "target_modules" and (not isinstance(spec, str) or spec not in roles):
        modules = {n: m for n, m in modules.items() if not isinstance(m, ExpertStack)}  # as in PEFT: target_parameters
    virtual = (StackedProjection, InProjection) if config.peft_rules else ()
    known = [n for n, m in modules.items() if n and not isinstance(m, virtual)]
    linears = [n for n in known if is_linear(modules[n])]
    if isinstance(spec, str):
        if spec in roles:
            names = every_linear(model, linears) if config.peft_rules else role_targets(model, spec)
            _tell_experts(model, spec, bool(names), others)
        else:
            names = [n for n in known if re.fullmatch(spec, n)]
        if not names:
            near = suggestion(spec, [*roles, *{n.rpartition(".")[2] for n in linears}])
            near = ", a role, which fastlora.LoraConfig knows" if spec in ROLES and spec not in roles else near
            raise wrong_value(field, f"a role or a pattern that matches modules of {type(model).__name__}", spec, near)
        return names
    spec = sorted(spec) if isinstance(spec, (set, frozenset)) else spec
    if not isinstance(spec, Sequence) or not all(isinstance(s, str) for s in spec) or not spec:
        raise wrong_value(field, f"a role {ROLES}, a regular expression or a list of names", spec)
    chosen: set[str] = set()
    for suffix in spec:
        hits = [n for n in known if has_suffix(n, suffix)]
        if not hits:
            near = suggestion(suffix, sorted({n.rpartition(".")[2] for n in linears} | set(linears)))
            raise wrong_value(field, f"suffixes of module names of {type(model).__name__}", suffix, near)
        chosen.update(hits)
    return [n for n in known if n in chosen]


def _tell_experts(model: nn.Module, role: str, any_taken: bool, others: bool) -> None:
    """Say that a role leaves experts out, unless the config has ``others``; ``ValueError`` where it takes nothing."""
    named = ((n, m) for n, m in model.named_modules() if role in ("mlp", "experts", "all-linear"))
    experts = [f"{n}.{p}" for n, m in named for p in expert_parameters(m)]
    what, instead = "parameters of experts", "; the role 'experts' or target_parameters takes them"
    if role == "experts":
        known = named_targets(model)
        experts, instead = [name for name in experts if name not in known], ""
        what += " that transformers' registry does not run"
    if not experts or others:
        return
    if not any_taken:
        raise ValueError(f"target_modules: {role!r} takes nothing: {listed(experts)} are {what}{instead}")
    logger.warning("target_modules: %r leaves out %s, %s", role, listed(experts), what)


def _select_parameters(model: nn.Module, suffixes: Sequence[str]) -> list[str]:
    """The parameters of experts that ``target_parameters`` means, in the model's order."""
    modules = named_targets(model)
    stacks, chosen = [n for n, m in modules.items() if isinstance(m, ExpertStack)], set()
    for suffix in suffixes:
        hits = [n for n in stacks if has_suffix(n, suffix)]
        if not hits:
            owners = [m for n, m in modules.items() if has_suffix(f"{n}.{suffix.rpartition('.')[2]}", suffix)]
            other = next((m for m in owners if suffix.rpartition(".")[2] in m._parameters), None)
            why = suggestion(suffix, stacks)
            if other is not None:
                why = f" of {'.'.join(class_name(other))}, which transformers' registry of experts does not run"
            accepted = "suffixes of parameters [E, N, K] of experts"
            raise wrong_value("target_parameters", accepted, suffix, why)
        chosen.update(hits)
    return [n for n in stacks if n in chosen]


def _projections(model: nn.Module, names: Collection[str]) -> list[str]:
    """``names`` in the model's order; as in PEFT an ``nn.MultiheadAttention`` means its projections."""
    attentions = [n for n in torch_attentions(model) if n in names]
    projections = {f"{a}.{p}" if a else p for a in attentions for p in ("in_proj", "out_proj")}
    return [n for n in named_targets(model) if n in projections or (n in names and n not in attentions)]


def _refuse_both(saved: list[str], names: Collection[str]) -> None:
    """``ValueError`` where one of the modules that are trained whole is, or has inside, what has an adapter."""
    both = next((name for name in names if inside(name, saved)), None)
    if both is not None:
        raise ValueError(f"modules_to_save: {both!r} is also a target; a module is adapted or trained, not both")


def _without_saved(config: LoraConfig, names: list[str], saved: list[str]) -> list[str]:
    """As in PEFT, what is trained and saved whole is not adapted as well; nothing asked for may be lost by that."""
    target = config.target_modules or ()
    for suffix in () if isinstance(target, str) else target:
        hits = [n for n in names if has_suffix(n, suffix)]
        if all(inside(n, saved) for n in hits):
            _refuse_both(saved, hits)
    left = [n for n in names if not inside(n, saved)]
    if not left:
        _refuse_both(saved, names)
    return left


def find_targets(model: nn.Module, config: LoraConfig, saved: list[str], blocks: list[str] | None = None) -> list[str]:
    """Full names of the linears that a config adapts, in the model's order, but for those inside ``saved`` modules.

    ``blocks``: names outside of these modules are not looked at. As in PEFT, ``target_parameters`` are taken whatever
    is excluded.

    Raises ``ValueError`` for patterns that match nothing and for linears that cannot be adapted.
    """
    parameters = _select_parameters(model, config.target_parameters) if config.target_parameters else []
    if config.target_modules is None and not parameters:
        raise wrong_value("target_modules", f"a role {ROLES}, a regular expression or a list of names", None)
    names: list[str] = []
    if config.target_modules or not parameters:
        names = _select(model, config, "target_modules", bool(parameters))
    excluded = [] if config.exclude_modules is None else _select(model, config, "exclude_modules")
    if not config.peft_rules:
        names, excluded = (_projections(model, frozenset(found)) for found in (names, excluded))
    if blocks is not None:
        names, parameters = ([n for n in found if inside(n, blocks)] for found in (names, parameters))
        if not names and not parameters:
            accepted = f"what matches modules inside the blocks {blocks}"
            raise wrong_value("target_modules", accepted, config.target_modules)
    left = set(names) - set(excluded)
    # As in PEFT a container is not its contents; unnoticed, nothing would be excluded.
    around = next((e for e in excluded for n in names if n in left and n.startswith(e + ".")), None)
    if around is not None:
        raise ValueError(f"exclude_modules: {around!r} is no target but holds some; say '{around}..*' as a pattern")
    names = _projections(model, left)
    if not names and not parameters:
        raise ValueError("exclude_modules: nothing is left of target_modules")
    modules = named_targets(model)
    chosen = {*(of_layers(config, names) if names else ()), *parameters}
    names = _without_saved(config, [n for n in modules if n in chosen], saved)
    for name in names:
        reason = None if isinstance(modules[name], Adapted) else refusal(model, name)
        if reason is not None:
            raise ValueError(f"target_modules: {name!r} cannot be adapted: {reason}; exclude_modules leaves it out")
    return names


def find_modules_to_save(model: nn.Module, config: LoraConfig) -> list[str]:
    """Full names of the modules that a config trains and saves whole."""
    return _select(model, config, "modules_to_save") if config.modules_to_save else []


def plan_injection(model: nn.Module, config: LoraConfig, names: list[str]) -> list[_Planned]:
    """New factors, scales and classes of every target, before the model changes: whatever can fail fails here."""
    modules = named_targets(model)
    slices = slices_of(model, config, names)
    keys = [matrix_key(n, s) for n in names for s in slices[n]]
    attentions = frozenset(torch_attentions(model))
    rank_of = pattern_lookup(config, "rank_pattern", keys, attentions)
    alpha_of = pattern_lookup(config, "alpha_pattern", keys, attentions)
    plan, users = [], users_of_parameters(model)
    for name in names:
        layer = modules[name]
        check_weight(name, layer, config.backend)
        if isinstance(layer, ExpertStack) and config.backend == "triton":
            raise ValueError(
                f"backend: 'triton' multiplies by the weight itself, and experts leave {name!r} to the model"
            )
        K = features(layer)[0]
        defaults = {s: default_rank(config, s, min(K, rows)) for s, rows in slices[name].items()}
        ranks = {s: rank_of.get(matrix_key(name, s), rank) for s, rank in defaults.items()}
        groups, lookup = getattr(layer, "groups", 1), isinstance(layer, nn.Embedding)
        refuse_beyond_factors(name, layer, config, ranks, users)
        checked_ranks(ranks, K, slices[name], name, config.any_rank, groups)
        scale = {s: config.scaling(r, alpha_of.get(matrix_key(name, s))) for s, r in ranks.items()}
        spec = AdapterSpec(scale, config.lora_dropout, config.init_lora_weights, adapter_dtype_of(config, layer))
        factors = new_factors(slices[name], ranks, K, spec, layer.weight.device, groups, lookup)
        plan.append(_Planned(name, layer, slices[name], spec, factors))
        _begin(plan[-1], config)
    return plan


def _begin(planned: _Planned, config: LoraConfig) -> None:
    """What factors take from a weight, which stays as it is, and what goes with B."""
    layer, (A, B) = planned.layer, planned.factors
    if takes_weight(planned.spec.init):
        start_from_weight(planned.matrix(), planned.slices, planned.spec, A, B)
    if all(a is None for a in A.tensors().values()):
        return  # what goes with B would do nothing, and never learn
    if config.lora_bias:
        bias = new_bias(features(layer)[1], planned.spec, A, layer.weight.device)
        B.register_parameter("bias", nn.Parameter(bias))
    if config.use_dora:
        magnitude = new_magnitude(planned.matrix(), planned.slices, planned.spec, A, B)
        B.register_parameter("magnitude", nn.Parameter(magnitude))


def commit_injection(model: nn.Module, planned: _Planned, config: LoraConfig, router: Router, adapter: str) -> None:
    """Adapt one layer in place, by a change of class unless it is adapted already, and install the new factors."""
    layer = planned.layer
    if not isinstance(layer, Adapted):
        layer.in_features, layer.out_features = features(layer)
        if type(layer) not in PLAIN_LINEARS and adapted_class(layer, False) is Linear:
            layer.base_class = type(layer)
        change_class(layer, adapted_class(layer, split=set(planned.slices) != {WHOLE}))
        attach_state(layer, planned.slices, config, router, planned.path)
        take_over(model, planned.path, layer)
    layer.install(adapter, planned.spec, *planned.factors)
    if takes_weight(planned.spec.init):
        take_out(planned.matrix(), planned.slices, planned.spec, *planned.factors)
    layer.lora_A.train(layer.training)
    layer.lora_B.train(layer.training)


def group_layers(model: nn.Module) -> None:
    """Let layers that share an input run together: q, k and v, and siblings of equal width once they are seen to."""
    modules = dict(model.named_modules())
    for block in attention_blocks(model):
        every = [modules[n] for n in block.names if isinstance(modules.get(n), Linear)]
        widths = {layer.in_features for layer in every if block.shared}
        for K in widths:
            layers = [layer for layer in every if layer.in_features == K]
            known = next((layer.group for layer in layers if layer.group is not None), None)
            if len(layers) < 2:
                continue
            if known is None:
                group_projections(modules[block.owner], layers)
            elif known.layers != layers:
                known.regroup(layers)
    for owner in modules.values():
        if isinstance(owner, Adapted):
            continue
        alike: dict[int, list[Linear]] = {}
        for child in owner.children():
            if isinstance(child, Linear) and child.group is None and not hasattr(child, "owner"):
                alike.setdefault(child.in_features, []).append(child)
        for layers in alike.values():
            if len(layers) > 1:
                group_projections(owner, layers, expected=False)


def _freeze(model: nn.Module, config: LoraConfig, saved: list[str]) -> None:
    """Freeze all but adapters, modules to save and what ``bias`` asks for; what was frozen stays frozen."""
    layers = adapted_layers(model)
    keep = {id(p) for rows in token_rows(model).values() for p in rows.parameters()}
    for layer in layers.values():
        keep.update(id(p) for p in (*layer.lora_A.parameters(), *layer.lora_B.parameters()))
    modules = dict(model.named_modules())
    for name in saved:
        parameters = list(modules[name].parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            logger.warning("modules_to_save: %r was frozen before injection and stays frozen", name)
        keep.update(id(p) for p in parameters)
    biases: dict[str, nn.Parameter | None] = {}
    if config.bias == "all":
        biases = {n: p for n, p in model.named_parameters() if n == "bias" or n.endswith(".bias")}
    elif config.bias == "lora_only":
        biases = {f"{path}.bias": layer._parameters.get("bias") for path, layer in layers.items()}
    frozen = [n for n, p in biases.items() if p is not None and not p.requires_grad and id(p) not in keep]
    if frozen:
        logger.warning("bias: frozen before injection and stay frozen: %s", listed(frozen))
    keep.update(map(id, biases.values()))
    freeze(model, [p for p in model.parameters() if id(p) not in keep])


def _accelerate(model: nn.Module, config: LoraConfig) -> None:
    for name, module in model.named_modules():
        plain = type(module) is nn.Linear and not module.weight.requires_grad and foreign_base(module) is None
        if plain and refusal(model, name) is None and not passed_by(model, name):
            change_class(module, FrozenLinear)
            module.engine = ENGINE_OF_PREPACK[config.prepack]


def sharing_copy(model: nn.Module, own: Collection[int] = ()) -> nn.Module:
    """A deep copy whose frozen parameters are the very ones of ``model``, but for those whose ids are in ``own``."""
    shared = {id(p): p for p in model.parameters() if not p.requires_grad and id(p) not in own}
    # What old pruning and weight_norm have computed is an attribute that torch refuses to copy.
    computed = [t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor) and not t.is_leaf]
    return copy.deepcopy(model, shared | {id(t): t.detach() for t in computed})
