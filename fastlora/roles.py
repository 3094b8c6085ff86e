"""What a module is: the one table of roles. A new model family is one more entry here."""

from __future__ import annotations

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
HEADS = ("head", "head_dist", "classifier", "lm_head", "score", "fc", "qa_outputs", "pre_classifier")


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
    output: str | None


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def attention_blocks(model: nn.Module) -> Iterator[Projections]:
    """Every attention block of the model, by structure: all inputs must be linears of one input width."""
    modules = dict(model.named_modules())
    for path, owner in modules.items():
        for entry in ATTENTION:
            found = [_below(owner, name) for name in entry.inputs]
            if not all(isinstance(m, nn.Linear) for m in found) or len({m.in_features for m in found}) != 1:
                continue
            if entry.fused and found[0].out_features % 3:
                continue
            output = _output_of(modules, path, entry)
            yield Projections(path, tuple(_join(path, n) for n in entry.inputs), entry.fused, output)
            break


def _output_of(modules: dict[str, nn.Module], path: str, entry: Attention) -> str | None:
    for name in entry.outputs:
        base = path.rpartition(".")[0] if name.startswith("^") else path
        full = _join(base, name.lstrip("^"))
        if isinstance(modules.get(full), nn.Linear):
            return full
    return None


def mlp_linears(model: nn.Module) -> list[str]:
    """Names of the feed-forward linears, by structure."""
    names = []
    for path, owner in model.named_modules():
        for entry in MLP:
            if all(isinstance(_below(owner, n), nn.Linear) for n in entry):
                names += [_join(path, n) for n in entry]
                break
    return names


def is_head(model: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether a linear is (part of) the task head: the model says so, or its top-level name does."""
    for getter in ("get_output_embeddings", "get_classifier"):
        get = getattr(model, getter, None)
        if callable(get):
            try:
                head = get()
            except (NotImplementedError, AttributeError):
                continue
            if isinstance(head, nn.Module) and any(m is module for m in head.modules()):
                return True
    return name.split(".")[0] in HEADS


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
    if name.rpartition(".")[2] == "qkv" and getattr(owner, "q_bias", None) is not None:
        return f"its owner {type(owner).__module__}.{type(owner).__name__} reads qkv.weight instead of calling qkv"
    return None


def pattern_matches(pattern: str, name: str) -> bool:
    """PEFT's rule for the keys of ``rank_pattern`` and ``alpha_pattern``: a regular expression for the name's tail."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", name) is not None
    except re.error:
        return False
