"""``trainable_token_indices``: which rows of which layers, what shares their weight, and where they cannot be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .._utils.errors import suggestion, wrong_value
from .._utils.torch_compat import remove_forward_hooks
from ..config import LoraConfig
from ..nn.active import own_modules
from ..nn.adapter import adapter_dtype_of
from ..nn.frozen import FrozenLinear
from ..nn.linear import Adapted
from ..nn.plain import is_scaled
from ..nn.routing import Router
from ..nn.token_rows import LEAF, TokenRows, token_rows
from .freezing import freeze
from .modules import class_name, is_linear, kept_forwards, recomputed, users_of_parameters, uses_of_weight

_FIELD = "trainable_token_indices"


@dataclass
class _Rows:
    path: str
    head: str | None  # the output layer that shares the weight
    indices: tuple[int, ...]
    values: Tensor


def find_rows(model: nn.Module, wanted: Any) -> dict[str, tuple[int, ...]]:
    """Rows by the layer's full name: a list is of the input embedding, keys of a mapping are ends of names.

    As in PEFT, an output layer that shares the embedding's weight follows it, also where it is named with its rows.
    """
    if not isinstance(wanted, Mapping):
        wanted = {} if wanted is None else {_input_embedding(model): wanted}
    modules = own_modules(model)
    found: dict[str, tuple[int, ...]] = {}
    for key, indices in wanted.items():
        hits = [name for name in modules if name.endswith(key)]  # PEFT does not stop at dots
        if not hits:
            known = [n for n, m in modules.items() if isinstance(m, (nn.Embedding, nn.Linear))]
            accepted = f"names of embeddings and linears of {type(model).__name__}"
            raise wrong_value(_FIELD, accepted, key, suggestion(key, known))
        for name in hits:
            if name in found:
                raise wrong_value(_FIELD, f"one list for {name!r}", list(wanted))
            found[name] = tuple(indices)
    source = _input_embedding(model)
    if source in found:
        weight = model.get_submodule(source).weight
        follow = [n for n in found if n != source and getattr(model.get_submodule(n), "weight", None) is weight]
        found = {n: rows for n, rows in found.items() if n not in follow or rows != found[source]}
    return found


def _input_embedding(model: nn.Module) -> str:
    """The name of the input embedding; as in PEFT ``embed_tokens`` where the model does not say."""
    embedding = _asked(model, "get_input_embeddings")
    return next((n for n, m in model.named_modules() if m is embedding), "embed_tokens")


def _asked(model: nn.Module, getter: str) -> Any:
    get = getattr(model, getter, None)
    try:
        return get() if callable(get) else None
    except (NotImplementedError, AttributeError):  # transformers' answer of a model that has none
        return None


def plan_rows(model: nn.Module, config: LoraConfig, targets: Collection[str], saved: Sequence[str]) -> list[_Rows]:
    """New rows before the model changes: whatever can fail fails here, with ``ValueError``."""
    found = find_rows(model, config.trainable_token_indices)
    users = users_of_parameters(model) if found else {}
    names = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False)) if found else Counter()
    plan = []
    for path, indices in found.items():
        module = model.get_submodule(path)
        reason, head = _refusal(model, path, module), None
        if reason is None:
            head, reason = _head(model, path, module, [n for n in users[id(module.weight)] if n != path])
        also = next(
            (n for n in (path, head) if n in targets or isinstance(model.get_submodule(n or path), Adapted)), None
        )
        if reason is None and names[id(module)] > 1:
            reason = "it has several names"
        elif reason is None and any(n != path and n.endswith(path) for n in own_modules(model)):
            reason = "the name of another module ends like its own, and PEFT could not tell them apart"
        elif reason is None and also is not None:
            reason = f"{also!r} is also a target; exclude_modules leaves it out"
        elif reason is None and any(path == name or path.startswith(name + ".") for name in saved):
            reason = "it is in modules_to_save, too; all of its rows are trained, or some"
        if reason is not None:
            raise ValueError(f"{_FIELD}: rows of {path!r} cannot be trained alone: {reason}")
        outside = [i for i in indices if i >= len(module.weight)]
        if outside:
            raise wrong_value(_FIELD, f"rows of {path!r} below {len(module.weight)}", outside)
        values = module.weight.detach()[list(indices)].clone().to(adapter_dtype_of(config, module))
        plan.append(_Rows(path, head, indices, values))
    return plan


def _refusal(model: nn.Module, path: str, module: nn.Module) -> str | None:
    """Why rows of a module cannot be replaced, or None."""
    kind = type(module)
    known = isinstance(module, nn.Embedding) and (
        kind.forward is nn.Embedding.forward or is_scaled(module) or isinstance(module, Adapted)
    )
    if not known and not (is_linear(module) and kind.forward in (nn.Linear.forward, FrozenLinear.forward)):
        return f"it is a {'.'.join(class_name(module))}, no torch.nn.Embedding or Linear"
    if recomputed(module) is not None:
        return f"{recomputed(module)}; remove that first"
    if not module.weight.is_floating_point() or module.weight.dtype.itemsize == 1:
        return f"its weight is in {module.weight.dtype}"
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse):
        return "it is an embedding with max_norm or sparse gradients, which its rows could not have"
    if "forward" in vars(module) and not kept_forwards(module):
        return f"its forward was replaced by {vars(module)['forward']!r}"
    owner, _, leaf = path.rpartition(".")
    owner = model.get_submodule(owner)
    if uses_of_weight(type(owner), leaf)[0]:
        return f"its owner {'.'.join(class_name(owner))} reads {leaf}.weight, where they would be missing"
    return None


def _head(model: nn.Module, path: str, module: nn.Module, sharing: Sequence[str]) -> tuple[str | None, str | None]:
    """The output layer that has the same weight and follows as in PEFT, or why the weight cannot be shared so."""
    if isinstance(module, nn.Linear):
        if sharing:
            return None, f"it has the weight of {sharing[0]!r}, whose rows it follows; name that one alone"
        return None, "it has a bias, which PEFT leaves out then" if module.bias is not None else None
    tied = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    tied = tied and _asked(model, "get_input_embeddings") is module
    output = _asked(model, "get_output_embeddings") if tied else None
    if not sharing and (output is None or output is module):
        return None, None
    if not sharing:
        return None, (
            "it and the output embeddings have weights of their own although tie_word_embeddings is set, and PEFT "
            "would give them one; call model.tie_weights(), or set it to False"
        )
    head, (owner, _, leaf) = model.get_submodule(sharing[0]), sharing[0].rpartition(".")
    if output is not head or len(sharing) > 1 or not isinstance(head, nn.Linear):
        return None, (
            f"it shares its weight with {sharing[0]!r}, which would keep the old rows; only the output embeddings of a "
            "model with tie_word_embeddings follow"
        )
    if head.bias is not None:
        return None, f"{sharing[0]!r} shares its weight and has a bias, which PEFT leaves out then"
    if uses_of_weight(type(model.get_submodule(owner)), leaf)[0]:
        return None, f"the owner of {sharing[0]!r} reads its weight, where the rows would be missing"
    return sharing[0], None


def commit_rows(model: nn.Module, plan: Sequence[_Rows], router: Router, adapter: str) -> None:
    """Put planned rows in place."""
    for planned in plan:
        module = model.get_submodule(planned.path)
        freeze(module, [module.weight])
        if LEAF not in module._modules:
            rows = TokenRows(router, is_scaled(module))
            module.add_module(LEAF, rows)
            hook = rows.look_up if isinstance(module, nn.Embedding) else rows.project
            module.register_forward_hook(hook, with_kwargs=True)
            if planned.head is not None:
                model.get_submodule(planned.head).register_forward_hook(rows.project, with_kwargs=True)
        module._modules[LEAF].install(adapter, planned.indices, planned.values)


def forget_rows(model: nn.Module, adapter: str) -> None:
    """Take away the rows of an adapter; with the last ones of a layer go its child and the hooks."""
    found = token_rows(model, adapter)
    for path, rows in found.items():
        rows.uninstall(adapter)
        if not rows.indices:
            del model.get_submodule(path)._modules[LEAF]
    empty = {id(rows) for rows in found.values() if not rows.indices}
    for module in model.modules() if empty else ():
        remove_forward_hooks(module, lambda hook: id(getattr(hook, "__self__", None)) in empty)


def refuse_rows_of(model: nn.Module, targets: Collection[str]) -> None:
    """``ValueError`` for targets that have trained rows, of whichever adapter, or share the weight of such."""
    for name, module in model.named_modules():
        owners = [getattr(hook, "__self__", None) for hook in module._forward_hooks.values()]
        if name in targets and any(isinstance(owner, TokenRows) for owner in owners):
            raise ValueError(f"target_modules: {name!r} cannot be adapted: it has trained rows of another adapter")
