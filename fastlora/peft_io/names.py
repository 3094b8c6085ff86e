"""PEFT's conventions: config fields, selection rules, keys, nn.MultiheadAttention's names."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from .._utils.errors import check_integer, wrong_value
from ..config import FROM_WEIGHT, PEFT_NEUTRAL, check_token_indices, indices_of, layer_index, names_in
from ..model.modules import has_suffix, named_targets, tied_embeddings, torch_attentions
from ..nn.active import join, kept_inside, own_modules
from ..nn.attention import InProjection
from ..nn.experts import ExpertProjection, ExpertStack
from ..nn.linear import adapted_layers
from ..nn.token_rows import LEAF

PREFIX = "base_model.model."
# An embedding's factors are parameters themselves.
_FACTOR = r"(?P<path>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(?(embedding)|\.weight)"
LORA_KEY = re.compile(re.escape(PREFIX) + _FACTOR)

# What stands beside B: ``lora_bias``, ``use_dora``.
BESIDE_KEY = re.compile(re.escape(PREFIX) + r"(?P<path>.+)\.lora_(?P<name>B\.bias|magnitude_vector)")
BESIDE = {"B.bias": "bias", "magnitude_vector": "magnitude"}


def rows_key(path: str) -> str:
    """PEFT's key of the trained rows of the embedding at a path."""
    return f"{PREFIX}{path}.{LEAF}.trainable_tokens_delta"


def factor_key(stored: str, factor: str, module: nn.Module) -> str:
    """PEFT's key of A or B of the module that is stored under a name."""
    kind = f"embedding_{factor}" if isinstance(module, nn.Embedding) else f"{factor}.weight"
    return f"{PREFIX}{stored}.lora_{kind}"


@dataclass(frozen=True)
class PeftFields:
    """The fields of ``peft.LoraConfig`` that decide what a file means, under PEFT's names and defaults."""

    r: int = 8
    lora_alpha: float = 8
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] = field(default_factory=list)
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    lora_bias: bool = False
    use_dora: bool = False
    ensure_weight_tying: bool = False
    target_parameters: list[str] = field(default_factory=list)
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None

    def rank(self, path: str) -> int:
        return _pattern_value(self._ranks, path, self.r)

    def scale(self, path: str) -> float:
        """``s`` of one matrix: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        rank, alpha = self.rank(path), _pattern_value(self._alphas, path, self.lora_alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    @cached_property
    def _ranks(self) -> list[tuple[re.Pattern, int]]:
        return _compiled(self.rank_pattern)

    @cached_property
    def _alphas(self) -> list[tuple[re.Pattern, float]]:
        return _compiled(self.alpha_pattern)

    @property
    def targets_known(self) -> bool:
        """Whether the targets can be told from the file alone; PEFT fills in the others from the model's type."""
        spec = self.target_modules
        return spec is not None and not (isinstance(spec, str) and spec.lower() == "all-linear")

    def parameters(self, model: nn.Module, where: str) -> list[str]:
        """The parameters of experts that PEFT would adapt, by path; ``ValueError`` naming ``where`` for others."""
        if not self.target_parameters:
            return []
        stacks = {n: m for n, m in named_targets(model).items() if isinstance(m, ExpertStack)}
        for suffix in self.target_parameters:
            if not any(has_suffix(n, suffix) for n in stacks):
                _refuse_router(model, stacks, suffix, where)
                kind = type(model).__name__
                accepted = f"suffixes of parameters [E, N, K] of experts of {kind} that transformers' registry runs"
                raise wrong_value(f"{where}: target_parameters", accepted, suffix)
        return [n for n in stacks if any(has_suffix(n, s) for s in self.target_parameters)]

    def selects(self, path: str) -> bool:
        """Whether PEFT would adapt the module of this name."""
        if self.exclude_modules and _matches(self.exclude_modules, path):
            return False
        if excluded_by_saved(path, self.modules_to_save):
            return False
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, path) is not None
        if path in self.target_modules:
            return True
        wanted = indices_of(self.layers_to_transform)
        return _matches(self.target_modules, path) and (not wanted or layer_index(path, self.layers_pattern) in wanted)


def _refuse_router(model: nn.Module, stacks: Mapping[str, ExpertStack], suffix: str, where: str) -> None:
    """``ValueError`` for the weight [E, K] that chooses experts: PEFT's "all-linear" takes it, too."""
    count = {path.rsplit(".", 2)[0]: len(stack.weight) for path, stack in stacks.items()}
    for name, parameter in model.named_parameters():
        router = name.rpartition(".")[0]
        if has_suffix(name, suffix) and parameter.dim() == 2 and count.get(router.rpartition(".")[0]) == len(parameter):
            kind = type(model.get_submodule(router)).__name__
            raise ValueError(
                f"{where}: target_parameters: {suffix!r} is of a router ({router}, a {kind}), and routers take no "
                "adapter here; name the targets in PEFT, since 'all-linear' takes routers, or merge the adapter there"
            )


