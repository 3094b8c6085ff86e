"""FW-LoRA's penalty on the adapters of a tracked model: which factors, which weights, value or gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._utils.distributed import is_sharded, like, whole
from .._utils.errors import check_instance, unknown_choice
from .._utils.torch_compat import add_to_each_
from ..nn.active import NO_ADAPTERS, names_of
from ..nn.linear import Adapted, Linear
from ..ops import multi_tensor, penalty
from ..ops.penalty import (
    checked_options,
    importance_weights,
    unchecked_weights,
    weighted_penalty,
    weighted_penalty_grad,
)


class _Terms(NamedTuple):
    """Factors of the matrices that have an adapter, their scales and their positions among all tracked matrices."""

    As: list[Tensor]
    Bs: list[Tensor]
    scales: list[float]
    positions: list[int]
    backends: set[str]  # that their layers ask for

    def formula_because(self, form: str) -> str | None:
        """Why the penalty goes by the formula in PyTorch and not through the native operator, or None."""
        if form != "delta":
            return f"form={form!r} has no products to fuse"
        asked = self.backends & {"reference", "eager"}
        if asked:
            return f"backend {asked.pop()!r} was asked for"
        return multi_tensor.unsupported_reason("penalty_grad_", [*self.As, *self.Bs])


class FisherPenalty:
    """The penalty over the matrices of a tracker; matrices without an adapter have nothing to penalise."""

    def __init__(self, layers: Mapping[str, Linear], matrices: Sequence[tuple[str, str]]):
        self._layers, self._matrices = layers, matrices
        self._kept: tuple[Tensor, str, Tensor] | None = None

    def value(
        self, importance: Tensor | None, frozen: bool, weight: float, form: str, normalize: str, adapter: str
    ) -> Tensor:
        """The penalty as a scalar with a graph; zero while there is no importance."""
        checked_options(weight, form, normalize)
        terms = self._terms(adapter)
        if importance is None or not terms.As:
            return torch.zeros((), dtype=torch.float32, device=next(iter(self._layers.values())).weight.device)
        weights = self._weights(importance, frozen, normalize, terms.positions)
        if terms.formula_because(form) is None:
            return penalty.penalty(terms.As, terms.Bs, terms.scales, weights, weight)
        return weighted_penalty(*map(_whole, (terms.As, terms.Bs)), terms.scales, weights, weight, form)

    @torch.no_grad()
    def add_gradient(
        self, importance: Tensor | None, frozen: bool, weight: float, form: str, normalize: str, adapter: str
    ) -> None:
        """Add the penalty's gradient to ``.grad`` of every trainable factor, in place.

        Raises ``ValueError`` for factors that are computed from other parameters, whose ``.grad`` nobody reads.
        """
        checked_options(weight, form, normalize)
        terms = self._terms(adapter)
        if not all(factor.is_leaf for factor in terms.As + terms.Bs):
            raise ValueError(
                f"adapter: the factors of {adapter!r} are parametrized or pruned and have no gradient of their own; "
                "add tracker.penalty() to the loss instead"
            )
        if importance is None or not terms.As:
            return
        weights = self._weights(importance, frozen, normalize, terms.positions)
        if terms.formula_because(form) is None:
            _add_in_one_launch(terms, weights, weight)
        else:
            _add_by_formula(terms, weights, weight, form)

    def backend(self, adapter: str) -> tuple[str, str]:
        """Who computes the penalty, ``"native"`` or ``"formula"``, and why not the former."""
        terms = self._terms(adapter)
        why = terms.formula_because("delta") if terms.As else "no matrix has a rank"
        return ("native", "") if why is None else ("formula", why)

    @torch.enable_grad()
    def _terms(self, adapter: str) -> _Terms:
        check_instance("adapter", adapter, str, "the name of an adapter")
        terms, known = _Terms([], [], [], [], set()), False
        for position, (path, name) in enumerate(self._matrices):
            layer = self._layers[path]
            if not isinstance(layer, Adapted):
                raise ValueError(NO_ADAPTERS)
            if adapter not in layer.adapter_specs:
                continue
            known = True
            A, B = (factors[adapter].tensors()[name] for factors in (layer.lora_A, layer.lora_B))
            if A is None or B is None:
                continue
            terms.As.append(A)
            terms.Bs.append(B)
            terms.scales.append(layer.adapter_specs[adapter].scale[name])
            terms.positions.append(position)
            terms.backends.add(layer.backend)
        if not known:
            names = names_of(self._layers.values())
            raise unknown_choice("adapter", adapter, names)
        return terms

    def _weights(self, importance: Tensor, frozen: bool, normalize: str, positions: list[int]) -> Tensor:
        # Checking the values reads them back from the device: once, for a frozen importance.
        if not frozen:
            weights = unchecked_weights(importance, normalize)
        elif self._kept is not None and self._kept[0] is importance and self._kept[1] == normalize:
            weights = self._kept[2]
        else:
            weights = importance_weights(importance, normalize)
            self._kept = (importance, normalize, weights)
        if len(positions) == len(weights):
            return weights
        rows = weights.unbind()
        return torch.stack([rows[position] for position in positions])


def _whole(factors: Sequence[Tensor]) -> list[Tensor]:
    """Every rank works out the penalty of whole factors, with the gradient back to its shard."""
    return [whole(factor) for factor in factors]


def _add_in_one_launch(terms: _Terms, weights: Tensor, weight: float) -> None:
    """The native operator adds to the gradients in place; those that are missing start as zeros."""
    targets = []
    for parameter in terms.As + terms.Bs:
        if not parameter.requires_grad:
            targets.append(parameter.new_empty(0))
            continue
        if parameter.grad is None:
            parameter.grad = penalty.empty_grad(parameter)
        targets.append(parameter.grad)
    count = len(terms.As)
    penalty.add_penalty_grad_(targets[:count], targets[count:], terms.As, terms.Bs, terms.scales, weights, weight)


def _add_by_formula(terms: _Terms, weights: Tensor, weight: float, form: str) -> None:
    """The batched products of ``weighted_penalty_grad``, added to the gradients."""
    dAs, dBs = weighted_penalty_grad(*map(_whole, (terms.As, terms.Bs)), terms.scales, weights, weight, form)
    grads, added = [], []
    for parameter, gradient in zip(terms.As + terms.Bs, dAs + dBs, strict=True):
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            # A view of a batch would keep the whole batch alive.
            parameter.grad = like(gradient.clone(), parameter)
        elif is_sharded(parameter):
            parameter.grad += like(gradient, parameter)
        else:
            grads.append(parameter.grad)
            added.append(gradient)
    if grads:
        add_to_each_(grads, added)
