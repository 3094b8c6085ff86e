"""What a tracker accepts, with refusals that name the argument."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .._utils.errors import check_choice, check_instance, check_integer, check_number, listed, wrong_type, wrong_value
from .._utils.torch_compat import scale_of
from ..nn.experts import ExpertProjection
from ..nn.linear import Linear, adapted_layers
from .statistics import COVARIANCES

_SHOWN = 8  # names in an error

logger = logging.getLogger(__name__)

SCALARS = ("grad_sq", "fisher", "grad_abs", "act_var")
KINDS = (*SCALARS, *COVARIANCES)
PROBE_KINDS = ("rademacher", "columns")
_NOT_IN_OLD_STATES = {"every"}
ABSOLUTE_NEEDS = "it needs probe_kind='columns' or estimator='exact'"


def checked_decay(ema: Any) -> float | None:
    return None if ema is None else check_number("ema", ema, 0, below=1, accepted="None for a mean, or a number")


def checked_layers(model: nn.Module, adapter: str) -> dict[str, Linear]:
    every = {path: layer for path, layer in adapted_layers(model).items() if adapter in layer.adapter_specs}
    layers = {path: layer for path, layer in every.items() if layer.measured}
    if len(layers) < len(every):
        logger.warning("not tracked, since they are no linears: %s", listed([p for p in every if p not in layers]))
    if not layers:
        raise ValueError(f"model: adapter {adapter!r} has no linear; statistics of other layers are not tracked")
    refuse_tracked(layers, adapter)
    return layers


def refuse_tracked(layers: Mapping[str, Linear], adapter: str) -> None:
    if any(adapter in layer.probes for layer in layers.values()):
        raise ValueError("model: is tracked already; close the other tracker first")


def checked_reopening(model: nn.Module | None, over: bool, layers: Mapping[str, Linear], adapter: str) -> nn.Module:
    """The model of a tracker that is to track again, for a state from before importance was frozen."""
    if over or model is None:
        why = "in a tracker that is closed; track the model anew and load it there"
        raise ValueError(f"state: expected frozen importance {why}, got none")
    refuse_tracked(layers, adapter)
    return model


def checked_probe_kind(probe_kind: Any, estimator: str, layers: Mapping[str, Any]) -> str:
    check_choice("probe_kind", probe_kind, PROBE_KINDS)
    if estimator != "probe" and probe_kind != "rademacher":
        raise wrong_value("probe_kind", f"'rademacher' with estimator={estimator!r}", probe_kind)
    for path, layer in layers.items() if probe_kind == "columns" else ():
        if isinstance(layer, ExpertProjection):
            why = f"{path!r} holds {listed([*layer.slices])} by rows of x"
            raise ValueError(f"probe_kind: expected 'rademacher' or estimator='exact' where {why}, got 'columns'")
    return probe_kind


def checked_kinds(
    statistics: Sequence[str], estimator: str, probe_kind: str, layers: dict[str, Linear]
) -> tuple[str, ...]:
    check_instance("statistics", statistics, (str, Sequence, set, frozenset), f"some of {KINDS}")
    kinds = (statistics,) if isinstance(statistics, str) else tuple(statistics)
    kinds = tuple(kind for i, kind in enumerate(kinds) if kind not in kinds[:i])
    if not kinds:
        raise wrong_value("statistics", f"at least one of {KINDS}", statistics)
    for kind in kinds:
        check_choice("statistics", kind, KINDS)
        if estimator == "probe" and kind in COVARIANCES:
            raise ValueError(f"statistics: {kind!r} is not estimated from probes; use estimator='exact'")
    experts = next((path for path, layer in layers.items() if layer.parts > 1), None)
    if experts is not None and {*kinds} & {*COVARIANCES}:
        what = f"statistics of weights or outputs, since {experts!r} has another covariance for each expert"
        raise wrong_value("statistics", what, kinds)
    if estimator == "probe" and "grad_abs" in kinds and probe_kind == "rademacher":
        raise ValueError(f"statistics: 'grad_abs' cannot be estimated from ±1 probes; {ABSOLUTE_NEEDS}")
    if estimator == "probe" and {"grad_abs", "fisher"} <= set(kinds):
        raise ValueError("statistics: 'fisher' has signs that 'grad_abs' must not have; use estimator='exact' for both")
    if estimator == "probe" and {"grad_sq", "fisher"} <= set(kinds):
        raise ValueError("statistics: one set of probes gives 'grad_sq' or 'fisher', not both; use estimator='exact'")
    return kinds


def checked_steps(warmup: Any, every: Any, seed: Any, kinds: Sequence[str]) -> None:
    if warmup is not None:
        check_integer("warmup", warmup, 1, "None, or a number of steps")
        if not {"grad_sq", "fisher"} & {*kinds}:
            raise wrong_value("warmup", "None without 'grad_sq' or 'fisher' among the statistics", warmup)
    if not _is_auto("every", every):
        check_integer("every", every, 1, "'auto', or a number of steps")
    check_integer("seed", seed)


def checked_state(state: Any, like: dict[str, Any]) -> None:
    check_instance("state", state, dict, "what state_dict() of a tracker gives")
    missing = sorted(like.keys() - _NOT_IN_OLD_STATES - state.keys())
    if missing:
        raise ValueError(f"state: expected what state_dict() of a tracker gives, got one without {missing}")
    for name in ("keys", "probes", "probe_kind"):
        if state[name] != like[name]:
            raise ValueError(f"state: expected the {name} {like[name]}, got {state[name]}")
    if list(state["values"]) != list(like["values"]):
        raise ValueError(f"state: expected the statistics {[*like['values']]}, got {[*state['values']]}")


def inverse_scale(scaler: Any, device: torch.device) -> torch.Tensor | None:
    """What a ``GradScaler`` multiplied the loss by, inverted, on the device; None without one."""
    switched_off = hasattr(scaler, "is_enabled") and not scaler.is_enabled()  # it has no scale then
    if scaler is not None and not hasattr(scaler, "get_scale") and not switched_off:
        raise wrong_type("scaler", "a GradScaler or None", scaler)
    scale = None if scaler is None or switched_off else scale_of(scaler)
    return None if scale is None else scale.to(device=device, dtype=torch.float64).reciprocal()


def checked_probes(probes: Any, device: torch.device) -> int:
    if _is_auto("probes", probes):
        return 8 if device.type == "cuda" else 4
    return check_integer("probes", probes, 1, "'auto', or an integer")


def _is_auto(argument: str, value: Any) -> bool:
    if isinstance(value, str) and value != "auto":
        raise wrong_value(argument, "'auto', or an integer >= 1", value)
    return isinstance(value, str)


def refuse_windows(model: nn.Module, layers: dict[str, Linear]) -> None:
    modules = dict(model.named_modules())
    for path in layers:
        parts = path.split(".")
        for depth, leaf in enumerate(parts):
            kind = type(modules[".".join(parts[:depth])]).__name__
            if "Window" in kind or ("Partition" in kind and leaf == "attn"):
                raise ValueError(f"statistics: 'fisher' needs samples in dimension 0; {path!r} sees windows ({kind})")


def refuse_missing(kind: str, absent: Sequence[str], others: int) -> None:
    """``RuntimeError`` says which matrices have no statistic, and what to do."""
    text = f"no {kind} yet for {listed(absent, _SHOWN)}: run backward and tracker.step()"
    raise RuntimeError(f"{text}, or take the scores of the other {others} with missing='skip'" if others else text)
