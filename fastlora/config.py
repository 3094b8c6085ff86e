"""LoraConfig: the fields of PEFT's LoraConfig that are implemented, and a few of our own."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import torch

from ._utils.errors import check_finite, check_rank, suggestion, unknown_choice
from .ops.backends import BACKENDS

ROLES = ("qkv", "attention", "mlp", "all-linear")

# difficulty -> (r, lora_alpha, target_modules)
PRESETS: Mapping[str, tuple[int, int, str]] = MappingProxyType(
    {
        "simple": (8, 16, "attention"),
        "medium": (16, 32, "all-linear"),
        "complex": (32, 64, "all-linear"),
        "very_complex": (64, 128, "all-linear"),
    }
)
# Fields of peft.LoraConfig that say where a file came from or how PEFT runs, and change no number here.
_PEFT_NEUTRAL = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "runtime_config", "ephemeral_gpu_offload", "megatron_core", "fan_in_fan_out",
}  # fmt: skip


def _names(value: Any) -> bool:
    return isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(name, str) for name in value)


def _naming_fields(made: type) -> type:
    """A dataclass whose constructor, given a field that it does not have, says which one may be meant."""
    init, known = made.__init__, [f.name for f in dataclasses.fields(made)]

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **fields: Any) -> None:
        for name in fields:
            if name not in known:
                near = suggestion(name, known)
                raise TypeError(f"{made.__name__} has no field {name!r}, only {', '.join(known)}{near}")
        init(self, *args, **fields)

    made.__init__ = checked
    return made


@_naming_fields
@dataclass
class LoraConfig:
    """What to adapt and how.

    ``y = x W^T + bias + s x A^T B^T`` with ``s = lora_alpha / r`` (``lora_alpha / sqrt(r)`` with ``use_rslora``).

    - ``target_modules``: a list of name suffixes, a regular expression that matches whole names, or a role:
      ``"qkv"``, ``"attention"``, ``"mlp"``, ``"all-linear"``.
    - ``rank_pattern``, ``alpha_pattern``: keys (``blocks.0.attn.qkv[q]``), module paths or PEFT's suffix patterns.
    - ``scale``: ``"constant"`` keeps the one ``s`` of (lora_alpha, r) whatever a layer's rank; ``"per_rank"`` divides
      by each layer's own rank, as PEFT does.
    - ``split_qkv``: whether a fused qkv gets one adapter for each of q, k, v; None follows the role.
    - ``adapter_dtype``: dtype of A and B, float32 unless the weight is float64; ``backend``: see ``fastlora.explain``.
    - ``prepack``: whether oneDNN may keep a packed copy of W for each direction on a CPU: where it is measured to be
      faster (``"auto"``), always, or never.

    Raises ``ValueError`` that names the field.
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
    scale: str = "constant"
    split_qkv: bool | None = None
    adapter_dtype: torch.dtype | None = None
    backend: str = "auto"
    prepack: bool | str = "auto"

    # How patterns are looked up; PEFT takes the first that matches. Not a field: nobody has to write it down.
    exact_names_first: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_rank(self.r, "r")
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"{name}: expected a mapping of names to numbers, got {getattr(self, name)!r}")
        for name, value in (("lora_alpha", self.lora_alpha), *((f"alpha_pattern[{k!r}]", v) for k, v in self.alpha_pattern.items())):  # fmt: skip  # noqa: E501
            check_finite(value, name)
        for key, rank in self.rank_pattern.items():
            check_rank(rank, f"rank_pattern[{key!r}]", minimum=0)
        if not isinstance(self.lora_dropout, (int, float)) or not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout: expected a probability in [0, 1), got {self.lora_dropout!r}")
        self._check_choice("bias", ("none", "all", "lora_only"))
        self._check_choice("scale", ("constant", "per_rank"))
        self._check_choice("prepack", ("auto", True, False))
        self._check_choice("init_lora_weights", (True, False, "gaussian"))
        dtype = self.adapter_dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"adapter_dtype: expected a floating torch.dtype, got {dtype!r}")
        self._check_choice("split_qkv", (None, True, False))
        self._check_choice("use_rslora", (True, False))
        self._check_choice("backend", ("auto", *BACKENDS))
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str) and value not in ROLES:
                try:
                    re.compile(value)
                except re.error as error:
                    raise ValueError(f"{name}: {value!r} is neither a role {ROLES} nor a regular expression: {error}") from None  # fmt: skip  # noqa: E501
            if value is not None and not isinstance(value, str) and not _names(value):
                raise ValueError(f"{name}: expected a role {ROLES}, a regular expression or a list of names, got {value!r}")  # fmt: skip  # noqa: E501
        if isinstance(self.modules_to_save, str):
            raise ValueError(f"modules_to_save: expected a list of names, got the string {self.modules_to_save!r}")
        if self.modules_to_save is not None and not _names(self.modules_to_save):
            raise ValueError(f"modules_to_save: expected a list of names, got {self.modules_to_save!r}")

    def _check_choice(self, name: str, accepted: tuple) -> None:
        value = getattr(self, name)
        if not any(value is a or (isinstance(a, str) and value == a) for a in accepted):
            raise unknown_choice(name, value, accepted)

    def scaling(self, rank: int, alpha: float | None = None) -> float:
        """``s`` of a matrix of this rank: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        check_rank(rank, "rank", minimum=0)
        alpha = self.lora_alpha if alpha is None else check_finite(alpha, "alpha")
        divisor = rank if self.scale == "per_rank" and rank > 0 else self.r
        return alpha / math.sqrt(divisor) if self.use_rslora else alpha / divisor

    @classmethod
    def coerce(cls, config: Any) -> LoraConfig:
        """A LoraConfig from one of ours or from a ``peft.LoraConfig`` whose set fields are all implemented."""
        if isinstance(config, cls):
            return config
        if not (dataclasses.is_dataclass(config) and type(config).__module__.split(".")[0] == "peft"):
            raise ValueError(f"config: expected fastlora.LoraConfig or peft.LoraConfig, got {type(config).__name__}")
        if type(config).__name__ != "LoraConfig":
            raise ValueError(f"config: expected peft.LoraConfig, got peft.{type(config).__name__}")
        taken = cls(**_from_peft_fields(config))
        taken.exact_names_first = False
        return taken

    @classmethod
    def preset(cls, difficulty: str, **fields: Any) -> LoraConfig:
        """A ``LoraConfig`` for a task: r / alpha 8 / 16 on the attention, 16 / 32, 32 / 64 or 64 / 128 on all linears.

        ``difficulty``: ``"simple"``, ``"medium"``, ``"complex"``, ``"very_complex"``. ``fields`` override any field. A
        fused qkv gets one dense adapter unless ``split_qkv=True``. Raises ``ValueError`` for an unknown difficulty and
        for fields that ``LoraConfig`` refuses.
        """
        if not isinstance(difficulty, str) or difficulty not in PRESETS:
            raise unknown_choice("difficulty", difficulty, tuple(PRESETS))
        r, alpha, targets = PRESETS[difficulty]
        return cls(**{"r": r, "lora_alpha": alpha, "target_modules": targets, "split_qkv": False, **fields})


def _from_peft_fields(config: Any) -> dict[str, Any]:
    ours = {f.name for f in dataclasses.fields(LoraConfig)}
    taken: dict[str, Any] = {"scale": "per_rank"}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.name in ours:
            taken[f.name] = sorted(value) if isinstance(value, set) else value
        elif f.name not in _PEFT_NEUTRAL and not _is_default(f, value):
            raise ValueError(f"config: peft.LoraConfig field {f.name}={value!r} is set and not implemented")
    for name in ("rank_pattern", "alpha_pattern"):
        taken[name] = dict(taken.get(name) or {})
    return taken


def _is_default(f: dataclasses.Field, value: Any) -> bool:
    if f.default is not dataclasses.MISSING:
        return value == f.default
    if f.default_factory is not dataclasses.MISSING:
        default = f.default_factory()
        return value == default or (not value and not default)
    return False
