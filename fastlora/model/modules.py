"""Which modules can be adapted, the class that each becomes, and what the roles take."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized

from .._utils.errors import unknown_choice
from .._utils.torch_compat import forward_hooks
from ..config import ROLES
from ..nn.active import adapted_models, config_of, configs_in, join, own_modules
from ..nn.adapter import Slices
from ..nn.attention import InProjection, StackedProjection
from ..nn.experts import ExpertProjection, ExpertStack
from ..nn.frozen import FrozenLinear
from ..nn.layer_view import Conv1D
from ..nn.linear import Adapted, Linear, QKVLinear
from ..nn.plain import CLASSES, plain_class
from ..nn.pointwise import pointwise_class
from ..nn.quantized import foreign_base, foreign_class
from ..nn.weight_reads import ASKS
from .experts import expert_linears, expert_stacks, stack_refusal
from .families import ATTENTION, HEADS, MIXERS, MLP, NAMED_MLP, POSITIONS, SAYS_MLP, Attention
from .layouts import called_instead, known_layout


def _below(owner: nn.Module, name: str) -> nn.Module | None:
    for part in name.split("."):
        owner = owner._modules.get(part) if isinstance(owner, nn.Module) else None
    return owner


@dataclass(frozen=True)
class Projections:
    """The input projections found in one owner: full names in the order of the table, and whether they are one matrix.

    ``layouts``: the slices of those that hold several of q, k and v, None where no table knows how.
    """

    owner: str
    names: tuple[str, ...]
    fused: bool
    shared: bool
    layouts: dict[str, Slices | None]
    output: str | None


def attention_blocks(model: nn.Module) -> Iterator[Projections]:
    """Every attention block of the model, by structure: all inputs must be projections."""
    modules = named_targets(model)
    name_of = {module: name for name, module in modules.items()}
    for path, owner in modules.items():
        taken: set[nn.Module] = set()
        for entry in ATTENTION:
            leaves = [(leaf, name) for leaf in entry.inputs for name in _each(owner, leaf)]
            found = [_below(owner, name) or modules.get(join(path, name)) for _, name in leaves]
            if not leaves or not all(is_projection(m) for m in found) or taken.intersection(found):
                continue
            if any(called_instead(owner, leaf) for leaf, _ in leaves):
                continue
            # A module that several owners share goes by its first name.
            names, layouts = tuple(name_of[m] for m in found), {}
            for name, (leaf, _), module in zip(names, leaves, found, strict=True):
                layout = known_layout(owner, leaf, features(module)[1])
                if layout is not None or entry.fused:
                    layouts[name] = layout
            if entry.inputs in (("in_proj",), ("pwise",)) and layouts[names[0]] is None:
                continue  # of a mixer or an MLP, as far as its name goes
            taken.update(found)
            output = _output_of(model, path, entry)
            yield Projections(path, names, entry.fused, entry.shared, layouts, name_of.get(output))


def _each(owner: nn.Module, leaf: str) -> list[str]:
    """The name below an owner, or one for each module of a list where it has a ``*``."""
    held, star, rest = leaf.partition(".*")
    modules = _below(owner, held) if star else None
    return [f"{held}.{i}{rest}" for i in range(len(modules))] if isinstance(modules, nn.ModuleList) else [leaf]


def _output_of(model: nn.Module, path: str, entry: Attention) -> nn.Module | None:
    for name in entry.outputs:
        base = path.rpartition(".")[0] if name.startswith("^") else path
        module = _below(model, join(base, name.lstrip("^")))
        if is_projection(module):
            return module
    return None


def mlp_linears(model: nn.Module) -> dict[str, Slices | None]:
    """Feed-forward projections by structure: full names, and the slices of those that hold a gate beside its input."""
    name_of = {module: name for name, module in model.named_modules()}
    names: dict[str, Slices | None] = {}
    for owner, path in name_of.items():
        named = SAYS_MLP.search(type(owner).__name__)
        for entry in (*MLP, *NAMED_MLP) if named else MLP:
            found = [_below(owner, n) for n in entry]
            if all((is_projection if named else is_linear)(m) for m in found) and not POSITIONS.search(path):
                names |= {
                    name_of[m]: known_layout(owner, n, features(m)[1])
                    for n, m in zip(entry, found, strict=True)
                    if not is_head(model, name_of[m], m)
                }
                break
    for block in attention_blocks(model):
        joint = {name: layout for name, layout in block.layouts.items() if {"mlp", "gate"} & set(layout or ())}
        out = join(block.owner, "mlp_out_proj")
        out = out if is_linear(_below(model, out)) else block.output
        names |= {**joint, out: None} if joint and out is not None else {}
    return names


def mixer_linears(model: nn.Module) -> list[str]:
    """Full names of the linears of state-space models, short convolutions and linear recurrences."""
    names = []
    for path, owner in model.named_modules():
        if MIXERS.search(type(owner).__name__) and type(owner).__module__.partition(".")[0] == "transformers":
            # Mamba's step sizes are read past the layer on some ways through it.
            read = uses_of_weight(type(owner), "dt_proj")[0]
            names += [
                join(path, n) for n, m in owner.named_children() if is_linear(m) and not (n == "dt_proj" and read)
            ]
    return [name for name in names if refusal(model, name) is None]


def fused_layouts(model: nn.Module) -> dict[str, Slices | None]:
    """The matrices that hold several projections, and how, None where no table knows the owner."""
    found = {name: layout for name, layout in mlp_linears(model).items() if layout is not None}
    for block in attention_blocks(model):
        found |= block.layouts
    return found


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
    """Full names of the linears that play a role (``ROLES``), in the model's order, and of adapted models inside it."""
    return [join(path, n) for path, each in adapted_models(model).items() for n in _role_targets(each, role)]