def _matches(spec: str | Iterable[str], path: str) -> bool:
    if isinstance(spec, str):
        return re.fullmatch(spec, path) is not None
    return any(path == s or path.endswith("." + s) for s in spec)


def _compiled(patterns: Mapping[str, Any]) -> list[tuple[re.Pattern, Any]]:
    return [(re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in patterns.items()]


def _pattern_value(patterns: list[tuple[re.Pattern, Any]], path: str, default: Any) -> Any:
    return next((value for pattern, value in patterns if pattern.match(path)), default)


def excluded_by_saved(path: str, modules_to_save: Iterable[str]) -> bool:
    """Whether PEFT refuses to adapt a module because it lies in one of ``modules_to_save``."""
    return any(re.match(rf"(^|.*\.){m}($|\..*)", path) for m in modules_to_save)


def saved_by(modules_to_save: Collection[str], names: Iterable[str]) -> list[str]:
    """Modules that PEFT trains and saves whole: it compares the ends of *prefixed* names, and not at dots."""
    return [n for n in names if any((PREFIX + n).endswith(m) for m in modules_to_save)]


def parse_fields(raw: Any, where: str) -> PeftFields:
    """Check and read adapter_config.json; ``ValueError`` naming ``where`` and the field, unimplemented ones too."""
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(raw).__name__}")
    if raw.get("peft_type") != "LORA":
        raise ValueError(f"{where}: peft_type: only 'LORA' is implemented, got {raw.get('peft_type')!r}")
    known = set(PeftFields.__dataclass_fields__)
    for name, value in raw.items():
        if name not in known | PEFT_NEUTRAL and not _unset(value):
            raise ValueError(f"{where}: PEFT's field {name}={value!r} is set and not implemented")
    taken = {name: raw[name] for name in known if raw.get(name) is not None}
    init = taken.get("init_lora_weights")
    if isinstance(init, str) and init.lower() in _ANY_CASE:
        taken["init_lora_weights"] = init.lower()
    for name in ("r", "target_modules"):
        if name not in raw or (name == "r" and raw[name] is None):
            raise ValueError(f"{where}: the field {name} is missing")
    try:
        for name, value in taken.items():
            _check_field(name, value)
        fields = PeftFields(**taken)
        if not fields.target_modules and not fields.target_parameters and fields.target_modules is not None:
            raise wrong_value("target_modules", "a string or a list of names", fields.target_modules)
        # Every pattern once, so that none of them fails later.
        fields.scale("a")
        whole = [s for s in (fields.target_modules, fields.exclude_modules) if isinstance(s, str)]
        for pattern in [*whole, *names_in(fields.layers_pattern), *fields.modules_to_save]:
            re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{where}: not a regular expression: {error.pattern!r}: {error}") from None
    except (TypeError, ValueError) as error:  # of what a file holds, a wrong type is a wrong value
        raise ValueError(f"{where}: {error}") from None
    return fields


def _unset(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, (dict, list, str)) and not value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) and v for v in value)


def _is_indices(value: Any) -> bool:
    return all(type(v) is int for v in (value if isinstance(value, list) else [value]))


_ANY_CASE = ("gaussian", "olora")  # PEFT compares these two in lower case, and others as they are
_INITS = ("gaussian", "orthogonal", "eva", *FROM_WEIGHT)
_CHECKS = {
    "lora_alpha": (_is_number, "a finite number"),
    "target_modules": (lambda v: isinstance(v, str) or _is_strings(v), "a string or a list of names"),
    "target_parameters": (_is_strings, "a list of names"),
    "exclude_modules": (lambda v: isinstance(v, str) or _is_strings(v), "a string or a list of names"),
    "lora_dropout": (lambda v: _is_number(v) and 0 <= v < 1, "a probability in [0, 1)"),
    "bias": (lambda v: v in ("none", "all", "lora_only"), "'none', 'all' or 'lora_only'"),
    **dict.fromkeys(
        ("use_rslora", "lora_bias", "use_dora", "ensure_weight_tying"), (lambda v: isinstance(v, bool), "true or false")
    ),
    "modules_to_save": (_is_strings, "a list of names"),
    "init_lora_weights": (
        lambda v: isinstance(v, bool) or v in _INITS,
        f"true, false or one of {_INITS} (factors of others belong to a changed weight; PEFT's save_pretrained makes "
        "them plain with path_initial_model_for_weight_conversion)",
    ),  # fmt: skip  # noqa: E501
    "rank_pattern": (lambda v: isinstance(v, dict), "an object of ranks"),
    "alpha_pattern": (lambda v: isinstance(v, dict) and all(map(_is_number, v.values())), "an object of numbers"),
    "layers_to_transform": (_is_indices, "layer indices"),
    "layers_pattern": (lambda v: isinstance(v, str) or _is_strings(v), "a string or a list of names"),
}


