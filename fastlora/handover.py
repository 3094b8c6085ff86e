"""Adapters between this package's models and PEFT's in memory: ``to_peft``, ``from_peft``."""

from __future__ import annotations

import functools
import pathlib
import tempfile
from typing import Any

import torch
from torch import nn

from .choices import unknown
from .ejection import eject, sharing_copy
from .nn.linear import DEFAULT, adapted_layers, check_adapter
from .parallel import shards, unwrapped
from .peft_attention import StoredNames
from .peft_files import read_folder
from .peft_io import save
from .peft_load import load_folder
from .peft_names import PREFIX


def to_peft(model: nn.Module, adapter: str = DEFAULT) -> Any:
    r"""A ``peft.PeftModel`` with one adapter of ``model`` and the same outputs; ``model`` stays as it is.

    .. math:: y = x W^\top + b + s\, x A^\top B^\top,\qquad s = \mathrm{lora\_alpha} / r

    with ``s`` and r of each matrix in ``alpha_pattern`` and ``rank_pattern``. Frozen parameters are shared, not copied:
    merging in one of the two models would change both. Factors and what was trained besides are copies, trainable
    there. PEFT to 0.21 counts ``out_proj`` of ``nn.MultiheadAttention`` twice: its scaling is halved in the returned
    model, and not in what PEFT would save. PEFT has no dropout in ``nn.MultiheadAttention``.

    Raises ``ValueError`` naming the argument for what ``save`` refuses, a merged or sharded model, and an adapter that
    PEFT cannot run; ``ImportError`` without PEFT.
    """
    import peft

    inner = unwrapped(model)
    check_adapter(adapter)
    if shards(inner):
        raise ValueError("model: is sharded by fully_shard; save the adapter, and load it into PEFT in one process")
    merged = [path for path, layer in adapted_layers(inner).items() if layer.merged]
    if merged:
        raise ValueError(f"model: {merged[0]!r} is merged; call fastlora.unmerge first")
    with tempfile.TemporaryDirectory() as folder:
        save(inner, folder, adapter)
        base = eject(sharing_copy(inner))
        modes = [(module, module.training) for module in base.modules()]
        try:
            handed = peft.PeftModel.from_pretrained(base, folder, adapter_name=adapter, is_trainable=True)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ValueError(f"model: PEFT cannot take adapter {adapter!r}: {error}") from error
    handed.train(inner.training)
    for module, training in modes:
        module.training = training
    for attention in _peft_attentions(handed):
        attention.base_layer.out_proj.scaling[adapter] /= _out_proj_counts()
    return handed


def from_peft(peft_model: Any, adapter: str | None = None) -> nn.Module:
    """The base model under a ``peft.PeftModel``, injected, with one of its LoRA adapters and the same outputs.

    ``adapter`` names it, and may be left out where one is active. It becomes ``"default"``, trainable. ``peft_model``
    stays as it is. Frozen parameters are shared, not copied: merging in one of the two models would change both.

    Raises ``ValueError`` naming the argument for a model of another kind, a merged one, several active adapters and
    what is not implemented (DoRA and other variants, by their field); ``ImportError`` without PEFT.
    """
    import peft

    if not isinstance(peft_model, peft.PeftModel):
        raise ValueError(f"peft_model: expected a peft.PeftModel, got {type(peft_model).__name__}")
    adapter = _chosen(peft_model, adapter)
    tuned = [(n, m) for n, m in peft_model.named_modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)]
    merged = [name for name, module in tuned if module.merged]
    if merged:
        raise ValueError(f"peft_model: {merged[0]!r} is merged; call unmerge_adapter() first")
    with tempfile.TemporaryDirectory() as path:
        peft_model.save_pretrained(path, selected_adapters=[adapter], save_embedding_layers=False)
        folder = read_folder(path if adapter == "default" else pathlib.Path(path) / adapter)
    trained = folder.fields.bias != "none"
    own = {id(p) for n, p in peft_model.named_parameters() if (trained and n.endswith("bias")) or _is_peft_s(n)}
    wrapped = sharing_copy(peft_model, own)
    wrapped.set_adapter(adapter)
    for name, parameter in wrapped.named_parameters():
        # An adapter that was loaded for inference is frozen there, with its head.
        if _is_peft_s(name) or (trained and name.endswith("bias")):
            parameter.requires_grad_()
    model = wrapped.base_model.unload()
    load_folder(model, folder)
    _take_scales(model, tuned, adapter)
    return model


def _take_scales(model: nn.Module, tuned: list[tuple[str, Any]], adapter: str) -> None:
    """The ``s`` that PEFT's layers run with, which need not be the one of their config."""
    layers, names = adapted_layers(model), StoredNames(model)
    for name, module in tuned:
        path = names.path(name.removeprefix(PREFIX))
        if path in layers and adapter in module.scaling:
            twice = path != names.stored(path) and path.endswith(".out_proj")
            s = module.scaling[adapter] * (_out_proj_counts() if twice else 1)
            layers[path].rescale(DEFAULT, dict.fromkeys(layers[path].slices, s))


def _chosen(peft_model: Any, adapter: str | None) -> str:
    """The adapter that is meant, a LoRA one."""
    known = sorted(peft_model.peft_config)
    if adapter is None:
        active = list(peft_model.active_adapters)
        if len(active) != 1:
            raise ValueError(f"adapter: {active} are active; say which one of {known}")
        adapter = active[0]
    if not isinstance(adapter, str) or adapter not in known:
        raise unknown("adapter", adapter, known)
    kind = getattr(peft_model.peft_config[adapter].peft_type, "value", None)
    if kind != "LORA":
        raise ValueError(f"peft_model: adapter {adapter!r} is of type {kind}, expected LORA")
    return adapter


def _is_peft_s(name: str) -> bool:
    return any(part in name for part in (".lora_", ".modules_to_save.", ".original_module."))


def _peft_attentions(peft_model: nn.Module) -> list[Any]:
    from peft.tuners.lora.layer import MultiheadAttention

    return [m for m in peft_model.modules() if isinstance(m, MultiheadAttention)]


@functools.cache
def _out_proj_counts() -> int:
    """How often this PEFT adds the update of an attention's out_proj (0.21.2: twice; huggingface/peft#3774)."""
    import peft

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = nn.ModuleDict({"attn": nn.MultiheadAttention(2, 1)})
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=1, lora_alpha=1, target_modules=["attn"]))
        attention = _peft_attentions(wrapped)[0]
        layer = attention.base_layer.out_proj
        for factor in (layer.lora_A, layer.lora_B):
            factor["default"].weight.fill_(1.0)
        before = layer.get_base_layer().weight.clone()
        attention.merge()
        return round(float((layer.get_base_layer().weight - before).mean()))