def _role_targets(model: nn.Module, role: str) -> list[str]:
    if role == "all-linear":
        return [
            n for n, m in named_targets(model).items()
            if is_linear(m) and not is_head(model, n, m) and _instead(model, n) is None
        ]  # fmt: skip
    if role == "mlp":
        chosen = set(mlp_linears(model))
    elif role == "experts":
        stacks = {n for n, m in named_targets(model).items() if isinstance(m, ExpertStack)}
        chosen = stacks | expert_linears(model)
    elif role == "mixer":
        chosen = set(mixer_linears(model))
    elif role in ROLES:
        chosen = set()
        for block in attention_blocks(model):
            chosen.update(block.names)
            if role == "attention" and block.output:
                chosen.add(block.output)
    else:
        raise unknown_choice("role", role, ROLES)
    return [name for name in named_targets(model) if name in chosen]


def _instead(model: nn.Module, name: str) -> str | None:
    path, _, leaf = name.rpartition(".")
    owner = _below(model, path) if path else model
    return None if owner is None else called_instead(owner, leaf)


def refusal(model: nn.Module, name: str) -> str | None:
    """Why a linear cannot be adapted in place, or None: its class, or an owner that reads the weight past the layer."""
    modules = named_targets(model)
    module, (path, _, leaf) = modules[name], name.rpartition(".")
    owner = modules.get(path, model)
    if isinstance(module, ExpertStack):
        return stack_refusal(module)
    if adapted_class(module, split=False) is None and not is_parametrized(module, "weight"):
        known = ", ".join(kind.__name__ for kind in CLASSES)
        return f"it is a {'.'.join(class_name(module))}, not exactly torch.nn.Linear, {known}"
    if recomputed(module) is not None:
        return f"{recomputed(module)}; remove that first"
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse):
        return "it is an embedding with max_norm or sparse gradients, which its factors could not have"
    if _instead(model, name) is not None:
        return (
            f"its owner {'.'.join(class_name(owner))} calls {_instead(model, name)} in its place (fuse_qkv_projections)"
        )
    readers = _torch_readers(modules, path, leaf)
    for called in (module, *[reader for reader, _ in readers]):
        if "forward" in vars(called) and not kept_forwards(called):
            kind = type(called).__name__
            return f"the forward of this {kind} was replaced by {vars(called)['forward']!r}; call inject before that"
    for reader, known in readers:
        if type(reader) is not known and type(reader).__module__ != "fastlora.nn.attention":
            kind = ".".join(class_name(reader))
            return f"its owner {kind}, not exactly torch.nn.{known.__name__}, may read the weight instead of calling it"
    if leaf == "in_proj" and readers and owner.in_proj_weight is None:
        return "its owner has kdim or vdim other than embed_dim, so that q, k and v are not one stacked matrix"
    # timm's BEiT, EVA and SwinV2: the layer is called only where the biases are apart.
    apart = getattr(owner, "q_bias", None) is None or getattr(owner, "qkv_bias_separate", False) or biases_apart(owner)
    if (leaf == "qkv" and not apart) or (not readers and uses_of_weight(type(owner), leaf) == (True, False)):
        return f"its owner {'.'.join(class_name(owner))} reads {leaf}.weight instead of calling {leaf}"
    if module.weight.is_meta and hasattr(module, "_hf_hook"):
        return "accelerate has offloaded its weight; call inject before dispatch_model or cpu_offload"
    return None


def recomputed(module: nn.Module) -> str | None:
    """What computes a linear's weight before each forward (``torch.nn.utils``: weight_norm, prune, ...), or None."""
    if "weight" in module._parameters or isinstance(module, (StackedProjection, InProjection)):
        return None
    parametrized = getattr(getattr(module, "parametrizations", None), "weight", ())
    by = [type(each).__name__.lstrip("_") for each in parametrized]
    by += [type(hook).__name__ for hook in forward_hooks(module)[0].values() if hasattr(type(hook), "compute_weight")
          or hasattr(type(hook), "compute_mask")]  # fmt: skip
    return f"its weight is computed at each forward by {' and '.join(by) or 'something else'}"


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
def uses_of_weight(owner: type, leaf: str) -> tuple[bool, bool]:
    """Whether the methods of an owner read ``self.<leaf>.weight`` other than to set it up, and whether one calls it."""
    sources = []
    for kind in owner.__mro__[: -len(nn.Module.__mro__)]:
        for name, method in vars(kind).items():
            if inspect.isfunction(method) and not re.search("init|reset|tie|load|fuse|merge", name):
                with contextlib.suppress(OSError, TypeError):
                    sources.append(inspect.getsource(method))
    source, name = "\n".join(sources), rf"\bself\.{re.escape(leaf)}"
    reads = re.search(rf"(?<!isinstance\(){name}\.weight\b{ASKS}", source)
    return reads is not None, re.search(rf"{name}\(", source) is not None


