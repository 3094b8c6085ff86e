"""What is trained: policies, parameter groups, the role of each parameter, the blocks of a model."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from .._utils.distributed import refuse_partitioned
from .._utils.errors import check_choice, check_integer, check_model, check_number, suggestion, wrong_value
from .._utils.types import ModelT
from ..config import LoraConfig
from ..nn.active import chosen_adapter, join, kept_inside, names_of
from ..nn.adapter import WHOLE
from ..nn.linear import adapted_layers
from .families import HEADS
from .inject import find_modules_to_save, find_targets, inject, refuse_adapted
from .modules import inside, is_head, saved_modules
from .peft_config import config_for
from .slices import slices_of


@dataclass(frozen=True)
class Policy:
    """What a policy trains besides the head, which is always trained; the final norm only with ``norms="all"``."""

    lora: str = "none"  # adapters on the linears of "all" blocks or of the "deep" ones
    norms: str = "none"  # "all" of the model, those of the "blocks", or of the "shallow" blocks, which have no adapters
    biases: bool = False


# A further policy is one line here.
POLICIES: Mapping[str, Policy] = {
    "deep_lora": Policy(lora="deep", norms="shallow"),
    "lora_only": Policy(lora="all"),
    "norm_only": Policy(norms="all"),
    "hybrid_parallel": Policy(lora="all", norms="blocks"),
    "bitfit": Policy(biases=True),
    "head_only": Policy(),
}


def apply_policy(model: ModelT, name: str, config: Any = None, *, deep: int | None = None) -> ModelT:
    """Choose what is trained, by layer; everything else is frozen. Changes the model in place and returns it.

    =================  ==============================================================================
    deep_lora          adapters on the deepest third of the blocks, the norms of the other blocks
    lora_only          adapters on every block
    norm_only          every norm
    hybrid_parallel    adapters and norms on every block (the final norm stays frozen)
    bitfit             every bias (Ben Zaken et al., "BitFit", ACL 2022)
    head_only          nothing else
    =================  ==============================================================================

    Each trains the head too: ``config.modules_to_save``, or the model's own classifier. Adapters go on all linears of a
    block unless ``config.target_modules`` says which; a fused qkv gets one dense adapter unless ``split_qkv``.
    ``deep`` is the number of deep blocks in each stack, a third (rounded) if None. ``config`` may be left out.

    Raises ``TypeError`` or ``ValueError`` naming the argument, with the model as it was, for an unknown policy, a model
    without blocks, norms, biases or a head where the policy needs them, and whatever ``inject`` refuses.

    >>> blocks = [nn.ModuleDict({"norm": nn.LayerNorm(8), "q": nn.Linear(8, 8)}) for _ in range(2)]
    >>> model = nn.Sequential(nn.ModuleList(blocks), nn.LayerNorm(8))
    >>> model = fastlora.apply_policy(model, "norm_only")
    >>> [name for name, p in model.named_parameters() if p.requires_grad][0]
    '0.0.norm.weight'
    """
    check_model(model)
    chosen = POLICIES[check_choice("name", name, POLICIES)]
    given = LoraConfig() if config is None else config
    config = copy.copy(config_for(model, given))
    config.target_modules = given.target_modules and config.target_modules  # where it says none, the policy does
    refuse_adapted(model)
    if chosen.lora == "none" and config.trainable_token_indices is not None:
        raise wrong_value(
            "trainable_token_indices", f"None with {name!r}, which has no adapter", [*config.trainable_token_indices]
        )
    heads = _heads(model, config, needed=name == "head_only")
    deep_blocks, shallow = _split(model, name, chosen, deep)
    norms = _norms(model, name, chosen, deep_blocks + shallow, shallow, heads)
    biases = _biases(model, name) if chosen.biases else []
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        # A policy says what is trained, also where it was frozen before.
        for module in (*heads, *norms):
            model.get_submodule(module).requires_grad_(True)
        if chosen.lora != "none":
            inject(model, _adapters(model, config, deep_blocks, [*heads, *norms]))
        else:
            model.requires_grad_(False)
            for module in (*heads, *norms):
                model.get_submodule(module).requires_grad_(True)
            for parameter in biases:
                parameter.requires_grad_(True)
    except BaseException:
        for parameter, needs in flags:
            parameter.requires_grad_(needs)
        raise
    model.fastlora_policy = AppliedPolicy(name, tuple(heads))
    return model


def _heads(model: nn.Module, config: LoraConfig, needed: bool) -> list[str]:
    names = [n for n, _ in model.named_modules()]
    wanted = list(config.modules_to_save or ())
    for suffix in wanted:
        if not any(n == suffix or n.endswith("." + suffix) for n in names):
            near = suggestion(suffix, names)
            accepted = f"suffixes of module names of {type(model).__name__}"
            raise wrong_value("modules_to_save", accepted, suffix, near)
    found = [n for n in names if any(n == w or n.endswith("." + w) for w in wanted)] if wanted else task_heads(model)
    if needed and not found:
        raise ValueError(f"model: {type(model).__name__} has no head that is known; name it in config.modules_to_save")
    return found


def _split(model: nn.Module, name: str, chosen: Policy, deep: int | None) -> tuple[list[str], list[str]]:
    """Blocks with adapters, and the others."""
    if deep is not None:
        check_integer("deep", deep, 1, "None for a third, or a number of blocks")
    if deep is not None and chosen.lora != "deep":
        raise ValueError(f"deep: policy {name!r} does not tell deep blocks from others")
    if chosen.lora == "none" and chosen.norms not in ("blocks", "shallow"):
        return [], []
    stacks = block_stacks(model)
    if not stacks:
        raise ValueError(
            f"model: policy {name!r} needs blocks: several modules of one class in a Sequential or ModuleList, each "
            f"with a linear and a norm; {type(model).__name__} has none"
        )
    if chosen.lora != "deep":
        return [block for blocks in stacks for block in blocks], []
    below, above = [], []
    for blocks in stacks:
        count = max(1, round(len(blocks) / 3)) if deep is None else deep
        if count > len(blocks):
            raise wrong_value("deep", f"at most the {len(blocks)} blocks of the stack of {blocks[0]!r}", deep)
        below += blocks[:-count]
        above += blocks[-count:]
    return above, below


def _norms(
    model: nn.Module, name: str, chosen: Policy, blocks: list[str], shallow: list[str], heads: list[str]
) -> list[str]:
    if chosen.norms == "none":
        return []
    where = {"all": [""], "blocks": blocks, "shallow": shallow}[chosen.norms]
    found = [n for block in where for n in norms_of(model, block)]
    found = [n for n in found if not inside(n, heads)]
    if where and not found:
        raise ValueError(f"model: policy {name!r} trains norms; {type(model).__name__} has none with parameters")
    return found


def _biases(model: nn.Module, name: str) -> list[nn.Parameter]:
    found = [p for n, p in model.named_parameters() if n.rpartition(".")[2] in ("bias", "in_proj_bias")]
    if not found:
        raise ValueError(f"model: policy {name!r} trains biases; {type(model).__name__} has none")
    return found


def _adapters(model: nn.Module, config: LoraConfig, blocks: list[str], saved: list[str]) -> LoraConfig:
    """The config that puts adapters on these blocks and trains ``saved`` whole, all by full name."""
    if config.target_modules is None:
        config.target_modules = "all-linear"
    names = find_targets(model, config, find_modules_to_save(model, config), blocks)
    if config.split_qkv is None:
        split = {n: slices for n, slices in slices_of(model, config, names).items() if set(slices) != {WHOLE}}
        config.split_qkv = split or False
    modules = [n for n, _ in model.named_modules()]
    for field, wanted in (("target_modules", names), ("modules_to_save", saved)):
        extra = [n for n in modules if n not in wanted and any(n.endswith("." + w) for w in wanted)]
        if extra:
            raise ValueError(
                f"{field}: {extra[0]!r} ends like the name of a chosen module; PEFT could not tell them apart"
            )
    config.target_modules, config.exclude_modules, config.modules_to_save = names, None, saved or None
    return config


def param_groups(
    model: nn.Module,
    *,
    lr_lora: float | Mapping[str, float] = 5e-4,
    lr_norm: float = 1e-3,
    lr_head: float = 1e-3,
    lr_bias: float = 1e-3,
    weight_decay: float | Mapping[str, float] = 0.0,
    lr_ratio: float = 1.0,
    adapter: str | None = None,
) -> list[dict[str, Any]]:
    """Trainable parameters as groups named lora, norm, bias, head and other, for any torch optimizer.

    ``lr_lora``, ``lr_norm``, ``lr_bias`` and ``lr_head`` are their learning rates.
    A ``weight_decay`` applies to head and other; adapters, norms and biases get 0. A mapping of group names to numbers
    sets it group by group (0 where a name is missing). ``other`` takes ``lr_head``. Empty groups are left out. Several
    adapters have a group lora each, with the adapter's name under ``"adapter"``; ``lr_lora`` may be a mapping of those.
    ``lr_ratio``: LoRA+, ``lr_lora * lr_ratio`` for B and what stands beside it (``lora_bias``, ``use_dora``), as groups
    lora_B; the factors of an embedding, of which A is zero at first, keep ``lr_lora``.
    ``adapter``: whose ``modules_to_save`` are the head, the active one's unless named.

    Source of ``lr_ratio``: Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models" (ICML 2024).

    Raises ``TypeError`` or ``ValueError`` naming the argument for rates and decays that are no finite numbers >= 0, and
    for a model with neither adapters nor a policy, or under ZeRO-3.

    >>> model = nn.Sequential(fastlora.nn.Linear(8, 8, r=2))
    >>> optimizer = torch.optim.AdamW(fastlora.param_groups(model, lr_lora=1e-3))
    >>> sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    32
    """
    adapter = chosen_or_policy(model, adapter)
    refuse_partitioned(model)
    by_adapter = _adapter_rates(model, lr_lora)
    rates = {"lora": ("lr_lora", next(iter(by_adapter.values()), 0.0)), "norm": ("lr_norm", lr_norm)}
    rates["bias"] = ("lr_bias", lr_bias)
    rates |= dict.fromkeys(("head", "other"), ("lr_head", lr_head))
    decays = _decays(weight_decay)
    groups: dict[str, dict[str, Any]] = {}
    for name in ROLES_OF_PARAMETERS:
        rate = float(check_number(*rates[name], 0))
        groups[name] = {"name": name, "params": [], "lr": rate, "weight_decay": decays.get(name, 0.0)}
    roles = parameter_roles(model, adapter)
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[roles[id(parameter)]]["params"].append(parameter)
    lora = groups.pop("lora")
    split = [lora] if len(by_adapter) < 2 else _by_adapter(model, lora, by_adapter)
    if check_number("lr_ratio", lr_ratio, above=0) != 1:
        split = [part for group in split for part in _by_factor(model, group, lr_ratio)]
    return [group for group in (*split, *groups.values()) if group["params"]]


def _adapter_rates(model: nn.Module, lr_lora: float | Mapping[str, float]) -> dict[str, float]:
    names = names_of(adapted_layers(model).values())
    if not isinstance(lr_lora, Mapping):
        return dict.fromkeys(names, float(check_number("lr_lora", lr_lora, 0)))
    if set(lr_lora) != set(names):
        raise wrong_value("lr_lora", f"a rate for each of {names}", list(lr_lora))
    return {name: float(check_number(f"lr_lora[{name!r}]", lr_lora[name], 0)) for name in names}


def _by_adapter(model: nn.Module, lora: dict[str, Any], rates: Mapping[str, float]) -> list[dict[str, Any]]:
    owner = {
        id(parameter): name
        for layer in adapted_layers(model).values()
        for name in layer.adapter_names
        for factors in (layer.lora_A[name], layer.lora_B[name])
        for parameter in factors.parameters()
    }
    return [
        {**lora, "adapter": name, "lr": rate, "params": [p for p in lora["params"] if owner[id(p)] == name]}
        for name, rate in rates.items()
    ]


def _by_factor(model: nn.Module, group: dict[str, Any], ratio: float) -> list[dict[str, Any]]:
    layers = [layer for layer in adapted_layers(model).values() if not layer.lookup]
    later = {id(p) for layer in layers for p in layer.lora_B.parameters()}
    first, second = ([p for p in group["params"] if (id(p) in later) is is_B] for is_B in (False, True))
    return [{**group, "params": first}, {**group, "name": "lora_B", "lr": group["lr"] * ratio, "params": second}]


def _decays(weight_decay: float | Mapping[str, float]) -> dict[str, float]:
    if not isinstance(weight_decay, Mapping):
        return dict.fromkeys(("head", "other"), float(check_number("weight_decay", weight_decay, 0)))
    for name in weight_decay:
        if name not in ROLES_OF_PARAMETERS:
            raise wrong_value("weight_decay", f"group names among {ROLES_OF_PARAMETERS}", name)
    return {name: float(check_number(f"weight_decay[{name!r}]", value, 0)) for name, value in weight_decay.items()}


_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_NORM_NAME = re.compile(r"(layer|rms|batch|group)norm", re.IGNORECASE)
_LINEAR_NAMES = ("Conv1D",)  # transformers' linear with a transposed weight


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalization with parameters of its own; other libraries' are known by name."""
    if not isinstance(module, _NORMS) and not _NORM_NAME.search(type(module).__name__):
        return False
    return any(True for _ in module.parameters(recurse=False))


