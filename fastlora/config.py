"""LoraConfig: the fields of PEFT's LoraConfig that are implemented, and a few of our own."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import torch

from ._utils.errors import (
    check_choice,
    check_instance,
    check_integer,
    check_mapping,
    check_number,
    suggestion,
    wrong_type,
    wrong_value,
)
from .ops.backends import BACKENDS

_Made = TypeVar("_Made")
ROLES = ("qkv", "attention", "mlp", "mixer", "experts", "all-linear")

# difficulty -> (r, lora_alpha, target_modules)
PRESETS: Mapping[str, tuple[int, int, str]] = MappingProxyType(
    {
        "simple": (8, 16, "attention"),
        "medium": (16, 32, "all-linear"),
        "complex": (32, 64, "all-linear"),
        "very_complex": (64, 128, "all-linear"),
    }
)
# Fields of peft.LoraConfig that change no number here: they say where a file came from or how PEFT runs, or mean
# nothing unless another field is set.
PEFT_NEUTRAL = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "runtime_config", "megatron_core",
    "eva_config", "lora_ga_config", "corda_config", "loftq_config",  # of initialisations, which are refused themselves
    "fan_in_fan_out",  # PEFT corrects it by the class of each layer, which says how its weight lies
    "qalora_group_size",  # of use_qalora, which is refused itself
}  # fmt: skip


# Initialisations that move a part of the frozen weight into the factors: W + s B A is what W was.
FROM_WEIGHT = ("pissa", "olora")
_NITER = re.compile(r"pissa_niter_(\d+)")


def power_iterations(init: Any) -> int | None:
    """n of ``"pissa_niter_n"``, whose part of W is a random estimate that nobody could have again from a file."""
    found = _NITER.fullmatch(init) if isinstance(init, str) else None
    return None if found is None else int(found[1])


def takes_weight(init: Any) -> bool:
    """Whether an initialisation moves a part of the frozen weight into the factors."""
    return init in FROM_WEIGHT or power_iterations(init) is not None


# Initialisations that start as True does, and the function that makes more of them.
FROM_DATA = {
    "eva": "initialize_eva(model, covariances)",
    "corda": "initialize_corda(model, covariances, method=...)",
    "lora_ga": "initialize_lora_ga(model, batches, loss_fn, direction=..., scale=...)",
}
# Those of PEFT that are not here, and why.
_NOT_HERE = {
    "mica": "B frozen and A trained; use 'olora', or freeze lora_B after inject",
    "loftq": "weights rounded to a grid; quantize the model first and use True",
}
# The nearest thing to a field of PEFT's that is not here.
_NEAREST = {
    "layer_replication": "replicate the layers of the model first, then inject",
    "use_qalora": "plain LoRA runs over a quantized base; leave it out",
    "alora_invocation_tokens": "every token has the adapter; fastlora.use_adapters takes ids by token instead",
    "megatron_config": "fully_shard and DDP are what is implemented of parallel training",
}
# Fields that are one of a few.
_CHOICES: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none", "all", "lora_only"),
    "scale": ("constant", "per_rank"),
    "prepack": ("auto", True, False),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", *FROM_DATA, *FROM_WEIGHT),
    "lora_bias": (True, False),
    "use_dora": (True, False),
    "ensure_weight_tying": (True, False),
    "use_rslora": (True, False),
    "backend": ("auto", *BACKENDS),
}
_TARGETS = f"a role {ROLES}, a regular expression or a list of names"


def _check_split(value: Any) -> None:
    more = ", or names of modules to the rows of their slices"
    if not isinstance(value, Mapping):
        check_choice("split_qkv", value, (None, True, False), more)
        return
    for name, rows in value.items():
        if not isinstance(name, str) or not isinstance(rows, Mapping) or not rows:
            raise wrong_value("split_qkv", f"one of {(None, True, False)}{more}", value)
        for part, count in rows.items():
            check_integer(f"split_qkv[{name!r}][{part!r}]", count, 1)


def _check_targets(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, str) and not _names(value):
        raise wrong_type(name, _TARGETS, value)
    if isinstance(value, str) and value not in ROLES:
        try:
            re.compile(value)
        except re.error as error:
            raise wrong_value(name, _TARGETS, value, f", which is no regular expression: {error}") from None


def check_token_indices(value: Any, name: str = "trainable_token_indices") -> None:
    """Refuse what is no list of different rows, and no mapping of names to such."""
    if isinstance(value, Mapping) and value:
        for key, indices in value.items():
            check_instance(f"{name}: a key", key, str, "the name of an embedding")
            check_token_indices([] if isinstance(indices, Mapping) else indices, f"{name}[{key!r}]")
        return
    accepted = "one or several different indices of rows, or names of embeddings to such"
    check_instance(name, value, (list, tuple, Mapping), accepted)
    for index in value:
        check_integer(name, index, 0)
    if not value or len(set(value)) < len(value):
        raise wrong_value(name, accepted, value)


def _names(value: Any) -> bool:
    return isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(name, str) for name in value)


def _naming_fields(made: type[_Made]) -> type[_Made]:
    """A dataclass whose constructor, given a field that it does not have, says which one may be meant."""
    init, known = made.__init__, [f.name for f in dataclasses.fields(made)]

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **fields: Any) -> None:
        for name in fields:
            if name not in known:
                near = suggestion(name, known)
                raise TypeError(f"{name}: expected a field of {made.__name__}, {', '.join(known)}, got {name!r}{near}")
        init(self, *args, **fields)

    made.__init__ = checked  # type: ignore[method-assign]
    return made


@_naming_fields
@dataclass
class LoraConfig:
    """What to adapt and how.

    ``y = x W^T + bias + s x A^T B^T`` with ``s = lora_alpha / r`` (``lora_alpha / sqrt(r)`` with ``use_rslora``).

    - ``target_modules``: a list of name suffixes, a regular expression that matches whole names, or a role:
      ``"qkv"``, ``"attention"``, ``"mlp"``, ``"mixer"``, ``"experts"``, ``"all-linear"`` (no convolutions, as in PEFT).
      A slice that a role takes has at most as many ranks as rows.
    - ``exclude_modules``: suffixes, an expression or a role: what of ``target_modules`` is left alone.
    - ``lora_dropout``: probability that an entry of x is zero in the update while training, others over 1 - p.
    - ``bias``: which biases are trained besides: ``"none"``, ``"all"``, or ``"lora_only"``, those of targets.
    - ``modules_to_save``: suffixes of modules that are trained whole and saved, such as a head.
    - ``target_parameters``: suffixes of parameters [E, N, K] of experts, as ``"experts.down_proj"``: each expert has
      its own A, B and rank (``experts.down_proj[3]``), without dropout.
    - ``init_lora_weights``: True, ``"gaussian"`` (A normal / r, B zero), False (both random), ``"orthogonal"`` (even
      r), or, with ``W ← W − s B A``, ``"pissa"`` (leading singular vectors of W) and ``"olora"`` (its QR factors): as
      in PEFT the frozen weight is then the rest, with the adapter disabled and for who loads the file, too.
      ``"pissa_niter_n"`` estimates pissa's by a random subspace and n power iterations; its files are plain LoRA of
      twice the rank, with what was taken out of W beside A and B. On one model pissa did worse than True: -0.66 ± 0.29
      points of accuracy (``docs/experiment.md``).
      ``"eva"``, ``"corda"`` and ``"lora_ga"`` are True until ``fastlora.initialize_eva``, ``initialize_corda`` or
      ``initialize_lora_ga`` has seen the data.
    - ``lora_bias``: a trained bias beside B, ``y += s b_B``. ``use_dora``: rows of the sum have a trained length m,
      ``y = m / ‖W + s B A‖ (x W^T + s x A^T B^T) + bias``; no gradient goes through the norm. On one model it did as
      well as plain LoRA of the same ranks: +0.19 ± 0.22 points of accuracy (``docs/experiment.md``).
    - ``layers_to_transform``: indices of the only layers that a list of names or a role means; ``layers_pattern``: the
      names of the ``nn.ModuleList`` that they count, any one where it is None.
    - ``rank_pattern``, ``alpha_pattern``: keys (``blocks.0.attn.qkv[q]``), module paths or PEFT's suffix patterns.
    - ``trainable_token_indices``: rows of the input embedding that are trained themselves, or names of embeddings and
      linears to their rows; an output layer that shares the weight (``tie_word_embeddings``) follows.
    - ``ensure_weight_tying``: ``modules_to_save`` that name the input embedding or what shares its weight train the one
      weight of all of them; targets that share it are refused.
    - ``scale``: ``"constant"`` keeps the one ``s`` of (lora_alpha, r) whatever a layer's rank; ``"per_rank"`` divides
      by each layer's own rank, as PEFT does.
    - ``split_qkv``: whether a fused matrix gets one adapter for each of its slices, as q, k and v, or gate and up;
      None follows the role and leaves a matrix whole whose layout is not known (``fastlora.roles``), True takes thirds
      of it. ``{"attn.qkv": {"q": 64, "k": 16, "v": 16}}`` says the rows of slices one after another, and splits no
      others.
    - ``adapter_dtype``: dtype of A and B, float32 unless the weight is float64; ``backend``: see ``fastlora.explain``.
    - ``prepack``: whether oneDNN may keep a packed copy of W for each direction on a CPU: where it is measured to be
      faster (``"auto"``), always in float32 and bfloat16, or never. Every use compares W with a further copy of it.

    Raises ``TypeError`` or ``ValueError`` that names the field.

    >>> fastlora.LoraConfig(r=4, lora_alpha=8, target_modules="attention").scaling(4)
    2.0
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: Sequence[str] | None = None
    init_lora_weights: bool | str = True
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    lora_bias: bool = False
    use_dora: bool = False
    target_parameters: Sequence[str] | None = None
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    ensure_weight_tying: bool = False
    scale: str = "constant"
    split_qkv: bool | None | Mapping[str, Mapping[str, int]] = None
    adapter_dtype: torch.dtype | None = None
    backend: str = "auto"
    prepack: bool | str = "auto"

    # Whether names and patterns mean what they mean to PEFT: no roles, no names but of modules, the first pattern that
    # matches. Whether a rank may exceed min(N, K), as it may in PEFT. Not fields: nobody has to write them down.
    peft_rules: ClassVar[bool] = False
    any_rank: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.r = check_integer("r", self.r, 1)
        check_number("lora_alpha", self.lora_alpha)
        for name, of in (("rank_pattern", "names to ranks"), ("alpha_pattern", "names to numbers")):
            check_mapping(name, getattr(self, name), of)
        for key, alpha in self.alpha_pattern.items():
            check_number(f"alpha_pattern[{key!r}]", alpha)
        self.rank_pattern = {k: check_integer(f"rank_pattern[{k!r}]", v, 0) for k, v in self.rank_pattern.items()}
        check_number("lora_dropout", self.lora_dropout, 0, below=1, accepted="a probability")
        init = self.init_lora_weights
        reason = next((why for name, why in _NOT_HERE.items() if isinstance(init, str) and init.startswith(name)), None)
        if reason is not None:
            raise ValueError(f"init_lora_weights: {init!r} is not implemented: it takes {reason}")
        for name, accepted in _CHOICES.items():
            if name != "init_lora_weights" or power_iterations(init) is None:
                check_choice(name, getattr(self, name), accepted)
        _check_split(self.split_qkv)
        dtype = self.adapter_dtype
        if dtype is not None:
            check_instance("adapter_dtype", dtype, torch.dtype, "a floating torch.dtype or None")
            if not dtype.is_floating_point:
                raise wrong_value("adapter_dtype", "a floating torch.dtype or None", dtype)
        for name in ("target_modules", "exclude_modules"):
            _check_targets(name, getattr(self, name))
        for name in ("modules_to_save", "target_parameters"):
            if getattr(self, name) is not None and not _names(getattr(self, name)):
                raise wrong_type(name, "a list of names or None", getattr(self, name))
        self._check_layers()
        if self.trainable_token_indices is not None:
            check_token_indices(self.trainable_token_indices)
        if self.lora_bias and (self.use_dora or init not in (True, False)):
            other = "use_dora=False" if self.use_dora else "init_lora_weights True or False"
            raise wrong_value("lora_bias", f"False, or {other}", True)

    def _check_layers(self) -> None:
        wanted, pattern = self.layers_to_transform, self.layers_pattern
        indices = list(wanted) if isinstance(wanted, (list, tuple, set, frozenset)) else [wanted]
        for index in () if wanted is None else indices:
            check_integer("layers_to_transform", index, 0, "None, or one or several integers")
        if pattern is not None and not isinstance(pattern, str) and not _names(pattern):
            raise wrong_type("layers_pattern", "a name, a list of names or None", pattern)
        if pattern and not indices_of(wanted):
            raise wrong_value("layers_pattern", "None without layers_to_transform", pattern)
        for name in names_in(pattern):
            try:
                re.compile(name)
            except re.error as error:
                raise wrong_value("layers_pattern", "regular expressions", name, f": {error}") from None
        target = self.target_modules
        if indices_of(wanted) and isinstance(target, str) and target not in ROLES:
            raise wrong_value("layers_to_transform", "None with a regular expression, which can say it itself", wanted)

    def scaling(self, rank: int, alpha: float | None = None) -> float:
        """``s`` of a matrix of this ``rank``: ``alpha / r``, or ``alpha / sqrt(r)`` with ``use_rslora``.

        ``alpha``: of this matrix (``alpha_pattern``), ``lora_alpha`` unless given. r is the config's, and the matrix's
        own rank under ``scale="per_rank"``. Raises ``TypeError`` or ``ValueError`` naming the argument.
        """
        check_integer("rank", rank, 0)
        alpha = self.lora_alpha if alpha is None else check_number("alpha", alpha)
        divisor = rank if self.scale == "per_rank" and rank > 0 else self.r
        return alpha / math.sqrt(divisor) if self.use_rslora else alpha / divisor

    @classmethod
    def coerce(cls, config: Any) -> LoraConfig:
        """A LoraConfig from a ``config`` of ours or from a ``peft.LoraConfig`` whose set fields are all implemented.

        ``inject`` and ``add_adapter`` take a ``peft.LoraConfig`` itself: what PEFT asks the model for (targets by its
        type, the head of a task, experts that transformers has stacked) is found there.
        Raises ``TypeError`` for anything else, ``ValueError`` naming a field that is not implemented.

        >>> fastlora.LoraConfig.coerce(fastlora.LoraConfig(r=4)).r
        4
        """
        if isinstance(config, cls):
            return config
        of_peft = type(config).__module__.split(".")[0] == "peft" and type(config).__name__ == "LoraConfig"
        if not (of_peft and dataclasses.is_dataclass(config)):
            raise wrong_type("config", "a fastlora.LoraConfig or a peft.LoraConfig", config)
        taken = cls(**_from_peft_fields(config))
        taken.peft_rules = taken.any_rank = True
        return taken

    @classmethod
    def preset(cls, difficulty: str, **fields: Any) -> LoraConfig:
        """A ``LoraConfig`` for a task: r / alpha 8 / 16 on the attention, 16 / 32, 32 / 64 or 64 / 128 on all linears.

        ``difficulty``: ``"simple"``, ``"medium"``, ``"complex"``, ``"very_complex"``. ``fields`` override any field. A
        fused qkv gets one dense adapter unless ``split_qkv=True``. Raises ``ValueError`` for an unknown difficulty, and
        what ``LoraConfig`` raises for its fields.

        >>> fastlora.LoraConfig.preset("medium").r
        16
        """
        r, alpha, targets = PRESETS[check_choice("difficulty", difficulty, PRESETS)]
        return cls(**{"r": r, "lora_alpha": alpha, "target_modules": targets, "split_qkv": False, **fields})


