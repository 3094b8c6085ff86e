"""Which modules can be adapted, the class that each becomes, and what its owner needs so that the layer is called.

Tables of attention and MLP blocks and of task heads, by structure and name: a model family is one entry.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .._utils.errors import unknown_choice
from ..config import ROLES
from ..nn.attention import InProjection, MultiheadAttention, StackedProjection, TransformerEncoderLayer
from ..nn.layer_view import Conv1D
from ..nn.linear import Adapted, Linear, QKVLinear
from ..nn.plain import CLASSES
from ..nn.quantized import foreign_base, foreign_class


@dataclass(frozen=True)
class Attention:
    """An attention block: its input projections and its output projection, by name below the owner."""

    inputs: tuple[str, ...]  # (q, k, v), or the one name of a fused [q; k; v] matrix
    outputs: tuple[str, ...]  # alternatives, first found; a leading "^" looks below the owner's parent

    @property
    def fused(self) -> bool:
        """Whether q, k and v are one matrix."""
        return len(self.inputs) == 1


ATTENTION = (
    Attention(("qkv",), ("proj", "out_proj")),
    Attention(("in_proj",), ("out_proj",)),
    Attention(("q_attn", "c_attn"), ("c_proj",)),  # GPT-2's cross-attention: k and v are one matrix
    Attention(("c_attn",), ("c_proj",)),
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
    ("fc1_g", "fc1_x", "fc2"),
    ("linear1", "linear2"),
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
    modules = named_targets(model)
    name_of = {module: name for name, module in modules.items()}
    for path, owner in modules.items():
        for entry in ATTENTION:
            found = [_below(owner, name) or modules.get(_join(path, name)) for name in entry.inputs]
            if not all(is_linear(m) for m in found) or len({features(m)[0] for m in found}) != 1:
                continue
            if entry.inputs == ("qkv",) and features(found[0])[1] % 3:
                continue
            output = _output_of(model, path, entry)
            # A module that several owners share goes by its first name.
            names = tuple(name_of[m] for m in found)
            yield Projections(path, names, entry.fused, _rows_are_blocks(owner, found[0]), name_of.get(output))
            break


def _rows_are_blocks(owner: nn.Module, layer: nn.Module) -> bool:
    if any(getattr(owner, flag, False) for flag in _INTERLEAVED_FLAGS) or class_name(owner) in _INTERLEAVED_CLASSES:
        return False
    K, N = features(layer)
    return N % 3 == 0 and (N == 3 * K or not hasattr(owner, "c_attn"))  # with one k and v for all heads N < 3 K


def _output_of(model: nn.Module, path: str, entry: Attention) -> nn.Module | None:
    for name in entry.outputs:
        base = path.rpartition(".")[0] if name.startswith("^") else path
        module = _below(model, _join(base, name.lstrip("^")))
        if is_linear(module):
            return module
    return None


def mlp_linears(model: nn.Module) -> list[str]:
    """Names of the feed-forward linears, by structure."""
    name_of = {module: name for name, module in model.named_modules()}
    names = []
    for owner in name_of:
        for entry in MLP:
            found = [_below(owner, n) for n in entry]
            if all(is_linear(m) for m in found):
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
        return [n for n, m in named_targets(model).items() if is_linear(m) and not is_head(model, n, m)]
    if role == "mlp":
        chosen = set(mlp_linears(model))
    elif role in ROLES:
        chosen = set()
        for block in attention_blocks(model):
            chosen.update(block.names)
            if role == "attention" and block.output:
                chosen.add(block.output)
    else:
        raise unknown_choice("role", role, ROLES)
    return [name for name in named_targets(model) if name in chosen]


def refusal(model: nn.Module, name: str) -> str | None:
    """Why a linear cannot be adapted in place, or None: its class, or an owner that reads the weight past the layer."""
    modules = named_targets(model)
    module, (path, _, leaf) = modules[name], name.rpartition(".")
    owner = modules.get(path, model)
    if adapted_class(module, split=False) is None:
        known = ", ".join(kind.__name__ for kind in CLASSES)
        return f"it is a {'.'.join(class_name(module))}, not exactly torch.nn.Linear, {known}"
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse):
        return "it is an embedding with max_norm or sparse gradients, which its factors could not have"
    readers = _torch_readers(modules, path, leaf)
    for reader, known in readers:
        if type(reader) is not known and type(reader).__module__ != "fastlora.nn.attention":
            kind = ".".join(class_name(reader))
            return f"its owner {kind}, not exactly torch.nn.{known.__name__}, may read the weight instead of calling it"
    if leaf == "in_proj" and readers and owner.in_proj_weight is None:
        return "its owner has kdim or vdim other than embed_dim, so that q, k and v are not one stacked matrix"
    # timm's BEiT, EVA and SwinV2: the layer is called only where the biases are apart.
    apart = getattr(owner, "q_bias", None) is None or getattr(owner, "qkv_bias_separate", False) or biases_apart(owner)
    if (leaf == "qkv" and not apart) or (not readers and _reads_weight(type(owner), leaf)):
        return f"its owner {'.'.join(class_name(owner))} reads {leaf}.weight instead of calling {leaf}"
    return None


def _torch_readers(modules: dict[str, nn.Module], path: str, leaf: str) -> list[tuple[nn.Module, type[nn.Module]]]:
    """torch's modules whose fused paths read the weight of ``path.leaf``, and the class that is known to."""
    owner, above = modules.get(path), modules.get(path.rpartition(".")[0])
    found = []
    if isinstance(owner, nn.MultiheadAttention):
        found.append((owner, nn.MultiheadAttention))
        if isinstance(above, nn.TransformerEncoderLayer) and above is not owner:
            found.append((above, nn.TransformerEncoderLayer))
    elif isinstance(owner, nn.TransformerEncoderLayer) and leaf in ("linear1", "linear2"):
        found.append((owner, nn.TransformerEncoderLayer))
    return found