def has_suffix(name: str, suffix: str) -> bool:
    """Whether a name ends in a suffix, by whole components."""
    return name == suffix or name.endswith("." + suffix)


def inside(name: str, modules: Collection[str]) -> bool:
    """Whether a name is that of one of these modules, or of something in one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def pattern_matches(pattern: str, name: str) -> bool:
    """Whether a key of ``rank_pattern`` or ``alpha_pattern`` matches: PEFT takes it as an expression for the tail."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", name) is not None
    except re.error:
        return False


# What ``unload`` makes nn.Linear again: torch's own, and those that ``accelerate_frozen`` has changed.
PLAIN_LINEARS = (nn.Linear, NonDynamicallyQuantizableLinear, FrozenLinear)
# Subclasses whose forward is that of ``nn.Linear``.
_EXACT = (("transformers.models.falcon.modeling_falcon", "FalconLinear"),)
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


def is_projection(module: Any) -> bool:
    """Whether a module multiplies every position by one matrix: a linear, or a convolution over channels alone."""
    return is_linear(module) or pointwise_class(module) is not None


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
    if isinstance(module, ExpertStack):
        return ExpertProjection
    if type(module) in PLAIN_LINEARS or class_name(module) in _EXACT:
        return QKVLinear if split else Linear
    return pointwise_class(module) or plain_class(module)


def named_targets(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by name, ``<path>.in_proj`` for the stacked projection of an ``nn.MultiheadAttention``, and
    ``<path>.down_proj`` for such a parameter of experts."""
    found: dict[str, nn.Module] = {}
    for name, module in own_modules(model).items():
        if isinstance(module, ExpertProjection):
            continue  # its path is that of its parameter
        found.setdefault(name, module)
        found |= {join(name, leaf): stack for leaf, stack in expert_stacks(module).items()}
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


def tied_embeddings(model: nn.Module) -> list[str]:
    """The input embedding and the linears without a bias that share its weight, by name; none where nothing does."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        weight = getattr(get() if callable(get) else None, "weight", None)
    except (NotImplementedError, AttributeError):  # transformers' answer of a model that has none
        return [""]
    users = [] if weight is None else users_of_parameters(model).get(id(weight), [])
    followers = [n for n in users if is_linear(model.get_submodule(n)) and model.get_submodule(n).bias is None]
    return [n for n in users if isinstance(model.get_submodule(n), nn.Embedding)][:1] + followers if followers else [""]


def saved_modules(model: nn.Module, adapter: str | None) -> list[str]:
    """Full names of the modules that are trained and saved whole with an adapter (``modules_to_save``)."""
    found: dict[str, None] = {}
    for path, adapted in adapted_models(model).items():
        own = vars(adapted).get("fastlora_configs")
        config = config_of(adapted, adapter) if own is None else own.get(adapter)
        for name in [] if config is None else named_by(adapted, config.modules_to_save or ()):
            found[join(path, name)] = None
    return list(found)


def saved_with_any(model: nn.Module) -> list[str]:
    """Full names of the modules that are trained whole with some adapter, so that forwards of all run through them."""
    names = dict.fromkeys(name for configs in configs_in(model) for name in configs)
    return list(dict.fromkeys(path for name in names for path in saved_modules(model, name)))


def named_by(model: nn.Module, suffixes: Collection[str]) -> list[str]:
    """Full names of the modules that suffixes mean."""
    return [n for n in own_modules(model) if any(has_suffix(n, suffix) for suffix in suffixes)]


def kept_forwards(module: nn.Module) -> list[str]:
    """Attributes of an instance that are its class's forward bound to it."""
    bound = ((name, held) for name, held in vars(module).items() if isinstance(held, MethodType))
    return [name for name, held in bound if held.__self__ is module and held.__func__ is type(module).forward]


def biases_apart(owner: nn.Module) -> bool:
    """Whether an owner adds the biases of its qkv itself, and has a switch that makes it call qkv."""
    return class_name(owner) in _BIAS_APART and hasattr(owner, "qkv_bias_separate")


def refuse_shared(model: nn.Module, saved: Sequence[str], where: str, tying: bool = False) -> None:
    """PEFT copies a module to save: a parameter that others share would be one thing here and two there.

    ``tying``: but not what follows the input embedding by ``ensure_weight_tying``.
    """
    source, *followers = tied_embeddings(model) if tying else [""]
    follow = {f"{n}.weight" for n in followers} if source in saved else ()
    inside = {id(p) for name in saved for p in model.get_submodule(name).parameters()}
    prefixes = tuple(s + "." for s in saved)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in inside and not name.startswith(prefixes) and name not in follow:
            raise ValueError(f"{where}: modules_to_save: a parameter is shared with {name!r}, which PEFT would untie")