def norms_of(model: nn.Module, name: str = "") -> list[str]:
    """Full names of the norms inside a module of the model."""
    return [n for n, m in model.named_modules() if is_norm(m) and (not name or n == name or n.startswith(name + "."))]


def block_stacks(model: nn.Module) -> list[list[str]]:
    """Names of the repeated blocks, shallow to deep, one list for each stack (an encoder, a tower).

    A block is one of several children of one class in an ``nn.Sequential`` or ``nn.ModuleList``, each with a linear and
    a norm inside; of nested ones the innermost counts. Stages (``layers.0.blocks``, ``layers.1.blocks``) are one stack.
    """
    found: dict[str, list[str]] = {}
    for path, container in model.named_modules():
        if not isinstance(container, (nn.Sequential, nn.ModuleList)):
            continue
        children = [(n, child) for n, child in container._modules.items() if child is not None and _is_block(child)]
        if children and len({type(child) for _, child in children}) == 1:
            found[path] = [f"{path}.{n}" if path else n for n, _ in children]
    inner = {p: b for p, b in found.items() if not any(q != p and inside(q, b) for q in found)}
    stacks: dict[str, list[str]] = {}
    for path, blocks in inner.items():
        stacks.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", path), []).extend(blocks)
    return [blocks for blocks in stacks.values() if len(blocks) > 1]


