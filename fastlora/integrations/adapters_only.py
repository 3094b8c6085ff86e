"""State dicts without the frozen base, through torch's public hooks on one model: whoever saves it saves adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._utils.distributed import whole
from .._utils.errors import check_model, listed
from .._utils.torch_compat import load_hooks
from ..model.saving_check import running
from ..model.trainable import saved_modules
from ..nn.linear import adapted_layers, matrix_key

_AVERAGING = {("timm", "apply_update_"), ("timm", "_update"), ("timm", "set")}


def adapters_only(model: nn.Module) -> AdaptersOnly:
    """Until closed, ``model.state_dict()`` leaves out the frozen base; use with ``with`` or call ``close``.

    What stays: every adapter, ``modules_to_save``, whatever else requires gradients, and buffers, under their usual
    names. ``load_state_dict`` of such a dict, strict or not, also after closing, keeps the base as it is and is
    compared with the model first: ``ValueError`` names differing ranks, targets and trained modules, with the model as
    it was. So the checkpoints of any trainer shrink to what is trained, and load. ``model`` may contain the adapted
    model, and may get its adapters later; full state dicts load as ever.
    """
    return AdaptersOnly(model)


class AdaptersOnly:
    """See :func:`adapters_only`."""

    def __init__(self, model: nn.Module):
        check_model(model)
        if not any(isinstance(getattr(hook, "hook", None), _BeforeLoad) for hook in load_hooks(model)):
            before = _BeforeLoad()
            model.register_load_state_dict_pre_hook(before)
            model.register_load_state_dict_post_hook(_AfterLoad(before))
        self._handle = model.register_state_dict_post_hook(_leave_out_base)

    def __enter__(self) -> AdaptersOnly:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """State dicts are complete again."""
        self._handle.remove()


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without the frozen base; of a sharded model whole tensors, for which every rank calls this."""
    with adapters_only(model):
        return {name: whole(tensor) for name, tensor in model.state_dict().items()}


def refuse_other(model: nn.Module, state: Mapping[str, Tensor], prefix: str = "") -> set[str]:
    """``ValueError`` naming how a state dict with adapters differs from the model's; returns the keys it may lack."""
    layers = adapted_layers(model)
    given = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    if not any(_matrix(key) for key in given):
        return set()
    names = _parameters(model)
    trained = _trained(model)
    partial = not any(f"{path}.weight" in given for path in layers)
    started = {n: b for n, b in model.named_buffers() if _matrix(n)}
    differences = _rank_differences({n: p for n, p in names.items() if _matrix(n)} | started, given)
    differences += [
        f"{n} is another in the checkpoint: the model was initialized from other data, or another seed"
        for n, b in started.items()
        if n in given and b.shape == given[n].shape and not torch.equal(b, given[n].to(b))
    ]
    if partial:
        differences += _other_differences(model, names, trained, given)
    if differences:
        raise ValueError(f"checkpoint: does not fit the model: {listed(differences)}")
    return {prefix + name for name in names if name not in given} if partial else set()


def _leave_out_base(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    if not adapted_layers(module):
        return
    # Whoever shards a model on the meta device fills it from a state dict, of which the base is a part.
    if any(parameter.is_meta for parameter in module.parameters()):
        return
    # timm's averages pair the values of two state dicts by their order; one of them may be complete.
    if _AVERAGING & running():
        return
    trained = _trained(module)
    frozen = [prefix + name for name in _parameters(module) if name not in trained]
    for name in frozen:
        state.pop(name, None)
    # Quantized weights keep their scales under the weight's name.
    parts = tuple(name + "." for name in frozen)
    for key in [key for key in state if key.startswith(parts)]:
        del state[key]


class _BeforeLoad:
    """Compares before anything is copied, and remembers which keys may be missing."""

    def __init__(self):
        self.optional: set[str] = set()

    def __call__(self, module: nn.Module, state: Mapping, prefix: str, *_: Any) -> None:
        self.optional = refuse_other(module, state, prefix)


class _AfterLoad:
    def __init__(self, before: _BeforeLoad):
        self.before = before

    def __call__(self, module: nn.Module, incompatible: Any) -> None:
        incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key not in self.before.optional]


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Under every name, also of tied ones."""
    return dict(model.named_parameters(remove_duplicate=False))


def _trained(model: nn.Module) -> set[str]:
    """Names of the parameters that a checkpoint holds; a schedule may hold some of them frozen for a while."""
    found = {name for name, p in _parameters(model).items() if p.requires_grad or _matrix(name)}
    for path, module in model.named_modules():
        for adapter in module.__dict__.get("fastlora_configs", ()):
            for saved in saved_modules(module, adapter):
                inside = f"{path}.{saved}." if path else f"{saved}."
                found.update(name for name in _parameters(model) if name.startswith(inside))
    return found


def _matrix(name: str) -> tuple[str, str, str] | None:
    """(matrix key, adapter, "A" or "B") of a factor's name."""
    for factor in "AB":
        path, found, rest = name.rpartition(f".lora_{factor}.")
        adapter, dot, part = rest.rpartition(".")
        if found and dot:
            return matrix_key(path, part), adapter, factor
    return None


def _rank_differences(names: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    differences = {}
    for name in [*names, *(key for key in given if _matrix(key) and key not in names)]:
        key, adapter, factor = _matrix(name)
        mine, theirs = (d[name].shape if name in d else None for d in (names, given))
        if mine == theirs:
            continue
        ranks = [0 if shape is None else shape[0 if factor == "A" else 1] for shape in (mine, theirs)]
        text = f"{key} has rank {ranks[0]} in the model and {ranks[1]} in the checkpoint"
        if ranks[0] == ranks[1]:
            text = f"{key} has shape {tuple(mine)} in the model and {tuple(theirs)} in the checkpoint"
        differences.setdefault((key, adapter), text + ("" if adapter == "default" else f" (adapter {adapter!r})"))
    return list(differences.values())


def _other_differences(
    model: nn.Module, names: Mapping[str, nn.Parameter], trained: set[str], given: Mapping[str, Tensor]
) -> list[str]:
    """What is trained besides adapters, in the model or in the checkpoint alone."""
    there = {id(names[key]) for key in given if key in names}
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    found = []
    for name in sorted(trained):
        if not _matrix(name) and id(names[name]) not in there:
            found.append(f"{name} is trained in the model and not in the checkpoint")
    for key, tensor in given.items():
        if _matrix(key) or key in buffers:
            continue
        if key not in names:
            if not key.endswith("_extra_state"):
                found.append(f"{key} is in the checkpoint and not in the model")
        elif key not in trained:
            found.append(f"{key} is trained in the checkpoint and frozen in the model")
        elif names[key].shape != tensor.shape:
            shapes = tuple(names[key].shape), tuple(tensor.shape)
            found.append(f"{key} has shape {shapes[0]} in the model and {shapes[1]} in the checkpoint")
    return found