def _check_field(name: str, value: Any) -> None:
    if name == "r":
        _check_rank(value, name)
        return
    if name == "trainable_token_indices":
        check_token_indices(value)
        return
    accepts, expected = _CHECKS[name]
    if not accepts(value):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    if name == "rank_pattern":
        for key, rank in value.items():
            _check_rank(rank, f"rank_pattern[{key!r}]")


def _check_rank(value: Any, name: str) -> None:
    if check_integer(name, value, 1) >= 2**31:
        raise wrong_value(name, "the rank of a matrix", value)


def base_names(model: nn.Module, remove_duplicate: bool = True) -> list[str]:
    """Names of the modules that the model has without its adapters, as PEFT would see them."""
    named = own_modules(model, remove_duplicate).items()
    return [name for name, module in named if name and not isinstance(module, (InProjection, ExpertProjection))]


def choose_targets(paths: Collection[str], names: Collection[str]) -> list[str] | str:
    """``target_modules`` that selects exactly ``paths``: short suffixes, else full names, else a regular expression."""
    wanted = set(paths)
    for depth in range(1, max(p.count(".") for p in wanted) + 1):
        suffixes = {".".join(p.split(".")[-depth:]) for p in wanted}
        # A bare index says nothing of what it selects, and PEFT has special rules for it.
        if len(suffixes) < len(wanted) and not any(s.isdigit() for s in suffixes) and _exact(suffixes, names, wanted):
            return sorted(suffixes)
    if _exact(wanted, names, wanted):
        return sorted(wanted)
    return f"^(?:{'|'.join(re.escape(p) for p in sorted(wanted))})$"


def _exact(spec: Collection[str], names: Collection[str], wanted: set[str]) -> bool:
    return {n for n in names if any(n == s or n.endswith("." + s) for s in spec)} == wanted


