"""What a module is: the one table of roles. A new model family is one more entry here."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from .config import ROLES


@dataclass(frozen=True)
class Attention:
    """An attention block: its input projections and its output projection, by name below the owner."""

    inputs: tuple[str, ...]  # (q, k, v), or the one name of a fused [q; k; v] matrix
    outputs: tuple[str, ...]  # alternatives, first found; a leading "^" looks below the owner's parent

    @property
    def fused(self) -> bool:
        return len(self.inputs) == 1


ATTENTION = (
    Attention(("qkv",), ("proj", "out_proj")),
    Attention(("query", "key", "value"), ("^output.dense", "dense")),
    Attention(("query_proj", "key_proj", "value_proj"), ("^output.dense",)),
    Attention(("q_proj", "k_proj", "v_proj"), ("o_proj", "out_proj", "proj", "dense")),
    Attention(("q_lin", "k_lin", "v_lin"), ("out_lin",)),
    Attention(("to_q", "to_k", "to_v"), ("to_out.0", "to_out")),
    Attention(("wq", "wk", "wv"), ("wo",)),
    Attention(("q", "k", "v"), ("o", "proj")),
)

MLP = (
    ("fc1", "fc2"),
    ("gate_proj", "up_proj", "down_proj"),
    ("intermediate.dense", "output.dense"),
    ("c_fc", "c_proj"),
    ("lin1", "lin2"),
    ("wi_0", "wi_1", "wo"),
    ("wi", "wo"),
    ("w1", "w2", "w3"),
)

# First component of the path of a task head.
HEADS = (
    "head", "head_dist", "heads", "classifier", "pre_classifier", "classification_head", "lm_head", "score", "fc",
    "qa_outputs",
)  # fmt: skip

# Owners whose fused matrix does not hold q, k and v as three blocks of rows: an attribute that says so, or the class.
_INTERLEAVED_FLAGS = ("head_first", "use_global")
_INTERLEAVED_CLASSES = (("timm.models.tiny_vit", "Attention"),)


def is_plain_linear(module: Any) -> bool:
    """An exact ``nn.Linear``: subclasses may read or mean their weight differently."""
    return type(module) is nn.Linear


def _below(owner: nn.Module, name: str) -> nn.Module | None:
    for part in name.split("."):
        owner = owner._modules.get(part) if isinstance(owner, nn.Module) else None
    return owner


@dataclass(frozen=True)
class Projections:
    """The input projections found in one owner: full names in q, k, v order, and whether they are one matrix."""

    owner: str
    names: tuple[str, ...]
    fused: bool
    splits: bool  # whether the rows of a fused matrix are [q; k; v]
    output: str | None


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def attention_blocks(model: nn.Module) -> Iterator[Projections]:
    """Every attention block of the model, by structure: all inputs must be linears of one input width."""
    name_of = {module: name for name, module in model.named_modules()}
    for owner, path in name_of.items():
        for entry in ATTENTION:
            found = [_below(owner, name) for name in entry.inputs]
            if not all(isinstance(m, nn.Linear) for m in found) or len({m.in_features for m in found}) != 1:
                continue
            if entry.fused and found[0].out_features % 3:
                continue
            output = _output_of(model, path, entry)
            # A module that several owners share goes by its first name.
            names = tuple(name_of[m] for m in found)
            yield Projections(path, names, entry.fused, _rows_are_blocks(owner), name_of.get(output))
            break


def _rows_are_blocks(owner: nn.Module) -> bool:
    if any(getattr(owner, flag, False) for flag in _INTERLEAVED_FLAGS):
        return False
    return (type(owner).__module__, type(owner).__name__) not in _INTERLEAVED_CLASSES


def _output_of(model: nn.Module, path: str, entry: Attention) -> nn.Module | None:
    for name in entry.outputs:
        base = path.rpartition(".")[0] if name.startswith("^") else path
        module = _below(model, _join(base, name.lstrip("^")))
        if isinstance(module, nn.Linear):
            return module
    return None


def mlp_linears(model: nn.Module) -> list[str]:
    """Names of the feed-forward linears, by structure."""
    name_of = {module: name for name, module in model.named_modules()}
    names = []
    for owner in name_of:
        for entry in MLP:
            found = [_below(owner, n) for n in entry]
            if all(isinstance(m, nn.Linear) for m in found):
                names += [name_of[m] for m in found]
                break
    return names


def is_head(model: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether a linear is (part of) the task head: a model around it says so, or its top-level name does."""
    parts = name.split(".")
    for depth in range(len(parts)):
        owner = _below(model, ".".join(parts[:depth])) if depth else model
        for getter in ("get_output_embeddings", "get_classifier"):
            get = getattr(owner, getter, None)
            if callable(get):
                try:
                    head = get()
                except (NotImplementedError, AttributeError):
                    continue
                if isinstance(head, nn.Module) and any(m is module for m in head.modules()):
                    return True
    return parts[0] in HEADS


def role_targets(model: nn.Module, role: str) -> list[str]:
    """Full names of the linears that play a role (``ROLES``), in the model's order."""
    if role == "all-linear":
        return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not is_head(model, n, m)]
    if role == "mlp":
        chosen = set(mlp_linears(model))
    elif role in ROLES:
        chosen = set()
        for block in attention_blocks(model):
            chosen.update(block.names)
            if role == "attention" and block.output:
                chosen.add(block.output)
    else:
        raise ValueError(f"role: expected one of {ROLES}, got {role!r}")
    return [name for name, _ in model.named_modules() if name in chosen]


def refusal(model: nn.Module, name: str) -> str | None:
    """Why a linear cannot be adapted in place, or None. Its owner may read the weight instead of calling the layer."""
    modules = dict(model.named_modules())
    module, owner = modules[name], modules.get(name.rpartition(".")[0], model)
    if not is_plain_linear(module):
        return f"it is a {type(module).__module__}.{type(module).__name__}, not exactly torch.nn.Linear"
    if isinstance(owner, (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        return f"its owner {type(owner).__name__} reads the weight instead of calling the layer"
    leaf = name.rpartition(".")[2]
    # timm's BEiT, EVA and SwinV2: the layer is called only where the biases are apart.
    conditional = getattr(owner, "q_bias", None) is not None and not getattr(owner, "qkv_bias_separate", False)
    if (leaf == "qkv" and conditional) or _reads_weight(type(owner), leaf):
        kind = type(owner)
        return f"its owner {kind.__module__}.{kind.__name__} reads {leaf}.weight instead of calling {leaf}"
    return None


@functools.cache
def _reads_weight(owner: type, leaf: str) -> bool:
    """Whether the source of an owner's forward takes ``self.<leaf>.weight`` and never calls ``self.<leaf>``."""
    try:
        source = inspect.getsource(owner.forward)
    except (OSError, TypeError):
        return False
    reads = re.search(rf"\bself\.{re.escape(leaf)}\.weight\b(?!\.(?:dtype|device|shape)\b)", source)
    return reads is not None and re.search(rf"\bself\.{re.escape(leaf)}\(", source) is None


def pattern_matches(pattern: str, name: str) -> bool:
    """PEFT's rule for the keys of ``rank_pattern`` and ``alpha_pattern``: a regular expression for the name's tail."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", name) is not None
    except re.error:
        return False
