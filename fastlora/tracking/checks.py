"""What a tracker accepts, with refusals that name the argument."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .._utils.errors import checked, positive, unknown_choice
from ..nn.linear import Linear, adapted_layers, check_adapter
from .statistics import COVARIANCES

SCALARS = ("grad_sq", "fisher", "grad_abs", "act_var")
KINDS = (*SCALARS, *COVARIANCES)
PROBE_KINDS = ("rademacher", "columns")
_NOT_IN_OLD_STATES = {"every"}
ABSOLUTE_NEEDS = "it needs probe_kind='columns' or estimator='exact'"


def checked_decay(ema: Any) -> float | None:
    number = isinstance(ema, (int, float)) and not isinstance(ema, bool)
    if ema is not None and not (number and 0.0 <= ema < 1.0):
        raise ValueError(f"ema: expected a number in [0, 1) or None, got {ema!r}")
    return ema


def checked_layers(model: nn.Module, adapter: str) -> dict[str, Linear]:
    check_adapter(adapter)
    every = adapted_layers(model) if isinstance(model, nn.Module) else {}
    if not every:
        raise ValueError("model: has no adapters; call fastlora.inject first")
    layers = {path: layer for path, layer in every.items() if adapter in layer.adapter_specs}
    if not layers:
        known = sorted({name for layer in every.values() for name in layer.adapter_names})
        raise unknown_choice("adapter", adapter, known)
    if any(adapter in layer.probes for layer in layers.values()):
        raise ValueError("model: is tracked already; close the other tracker first")
    return layers


def checked_probe_kind(probe_kind: Any, estimator: str) -> str:
    checked("probe_kind", probe_kind, PROBE_KINDS)
    if estimator != "probe" and probe_kind != "rademacher":
        raise ValueError(f"probe_kind: {probe_kind!r} is for estimator='probe', got estimator={estimator!r}")
    return probe_kind


def checked_kinds(statistics: Sequence[str], estimator: str, probe_kind: str) -> tuple[str, ...]:
    if not isinstance(statistics, (str, Sequence, set, frozenset)):
        raise ValueError(f"statistics: expected some of {KINDS}, got {statistics!r}")
    kinds = (statistics,) if isinstance(statistics, str) else tuple(statistics)
    kinds = tuple(kind for i, kind in enumerate(kinds) if kind not in kinds[:i])
    if not kinds:
        raise ValueError(f"statistics: expected at least one of {KINDS}")
    for kind in kinds:
        checked("statistics", kind, KINDS)
        if estimator == "probe" and kind in COVARIANCES:
            raise ValueError(f"statistics: {kind!r} is not estimated from probes; use estimator='exact'")
    if estimator == "probe" and "grad_abs" in kinds and probe_kind == "rademacher":
        raise ValueError(f"statistics: 'grad_abs' cannot be estimated from ±1 probes; {ABSOLUTE_NEEDS}")
    if estimator == "probe" and {"grad_abs", "fisher"} <= set(kinds):
        raise ValueError("statistics: 'fisher' has signs that 'grad_abs' must not have; use estimator='exact' for both")
    if estimator == "probe" and {"grad_sq", "fisher"} <= set(kinds):
        raise ValueError("statistics: one set of probes gives 'grad_sq' or 'fisher', not both; use estimator='exact'")
    return kinds


def checked_steps(warmup: Any, every: Any, seed: Any) -> None:
    if warmup is not None:
        positive("warmup", warmup, "a positive number of steps or None")
    if every != "auto":
        positive("every", every, "'auto' or a positive number of steps")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ValueError(f"seed: expected an integer, got {seed!r}")


def checked_state(state: Any, like: dict[str, Any]) -> None:
    needed = like.keys() - _NOT_IN_OLD_STATES
    if not isinstance(state, dict) or not needed <= state.keys():
        missing = sorted(needed - state.keys()) if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"state: expected what state_dict() of a tracker gives, with {list(like)}; missing: {missing}")
    for name in ("keys", "probes", "probe_kind"):
        if state[name] != like[name]:
            raise ValueError(f"state: {name} differ: saved {state[name]}, tracked {like[name]}")
    if list(state["values"]) != list(like["values"]):
        raise ValueError(f"state: statistics differ: saved {[*state['values']]}, tracked {[*like['values']]}")


def inverse_scale(scaler: Any, device: torch.device) -> torch.Tensor | None:
    """What a ``GradScaler`` multiplied the loss by, inverted, on the device; None without one."""
    switched_off = hasattr(scaler, "is_enabled") and not scaler.is_enabled()  # it has no scale then
    if scaler is not None and not hasattr(scaler, "_scale") and not switched_off:
        raise ValueError(f"scaler: expected a GradScaler or None, got {type(scaler).__name__}")
    scale = getattr(scaler, "_scale", None)
    return None if scale is None else scale.to(device=device, dtype=torch.float64).reciprocal()


def checked_probes(probes: Any, device: torch.device) -> int:
    if probes == "auto":
        return 8 if device.type == "cuda" else 4
    return positive("probes", probes, "'auto' or a positive integer")


def refuse_windows(model: nn.Module, layers: dict[str, Linear]) -> None:
    modules = dict(model.named_modules())
    for path in layers:
        kind = type(modules[path.rpartition(".")[0]]).__name__
        if "Window" in kind:
            raise ValueError(f"statistics: 'fisher' needs samples in dimension 0; {path!r} sees windows ({kind})")