def without_containers(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Modules to save, and of lists and dictionaries of modules, which PEFT cannot wrap, the modules inside."""
    out: list[str] = []
    for name in names:
        module = model.get_submodule(name)
        apart = isinstance(module, (nn.ModuleList, nn.ModuleDict)) and not module._parameters and not module._buffers
        inside = [f"{name}.{child}" for child, _ in module.named_children()]
        out += without_containers(model, inside) if apart else [name]
    return out


def choose_saved(saved: list[str], given: Iterable[str], names: Collection[str], paths: Collection[str]) -> tuple[list[str], list[str]]:  # fmt: skip  # noqa: E501
    """``modules_to_save`` for a file, and all modules that PEFT will then take from it.

    PEFT cannot be told to stop at dots, so it may take more than ``saved``. ``ValueError`` where that would include an
    adapted module or one inside another.
    """
    if not saved:
        return [], []
    for spec in (list(given), saved):
        taken = saved_by(spec, names)
        nested = any(a != b and a.startswith(b + ".") for a in taken for b in taken)
        if set(saved) <= set(taken) and not nested and not any(excluded_by_saved(p, [*spec, *taken]) for p in paths):
            return spec, taken
    raise ValueError(f"modules_to_save: PEFT has no way to name {saved} without other modules: it would take {taken}")


def patterns(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """r, lora_alpha and the patterns for the paths that differ, by full name (PEFT matches tails otherwise)."""
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(p)}": v for p, v in sorted(ranks.items()) if v != r},
        "alpha_pattern": {f"^{re.escape(p)}": v for p, v in sorted(alphas.items()) if v != alpha},
    }


def followers_of(model: nn.Module, saved: Collection[str], config: Any) -> list[str]:
    """What PEFT writes beside the input embedding when that is saved and ``ensure_weight_tying`` is set."""
    source, *followers = tied_embeddings(model) if config.ensure_weight_tying else [""]
    return followers if source in saved else []


def saved_tensors(model: nn.Module, modules: Iterable[str]) -> dict[str, Tensor]:
    """PEFT's keys of ``modules_to_save`` -> the model's own parameters and buffers."""
    named = dict(model.named_modules(remove_duplicate=False))
    out = {f"{PREFIX}{n}.{k}": t for n in modules for k, t in named[n].state_dict(keep_vars=True).items()}
    for key, value in out.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"modules_to_save: {key!r} is a {type(value).__name__}; only tensors can be saved")
    return out


def bias_tensors(
    model: nn.Module, mode: str, stored: Mapping[str, str], saved: Collection[str], unranked: Collection[str] = ()
) -> dict[str, Tensor]:
    """PEFT's keys of the biases that ``bias=mode`` trains -> the model's own parameters, without those in ``saved``.

    ``stored``: path of each adapted layer -> its path in keys. ``unranked``: further modules, which are bare in keys.
    """
    if mode == "none":
        return {}
    out = {}
    beside = {id(p) for layer in adapted_layers(model).values() for p in layer.lora_B.parameters()}
    for name, tensor in model.state_dict(keep_vars=True).items():
        path, _, last = name.rpartition(".")
        if last != "bias" or id(tensor) in beside or any(path == s or path.startswith(s + ".") for s in saved):
            continue
        if path in stored:
            out[f"{PREFIX}{stored[path]}.base_layer.bias"] = tensor
        elif mode == "all" or path in unranked:
            out[PREFIX + name] = tensor
    return out


def unranked_biases(model: nn.Module, adapter: str, mode: str, stored: Collection[str]) -> set[str]:
    """Modules whose biases ``lora_only`` trains, and in which the adapter has no rank, so that no key is a matrix's."""
    if mode != "lora_only":
        return set()
    layers = adapted_layers(model).items()
    targets = {p for p, x in layers if adapter in x.adapter_names and x._parameters.get("bias") is not None}
    held = kept_inside(model, "fastlora_biases").items()
    loaded = {join(at, path) for at, kept in held for path in kept.get(adapter, ())}
    return (targets | loaded) - set(stored)


def wrapped_key(name: str, stored: Mapping[str, str], rows: Collection[str]) -> str:
    """PEFT's key of a tensor of the model that may lie under one of PEFT's wrappers.

    ``stored``: path of each adapted layer -> its path in keys. ``rows``: paths of layers that have rows of their own.
    """
    path, _, last = name.rpartition(".")
    if path in rows:
        path = f"{path}.{LEAF}.base_layer"
    elif path in stored:
        path = f"{stored[path]}.base_layer"
    elif f"{path}.in_proj" in stored:
        path = f"{path}.base_layer"
    return PREFIX + join(path, last)


def is_copy_of_saved(key: str, saved: Iterable[str], known: Collection[str]) -> bool:
    """Whether PEFT wrote one of the ``known`` keys a second time, from inside its wrapper of a module to save.

    It does so for embeddings and, with ``bias="all"``, for biases; it does not read them. The name of its adapter
    stays in those of modules inside.
    """
    for name in saved:
        found = re.fullmatch(re.escape(f"{PREFIX}{name}.") + r"(?:original_module|modules_to_save)\.(.+)", key)
        inside = found[1] if found else ""
        if {f"{PREFIX}{name}.{rest}" for rest in (inside, inside.partition(".")[2])} & set(known):
            return True
    return False


_OUTPUT = ".base_layer.out_proj"


class StoredNames:
    """Three names of a matrix: its path here, its path in the file's keys, and the module that PEFT adapts.

    ``attn.in_proj`` is ``attn`` and ``attn`` there, ``attn.out_proj`` is ``attn.base_layer.out_proj`` and ``attn``. Of
    the adapted ``parameters`` of experts the last is ``experts`` in keys, the one before it ``experts.base_layer``. Any
    other path is the same everywhere.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[str] = ()):
        self.attentions = set(torch_attentions(model))
        self._wrapped: dict[str, str] = {}
        around: dict[str, str] = {}
        for path in reversed(parameters):
            owner = path.rpartition(".")[0]
            around[owner] = f"{around[owner]}.base_layer" if owner in around else owner
            self._wrapped[path] = around[owner]
        self._parameters = {stored: path for path, stored in self._wrapped.items()}

    def stored(self, path: str) -> str:
        if path in self._wrapped:
            return self._wrapped[path]
        owner, _, leaf = path.rpartition(".")
        if owner not in self.attentions or leaf not in ("in_proj", "out_proj"):
            return path
        return owner if leaf == "in_proj" else owner + _OUTPUT

    def path(self, stored: str) -> str:
        if stored in self._parameters:
            return self._parameters[stored]
        if stored in self.attentions:
            return f"{stored}.in_proj"
        owner = self.module(stored)
        return stored if owner == stored else f"{owner}.out_proj"

    def module(self, stored: str) -> str:
        if stored in self._parameters:
            return self._parameters[stored]
        owner = stored.removesuffix(_OUTPUT)
        return owner if owner in self.attentions else stored

    def keys_of(self, module: str) -> tuple[str, ...]:
        """The paths in keys of what PEFT adapts under a module's name."""
        return (module, module + _OUTPUT) if module in self.attentions else (self._wrapped.get(module, module),)

    @property
    def inputs(self) -> list[str]:
        """Paths of the stacked projections, which are modules here only where they have an adapter."""
        return [f"{attention}.in_proj" for attention in self.attentions]

    def beside(self, path: str) -> tuple[str, ...]:
        """The paths that share a rank and a scale in the file with this one, itself among them."""
        owner = self.module(self.stored(path))
        return (f"{owner}.in_proj", f"{owner}.out_proj") if owner in self.attentions else (path,)
