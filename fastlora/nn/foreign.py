"""Linears whose base is another library's, quantised: it runs through its own forward and backward."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from ..engines import NONE
from ..kept_rows import rows_that_count, with_moments
from ..probes import here
from ..routing import Route
from .linear import Linear, forward_together
from .requantising import OwnForward, has_derivative
from .views import LayerView, PartOfProbe

_BITSANDBYTES = ("Linear4bit", "LinearNF4", "LinearFP4", "Linear8bitLt")


class ForeignLinear(Linear):
    r"""A linear with a quantised weight (torchao's tensors in an ``nn.Linear``) and a low-rank update.

    .. math:: y = \mathrm{base}(x) + s\, \mathrm{dropout}(x) A^\top B^\top

    ``base`` and its share of dx are the other library's; adapters and statistics need x, y and dy alone. Made by
    ``inject`` by a change of class; ``Linear4bit`` and its kin in this module are those of bitsandbytes.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and not self.called:
            self.called = True
        route = self.router.route(self.training)
        y = self.base_forward(x) if has_derivative(self) else OwnForward.apply(x, self)
        if self.bypassed(route):
            return y
        device = x.device.type
        seen = x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
        (update,) = forward_together([_Update(self, seen)], seen, route)
        # Compiled code of torch 2.11 takes the update for a view; it needs no help to save memory.
        in_place = update.dtype == y.dtype and not torch.compiler.is_compiling()
        y = update.add_(y) if in_place else y + update.to(y.dtype)
        return self._with_moments(y, x, route)

    def base_forward(self, x: Tensor) -> Tensor:
        """The other library's own."""
        return super(Linear, self).forward(x)

    def _with_moments(self, y: Tensor, x: Tensor, route: Route) -> Tensor:
        """``y``, whose column sums reach the moment leaves of tracked adapters in the backward."""
        names = (route.adapter,) if route.batch is None else route.batch.names
        for name in names if torch.is_grad_enabled() else ():
            probe = self.probes.get(name)
            there = route.batch is None or name in here(route.batch)
            if probe is not None and probe.V is not None and probe.live and there:
                y = with_moments(y, probe.V, rows_that_count(x, route, name), update_backend(self))
        return y

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, device=self.weight.device)


class _Update(LayerView):
    """A foreign layer as the operator is to see it: a weight that nobody multiplies by, and no moments of y."""

    engine = NONE

    def __init__(self, layer: ForeignLinear, x: Tensor):
        shape = (layer.out_features, layer.in_features)
        super().__init__(layer, torch.zeros((), dtype=x.dtype, device=x.device).expand(shape), None)
        self.backend = update_backend(layer)
        self.probes = {name: _WithoutMoments(probe) for name, probe in layer.probes.items()}


class _WithoutMoments(PartOfProbe):
    """A layer's statistics but for the moments of y, of which the update is only a part."""

    def __init__(self, probe: Any):
        self.probe, self.width, self.taken, self.Z, self.V = probe, probe.width, probe.taken, probe.Z, None


def update_backend(layer: ForeignLinear) -> str:
    """Off the CPU only torch's operators leave the base's matmul to others."""
    return "reference" if layer.backend == "auto" and layer.weight.device.type != "cpu" else layer.backend


def compute_dtype(layer: ForeignLinear) -> torch.dtype:
    """The dtype of activations that a base says it is for."""
    if layer.weight.is_floating_point():
        return layer.weight.dtype
    said = getattr(layer, "compute_dtype", None)
    return said or (torch.float32 if layer.bias is None else layer.bias.dtype)


def foreign_base(module: nn.Module) -> str | None:
    """Whose linear a module is, ``"bitsandbytes Linear4bit"`` or ``"torchao Int8Tensor"``, or None."""
    for kind in type(module).__mro__:
        if kind.__module__.partition(".")[0] == "bitsandbytes":
            return f"bitsandbytes {kind.__name__}"
    weight = type(getattr(module, "_parameters", {}).get("weight"))
    return f"torchao {weight.__name__}" if weight.__module__.partition(".")[0] == "torchao" else None


def check_weight(name: str, layer: nn.Module, backend: str) -> None:
    """Refuse a weight that cannot be multiplied by: ours take floats, those of others are quantised."""
    foreign = foreign_base(layer)
    if foreign is None and not layer.weight.is_floating_point():
        raise ValueError(f"target_modules: {name!r} has a {layer.weight.dtype} weight, expected a floating dtype")
    if foreign is not None and backend == "triton":
        raise ValueError(f"backend: 'triton' multiplies by the weight itself, and that of {name!r} is quantised")


def foreign_class(module: nn.Module) -> type[ForeignLinear] | None:
    """The class that a quantised linear becomes, or None where its kind is not known."""
    kind = type(module)
    if kind.__module__.partition(".")[0] == "bitsandbytes":
        return globals().get(kind.__name__) or __getattr__(kind.__name__) if kind.__name__ in _BITSANDBYTES else None
    return ForeignLinear if kind is nn.Linear else None


def original_class(layer: ForeignLinear) -> type[nn.Linear]:
    """The class that a layer had before it was adapted."""
    kind = type(layer)
    return nn.Linear if kind is ForeignLinear else kind.__mro__[kind.__mro__.index(Linear) + 1]


def __getattr__(name: str) -> Any:
    # Pickle finds the classes by name; making them imports bitsandbytes.
    if name not in _BITSANDBYTES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base = getattr(importlib.import_module("bitsandbytes.nn"), name)
    text = f"bitsandbytes' ``{name}`` with a low-rank update; see ``ForeignLinear``."
    globals()[name] = type(name, (ForeignLinear, base), {"__module__": __name__, "__doc__": text})
    return globals()[name]