def _is_block(module: nn.Module) -> bool:
    linear = norm = False
    for part in module.modules():
        linear |= isinstance(part, nn.Linear) or type(part).__name__ in _LINEAR_NAMES
        norm |= is_norm(part)
    return linear and norm and not is_norm(module)


ROLES_OF_PARAMETERS = ("lora", "norm", "bias", "head", "other")


class AppliedPolicy(NamedTuple):
    """Which policy a model carries, and its head; kept as ``model.fastlora_policy``."""

    name: str
    heads: tuple[str, ...]


def chosen_or_policy(model: nn.Module, adapter: str | None) -> str | None:
    """``chosen_adapter``, or None for a model that a policy trains without adapters."""
    alone = adapter is None and bool(kept_inside(model, "fastlora_policy"))
    return None if alone and not adapted_layers(model) else chosen_adapter(model, adapter)


def parameter_roles(model: nn.Module, adapter: str | None) -> dict[int, str]:
    """id of each parameter -> its role (``ROLES_OF_PARAMETERS``).

    ``head``: inside a module that is trained and saved whole and is no norm. ``norm``: of a norm outside the head; its
    bias is a ``bias`` where the weight stays frozen.
    """
    roles = {id(p): "bias" if n == "bias" or n.endswith(".bias") else "other" for n, p in model.named_parameters()}
    for module in model.modules():
        if is_norm(module):
            own = dict(module.named_parameters(recurse=False))
            if any(p.requires_grad for n, p in own.items() if n != "bias"):
                roles.update((id(p), "norm") for p in own.values())
    modules = dict(model.named_modules())
    for name in head_modules(model, adapter):
        roles.update((id(p), "head") for p in modules[name].parameters())
    for layer in adapted_layers(model).values():
        roles.update((id(p), "lora") for f in (layer.lora_A, layer.lora_B) for p in f.parameters())
    return roles


def task_heads(model: nn.Module) -> list[str]:
    """Full names of the modules that classify; the output embedding of a language model is none."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and is_head(model, name, module) and not _embeds(model, module):
            top = name.partition(".")[0]
            found.append(top if top in HEADS else name)
    return list(dict.fromkeys(found))


def _embeds(model: nn.Module, head: nn.Module) -> bool:
    getters = [getattr(m, "get_output_embeddings", None) for m in model.modules()]
    return any(get() is head for get in getters if callable(get))


def head_modules(model: nn.Module, adapter: str | None) -> list[str]:
    """Full names of the modules that are trained whole and are no norms."""
    applied = kept_inside(model, "fastlora_policy").items()
    heads = [join(at, name) for at, policy in applied for name in policy.heads]
    names = [*saved_modules(model, adapter), *heads]
    modules = dict(model.named_modules())
    return [n for n in dict.fromkeys(names) if not is_norm(modules[n])]
