"""What PEFT loads from files, or made them of, and runs otherwise than here, or not at all."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from .._utils.errors import listed
from ..model.modules import biases_apart
from ..nn.plain import CONVOLUTIONS, pads
from .matrices import Matrix

logger = logging.getLogger(__name__)

_SHOWN = 8
_EXPERTS = ("gate_up_proj", "down_proj")  # stacked over the experts, [E, ...], in transformers 5
_RENAMED = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")  # what PEFT takes for them, wherever it stands


# Types whose shared experts have another name in checkpoints, by which PEFT looks for their factors in vain.
_RENAMED_SHARED = ("laguna", "mistral_large4", "mistral_large4_text")

# Types of models in which PEFT refuses targets of these names, whatever they are: Mamba's fused paths read the weights.
_MAMBAS = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
_NOT_IN_MAMBAS = ("conv1d", "out_proj")


def warn_of_peft(model: nn.Module, paths: Collection[str]) -> None:
    """Name the adapted matrices that PEFT would load and not run as they run here, with the reason."""
    reasons: dict[str, list[str]] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    stacked = _renames_experts(model) and any(map(_is_stack_of_experts, modules.values()))
    kind = getattr(getattr(model, "config", None), "model_type", None)
    for path in paths:
        reason = _reason(modules, path, stacked)
        if kind in _MAMBAS and path.rpartition(".")[2] in _NOT_IN_MAMBAS:
            reason = f"PEFT refuses targets of this name in {kind}; leave it out, or serve with fastlora"
        if kind in _RENAMED_SHARED and ".shared_experts." in path:
            reason = f"with transformers 5 PEFT does not find the factors of shared experts in files of {kind}"
        if reason:
            reasons.setdefault(reason, []).append(path)
    for reason, named in reasons.items():
        logger.warning("PEFT does not run the adapters of %s as here: %s", listed(named, _SHOWN), reason)


def warn_of_convolutions(where: Any, model: nn.Module, matrices: Mapping[str, Matrix]) -> None:
    """Name the convolutions of which a foreign adapter, just loaded, gives other outputs here than in PEFT."""
    modules = dict(model.named_modules())
    named = [
        path
        for path, matrix in matrices.items()
        if _beyond_peft(modules.get(path)) and any(bool(pair[1].any()) for pair in matrix.factors.values())
    ]
    if named:
        logger.warning(
            "%s: PEFT to 0.21 leaves padding_mode and dilation of a convolution out of A until it merges; here A has "
            "both, so that outputs are those of the merged model, and others than in such a training: %s",
            where,
            listed(named, _SHOWN),
        )


def _beyond_peft(module: nn.Module | None) -> bool:
    """Whether a module is a convolution whose padding mode or dilation matters."""
    if not isinstance(module, CONVOLUTIONS):
        return False
    dilated = any(d > 1 and k > 1 for d, k in zip(module.dilation, module.kernel_size, strict=True))
    return dilated or (module.padding_mode != "zeros" and any(pads(module)))


def _renames_experts(model: nn.Module) -> bool:
    """Whether PEFT converts targets of this type of model, by transformers' table where it still has one."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind is None:
        return False
    try:
        from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN as table
    except ImportError:
        return True
    return table.get(kind) in ("mixtral", "qwen2_moe")


def _is_stack_of_experts(module: nn.Module) -> bool:
    return all((p := module._parameters.get(name)) is not None and p.dim() == 3 for name in _EXPERTS)


def _reason(modules: dict[str, nn.Module], path: str, stacked: bool) -> str | None:
    owner, _, leaf = path.rpartition(".")
    if _beyond_peft(modules.get(path)):
        return "PEFT to 0.21 leaves padding_mode and dilation of a convolution out of A until it merges"
    if biases_apart(modules[owner]) and leaf == "qkv" and modules[owner].q_bias is not None:
        return "their owner reads qkv.weight unless its qkv_bias_separate is True; set that in the base given to PEFT"
    above = owner.rpartition(".")[0] if isinstance(modules[owner], nn.MultiheadAttention) else owner
    if isinstance(modules.get(above), nn.TransformerEncoderLayer):
        return (
            "the fast path of nn.TransformerEncoderLayer passes them by in evaluation without gradients; "
            "call torch.backends.mha.set_fastpath_enabled(False) where PEFT runs"
        )
    if stacked and leaf in _RENAMED:
        return (
            "with transformers 5 PEFT takes a target of this name for the stacked weights of the experts, "
            "so that these are without effect"
        )
    if leaf == "out_proj" and above != owner:
        return "PEFT to 0.21 adds this update twice when it loads files; to_peft corrects that"
    return None