def indices_of(layers: Sequence[int] | int | None) -> list[int]:
    """The indices that ``layers_to_transform`` gives; none where every layer is meant."""
    return [] if layers is None else [layers] if isinstance(layers, int) else list(layers)


def names_in(patterns: Sequence[str] | str | None) -> list[str]:
    """The names that ``layers_pattern`` gives."""
    return [patterns] if isinstance(patterns, str) and patterns else list(patterns or ())


def layer_index(path: str, patterns: Sequence[str] | str | None) -> int | None:
    """Index of the layer that a module lies in: below the first list of modules, or the first one of these names."""
    found = None if patterns else re.match(r".*?\.[^.]*\.(?P<index>\d+)\.", path)
    for pattern in names_in(patterns):
        found = found or re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", path)
    return None if found is None else int(found["index"])


def _from_peft_fields(config: Any) -> dict[str, Any]:
    ours = {f.name for f in dataclasses.fields(LoraConfig)}
    taken: dict[str, Any] = {"scale": "per_rank"}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.name in ours:
            taken[f.name] = sorted(value) if isinstance(value, set) else value
        elif f.name not in PEFT_NEUTRAL and not _is_default(f, value):
            nearest = _NEAREST.get(f.name, "leave it out")
            raise ValueError(f"config: peft.LoraConfig field {f.name}={value!r} is set and not implemented: {nearest}")
    for name in ("rank_pattern", "alpha_pattern"):
        taken[name] = dict(taken.get(name) or {})
    for name, words in (("target_modules", ("all-linear",)), ("init_lora_weights", ("gaussian", "olora", "mica"))):
        value = taken.get(name)
        if isinstance(value, str) and value.lower() in words:  # in any case, as in PEFT
            taken[name] = value.lower()
    return taken


def _is_default(f: dataclasses.Field, value: Any) -> bool:
    if f.default is not dataclasses.MISSING:
        return value == f.default
    if f.default_factory is not dataclasses.MISSING:
        default = f.default_factory()
        return value == default or (not value and not default)
    return False
