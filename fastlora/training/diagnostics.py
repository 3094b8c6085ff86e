"""What each parameter group does in an epoch: gradient norm, update norm, direction of consecutive gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._utils.errors import check_instance
from .._utils.torch_compat import divide_each, norm_of_each, subtract_each


class GroupDiagnostics(NamedTuple):
    """Means over the steps of an epoch in which the group had gradients; NaN without any."""

    gradient_norm: float
    """L2 norm of the group's gradient, as the optimizer saw it (after clipping, without the loss scale)."""
    update_norm: float
    """L2 norm of what one step changed."""
    cosine: float
    """Cosine between the gradients of consecutive steps: near 1 a steady descent, near 0 noise, below it a zigzag."""
    steps: int


class Diagnostics:
    """Watches an optimizer through its step hooks; ``epoch()`` gives the means so far by group and starts afresh.

    Costs two copies of the trained parameters, in fp32 or more, and a few reductions a step, and never waits for the
    device; only ``epoch`` reads back. Steps with a gradient or update that is not finite are left out. Groups go by
    their ``"name"`` (``param_groups``), else by position. Use with ``with``, or ``close``.

    Raises ``TypeError`` for what is no optimizer.

    >>> optimizer = torch.optim.SGD([{"name": "lora", "params": [torch.ones(1, requires_grad=True)]}], lr=0.1)
    >>> with fastlora.training.Diagnostics(optimizer) as diagnostics:
    ...     optimizer.param_groups[0]["params"][0].grad = torch.ones(1)
    ...     optimizer.step()
    ...
    >>> diagnostics.epoch()["lora"].gradient_norm
    1.0
    """

    def __init__(self, optimizer: Optimizer):
        check_instance("optimizer", optimizer, Optimizer, "a torch.optim.Optimizer")
        self._groups = [_Watched() for _ in optimizer.param_groups]
        self._names = _names(optimizer)
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def __enter__(self) -> Diagnostics:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop watching, as the end of ``with`` does; ``epoch`` still gives what was seen.

        >>> diagnostics = fastlora.training.Diagnostics(torch.optim.SGD([torch.ones(1, requires_grad=True)]))
        >>> diagnostics.close()
        """
        for handle in self._handles:
            handle.remove()
        for group in self._groups:
            group.forget()

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        scale = getattr(optimizer, "grad_scale", None)  # set by a GradScaler that leaves unscaling to the optimizer
        for watched, group in zip(self._groups, optimizer.param_groups, strict=False):
            watched.before([p for p in group["params"] if p.grad is not None], scale)

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for watched in self._groups:
            watched.after()

    def epoch(self) -> dict[str, GroupDiagnostics]:
        """Means since the last call by group name, in the optimizer's order.

        Of ``‖g_t‖``, ``‖Δw_t‖`` and ``g_t·g_{t-1} / (‖g_t‖ ‖g_{t-1}‖)``, in the units of gradients and of weights.
        """
        return {name: group.read() for name, group in zip(self._names, self._groups, strict=True)}


def _names(optimizer: Optimizer) -> list[str]:
    names: list[str] = []
    for index, group in enumerate(optimizer.param_groups):
        name = str(group.get("name", index))
        name = f"{name}[{group['adapter']}]" if "adapter" in group else name
        names.append(name if name not in names else f"{name}.{index}")
    return names


class _Watched:
    """Sums of one group, on its device: (gradient norm, steps, update norm, steps, cosine, pairs)."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None
        self.forget()

    def forget(self) -> None:
        self._parameters: list[Tensor] = []
        self._values: list[Tensor] = []
        self._previous: dict[int, Tensor] = {}
        self._previous_norm: Tensor | None = None

    def before(self, parameters: list[Tensor], scale: Tensor | None) -> None:
        self._parameters = parameters
        if not parameters:
            self.forget()
            return
        if self.sums is None:
            self.sums = torch.zeros(6, dtype=torch.float64, device=parameters[0].device)
        gradients = [_wide(p.grad) for p in parameters]
        if scale is not None:
            gradients = divide_each(gradients, scale)
        self._values = [_wide(p).clone() for p in parameters]
        norm = _norm(gradients, self.sums)
        self._add(0, norm, norm.isfinite())
        if self._previous_norm is not None and self._previous.keys() == {id(p) for p in parameters}:
            products = [
                (self._previous[id(p)] * g).sum().to(self.sums) for p, g in zip(parameters, gradients, strict=True)
            ]
            cosine = torch.stack(products).sum() / (norm * self._previous_norm)
            self._add(4, cosine, cosine.isfinite())
        self._previous = {id(p): g.clone() for p, g in zip(parameters, gradients, strict=True)}
        self._previous_norm = norm

    def after(self) -> None:
        if not self._values:
            return
        change = subtract_each([_wide(p) for p in self._parameters], self._values)
        norm = _norm(change, self.sums)
        self._add(2, norm, norm.isfinite())
        self._values = []

    def _add(self, position: int, value: Tensor, keep: Tensor) -> None:
        self.sums[position] += torch.where(keep, value, 0.0)
        self.sums[position + 1] += keep

    def read(self) -> GroupDiagnostics:
        totals = [0.0] * 6 if self.sums is None else self.sums.tolist()
        if self.sums is not None:
            self.sums.zero_()
        means = [
            total / count if count else float("nan") for total, count in zip(totals[::2], totals[1::2], strict=True)
        ]
        return GroupDiagnostics(*means, int(totals[1]))


def _wide(tensor: Tensor) -> Tensor:
    """In fp32 or more: products of small gradients vanish in fp16, and norms are rounded to three digits in bf16."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _norm(tensors: list[Tensor], like: Tensor) -> Tensor:
    norms = norm_of_each(tensors, 2)
    return torch.stack([norm.to(like) for norm in norms]).square().sum().sqrt()