@functools.cache
def _reads_weight(owner: type, leaf: str) -> bool:
    """Whether an owner's forward reads ``self.<leaf>.weight`` and never calls ``self.<leaf>``, by its source."""
    try:
        source = inspect.getsource(owner.forward)
    except (OSError, TypeError):
        return False
    reads = re.search(rf"\bself\.{re.escape(leaf)}\.weight\b(?!\.(?:dtype|device|shape)\b)", source)
    return reads is not None and re.search(rf"\bself\.{re.escape(leaf)}\(", source) is None


def pattern_matches(pattern: str, name: str) -> bool:
    """Whether a key of ``rank_pattern`` or ``alpha_pattern`` matches: PEFT takes it as an expression for the tail."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", name) is not None
    except re.error:
        return False


_CONV1D = ("transformers.pytorch_utils", "Conv1D")

# timm's owners of a fused qkv with biases apart: they multiply by qkv.weight themselves unless told that the biases are
# added to what qkv returns (timm 0.9.9 and later).
_BIAS_APART = (
    ("timm.models.beit", "Attention"),
    ("timm.models.eva", "EvaAttention"),
    ("timm.models.swin_transformer_v2", "WindowAttention"),
)


def class_name(module: Any) -> tuple[str, str]:
    """(module, name) of a module's class: compared with a table, so that no library need be imported."""
    kind = type(module)
    return kind.__module__, kind.__qualname__


def conv1d_class() -> type[nn.Module]:
    """The class of transformers that ``Conv1D`` was before it had an adapter."""
    return getattr(importlib.import_module(_CONV1D[0]), _CONV1D[1])


def is_linear(module: Any) -> bool:
    """Whether a module multiplies by one weight matrix: ``nn.Linear``, or transformers' ``Conv1D``."""
    return isinstance(module, nn.Linear) or class_name(module) == _CONV1D


def features(module: nn.Module) -> tuple[int, int]:
    """(K, N) of a linear, of a convolution over all channels, of an embedding (V, D)."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if isinstance(module, tuple(CLASSES)):
        return module.in_channels * math.prod(module.kernel_size), module.out_channels
    return tuple(module.weight.shape) if class_name(module) == _CONV1D else (module.in_features, module.out_features)


def adapted_class(module: nn.Module, split: bool) -> type[Adapted] | None:
    """The class that a layer becomes when it is adapted, or None for a class that is not known."""
    if class_name(module) == _CONV1D:
        return Conv1D
    if foreign_base(module) is not None:
        return foreign_class(module)
    if type(module) is StackedProjection:
        return InProjection
    if type(module) in (nn.Linear, NonDynamicallyQuantizableLinear):
        return QKVLinear if split else Linear
    return CLASSES.get(type(module))


def named_targets(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by name, and ``<path>.in_proj`` for the stacked projection of an ``nn.MultiheadAttention``."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        found.setdefault(name, module)
        if isinstance(module, nn.MultiheadAttention) and "in_proj" not in module._modules:
            found[f"{name}.in_proj" if name else "in_proj"] = StackedProjection(module)
    return found


def torch_attentions(model: nn.Module) -> list[str]:
    """Names of the ``nn.MultiheadAttention`` modules."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]


def users_of_parameters(model: nn.Module) -> dict[int, list[str]]:
    """Names of the modules that hold a parameter, by its id."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for _, parameter in module.named_parameters(recurse=False):
            users.setdefault(id(parameter), []).append(name)
    return users


def biases_apart(owner: nn.Module) -> bool:
    """Whether an owner adds the biases of its qkv itself, and has a switch that makes it call qkv."""
    return class_name(owner) in _BIAS_APART and hasattr(owner, "qkv_bias_separate")


def passed_by(model: nn.Module, name: str) -> bool:
    """Whether a linear's owner may read its weight without calling it, until ``take_over`` has changed the owner."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if biases_apart(owner):
        return leaf == "qkv" and owner.q_bias is not None and not owner.qkv_bias_separate
    return type(owner) in (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def take_over(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Make the owner of an adapted layer call it: known owners get another class, or their switch is set.

    Owners further up, too: ``nn.TransformerEncoderLayer`` reads the weights of its attention's projections.
    """
    parts = name.split(".")
    for depth in range(len(parts)):
        owner = model.get_submodule(".".join(parts[:depth]))
        if type(owner) is nn.TransformerEncoderLayer:
            owner.__class__ = TransformerEncoderLayer
        elif type(owner) is nn.MultiheadAttention:
            owner.__class__ = MultiheadAttention
        if depth == len(parts) - 1:
            if isinstance(layer, InProjection) and "in_proj" not in owner._modules:
                owner.hold(layer)
            elif biases_apart(owner) and parts[-1] == "qkv":
                owner.qkv_bias_separate = True
