"""Learning rates over a run: adapters held still at first, and a cosine that ends at a floor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .._utils.errors import check_choice, check_instance, check_integer, check_number, wrong_value
from .._utils.torch_compat import set_requires_grad

_PART_OF = {"lora_B": "lora"}  # LoRA+ makes two groups of one


class _Factor:
    """Multiplier of one group's base rate after ``step`` optimizer steps; an object, so that a state dict holds it."""

    def __init__(self, steps: int, floor: float, warmup: int, zero_until: int):
        self.steps, self.floor, self.warmup, self.zero_until = steps, floor, warmup, zero_until

    def __call__(self, step: int) -> float:
        if step < self.zero_until:
            return 0.0
        if step < self.warmup:
            return self.floor + (1.0 - self.floor) * (step + 1) / (self.warmup + 1)
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.floor + (1.0 - self.floor) * 0.5 * (1.0 + math.cos(math.pi * done))


class Cosine(LambdaLR):
    r"""Cosine from each group's rate to a floor, and groups that are frozen for the first optimizer steps.

    .. math:: \eta_t = \eta_{\min} + (\eta_0 - \eta_{\min})\, \tfrac12 (1 + \cos \pi t / T)

    A ``LambdaLR``: call ``step()`` after each ``optimizer.step()``; it may stand in a ``SequentialLR``. After T =
    ``steps`` the rate stays at ``floor``, which is never 0. ``warmup`` steps rise linearly first; they count in T.

    ``freeze``: optimizer steps during which the groups named so do not learn, a number for ``"lora"`` or a mapping of
    group names (see ``param_groups``), where ``"lora"`` is LoRA+'s ``"lora_B"``, too, unless that is named. Their clock
    runs on, so that all groups end together. ``freeze_by``: ``"requires_grad"`` switches the parameters' gradients off,
    which costs nothing and leaves the optimizer's moments empty; ``"lr"`` sets the rate to 0 while moments fill, for
    DDP and compiled steps, which want a fixed graph.

    ``state_dict`` and ``load_state_dict`` resume, frozen groups included. Raises ``TypeError`` or ``ValueError`` naming
    the argument.

    >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    >>> schedule = fastlora.training.Cosine(optimizer, steps=10)
    >>> optimizer.param_groups[0]["lr"]
    1.0
    """

    def __init__(
        self,
        optimizer: Optimizer,
        steps: int,
        *,
        floor: float = 1e-5,
        warmup: int = 0,
        freeze: int | Mapping[str, int] = 0,
        freeze_by: str = "requires_grad",
        last_epoch: int = -1,
    ):
        check_instance("optimizer", optimizer, Optimizer, "a torch.optim.Optimizer")
        self.steps, self.warmup = check_integer("steps", steps, 1), check_integer("warmup", warmup, 0)
        if warmup >= steps:
            raise wrong_value("warmup", f"less than steps = {steps}", warmup)
        self.freeze_by = check_choice("freeze_by", freeze_by, ("requires_grad", "lr"))
        self.floor = _checked_floor(optimizer, floor)
        self.freeze = _checked_freeze(optimizer, freeze, steps)
        super().__init__(optimizer, [self._factor(group) for group in optimizer.param_groups], last_epoch)

    def _factor(self, group: dict[str, Any]) -> _Factor:
        base = float(group.get("initial_lr", group["lr"]))
        frozen = _held_for(self.freeze, group.get("name")) if self.freeze_by == "lr" else 0
        return _Factor(self.steps, self.floor / base, self.warmup, frozen)

    def step(self, epoch: int | None = None) -> None:
        super().step(epoch)
        self._hold()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._hold()

    def _hold(self) -> None:
        """Gradients of the frozen groups off, those of groups whose time has come on."""
        if self.freeze_by != "requires_grad":
            return
        for group in self.optimizer.param_groups:
            until = _held_for(self.freeze, group.get("name"))
            if not until:
                continue
            set_requires_grad(group["params"], self.last_epoch >= until)
            if self.last_epoch < until:
                for parameter in group["params"]:
                    # A gradient that is left over would still be stepped.
                    parameter.grad = None


def _held_for(freeze: Mapping[str, int], name: Any) -> int:
    """Steps for which the group of a name does not learn."""
    return freeze.get(name, freeze.get(_PART_OF.get(name, name), 0))


def _checked_floor(optimizer: Optimizer, floor: Any) -> float:
    check_number("floor", floor, above=0, accepted="a learning rate")
    for index, group in enumerate(optimizer.param_groups):
        rate = float(group.get("initial_lr", group["lr"]))
        if rate < floor:
            name = group.get("name", index)
            raise wrong_value("floor", f"at most the learning rate {rate} of group {name!r}", floor)
    return float(floor)


def _checked_freeze(optimizer: Optimizer, freeze: Any, steps: int) -> dict[str, int]:
    names = [group.get("name") for group in optimizer.param_groups]
    wanted = dict(freeze) if isinstance(freeze, Mapping) else {"lora": check_integer("freeze", freeze, 0)}
    known = {*names, *(_PART_OF.get(name, name) for name in names)}
    for name, count in wanted.items():
        if check_integer(f"freeze[{name!r}]", count, 0) and name not in known:
            raise wrong_value("freeze", f"names of parameter groups, {names}", name, "; see fastlora.param_groups")
        if count >= steps:
            raise wrong_value("freeze", f"less than the {steps} steps, so that {name!r} learns", count)
    if any(wanted.values()) and all(_held_for(wanted, name) for name in names):
        raise ValueError(f"freeze: expected a group that learns meanwhile, got all of {names}")
    return wanted
