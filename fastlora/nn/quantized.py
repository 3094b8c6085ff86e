"""Quantized bases of torchao and bitsandbytes; dequantize, requantize."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.matmul import NONE
from ..ops.probe_ops import with_moments
from .layer_view import LayerView, PartOfProbe
from .linear import Adapted, Linear, forward_together, forward_traced
from .probe import token_mask_rows, tracked_adapters
from .routing import Route, Routed

_BITSANDBYTES = ("Linear4bit", "LinearNF4", "LinearFP4", "Linear8bitLt")


class QuantizedLinear(Linear):
    r"""A linear with a quantized weight (torchao's tensors in an ``nn.Linear``) and a low-rank update.

    .. math:: y = \mathrm{base}(x) + s\, \mathrm{dropout}(x) A^\top B^\top

    ``base`` and its share of dx are the other library's; adapters and statistics need x, y and dy alone. Made by
    ``inject`` by a change of class; ``Linear4bit`` and its kin in this module are those of bitsandbytes.
    """

    def forward(self, input: Tensor) -> Tensor:
        """As ``Linear.forward``."""
        route = self.entered()
        y = self.base_forward(input) if has_derivative(self) else ForwardOnlyBase.apply(input, self)
        return y if self.bypassed(route) else add_update(self, input, y, route)

    def base_forward(self, x: Tensor) -> Tensor:
        """The other library's own."""
        return super(Linear, self).forward(x)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.weight.device)


def add_update(layer: Adapted, x: Tensor, y: Tensor, route: Route) -> Tensor:
    """``y + s dropout(x) A^T B^T`` of a base's own y [*, N]; column sums reach moment leaves in the backward."""
    device, compiling = x.device.type, torch.compiler.is_compiling()
    seen = x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
    view = _Update(layer, seen)
    update = forward_traced(view, seen, route) if compiling else forward_together((view,), seen, route)[0]
    # Compiled code of torch 2.11 takes the update for a view; it needs no help to save memory.
    in_place = update.dtype == y.dtype and y.is_contiguous() and not compiling
    y = update.add_(y) if in_place else y + update.to(y.dtype)
    for name in route.names if torch.is_grad_enabled() else ():
        probe = layer.probes.get(name)
        there = route.batch is None or name in tracked_adapters(route.batch)
        if probe is not None and probe.V is not None and probe.live and there:
            y = with_moments(y, probe.V, token_mask_rows(x, route, name), update_backend(layer))
    return y


class _Update(LayerView):
    """A layer as the operator is to see it: a weight that nobody multiplies by, and no moments of y."""

    engine = NONE

    def __init__(self, layer: Adapted, x: Tensor):
        shape = (layer.out_features, layer.in_features)
        super().__init__(layer, torch.zeros((), dtype=x.dtype, device=x.device).expand(shape), None)
        self.backend = update_backend(layer)
        self.probes = {name: _WithoutMoments(probe) for name, probe in layer.probes.items()}


class _WithoutMoments(PartOfProbe):
    """A layer's statistics but for the moments of y, of which the update is only a part."""

    def __init__(self, probe: Any):
        self.probe, self.width, self.taken, self.Z, self.V = probe, probe.width, probe.taken, probe.Z, None

    def follow(self, weight: Tensor) -> None:
        self.probe.follow(weight)


def update_backend(layer: Adapted) -> str:
    """Off the CPU only torch's operators leave the base's matmul to others."""
    return "reference" if layer.backend == "auto" and layer.weight.device.type != "cpu" else layer.backend


def compute_dtype(layer: QuantizedLinear) -> torch.dtype:
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
    """Refuse a weight that cannot be multiplied by: ours take floats, those of others are quantized."""
    foreign = foreign_base(layer)
    if foreign is None and not layer.weight.is_floating_point():
        raise ValueError(f"target_modules: expected floating weights, got that of {name!r} as {layer.weight.dtype}")
    if foreign is not None and backend == "triton":
        raise ValueError(f"backend: 'triton' multiplies by the weight itself, and that of {name!r} is quantized")


def foreign_class(module: nn.Module) -> type[QuantizedLinear] | None:
    """The class that a quantized linear becomes, or None where its kind is not known."""
    kind = type(module)
    if kind.__module__.partition(".")[0] == "bitsandbytes":
        return globals().get(kind.__name__) or __getattr__(kind.__name__) if kind.__name__ in _BITSANDBYTES else None
    return QuantizedLinear if kind is nn.Linear else None


def original_class(layer: QuantizedLinear) -> type[nn.Linear]:
    """The class that a layer had before it was adapted."""
    kind = type(layer)
    return nn.Linear if kind is QuantizedLinear else kind.__mro__[kind.__mro__.index(Routed) + 1]


def __getattr__(name: str) -> Any:
    # Pickle finds the classes by name; making them imports bitsandbytes.
    if name not in _BITSANDBYTES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base = getattr(importlib.import_module("bitsandbytes.nn"), name)
    text = f"bitsandbytes' ``{name}`` with a low-rank update; see ``QuantizedLinear``."
    globals()[name] = type(name, (QuantizedLinear, base), {"__module__": __name__, "__doc__": text})
    return globals()[name]


_UNITS = 1024  # unit vectors at once: 4 MiB of fp32 for 1024 outputs


def dequantize_columns(layer: nn.Linear, weight: Tensor, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Columns ``first`` to ``last`` of W as rows: what the base, without its bias, makes of these unit vectors."""
    every = torch.arange(layer.in_features, device=weight.device)
    units = (every[first:last, None] == every).to(dtype)
    state = getattr(weight, "quant_state", None)
    if state is None:
        return F.linear(units, weight)
    bitsandbytes = importlib.import_module("bitsandbytes")
    return bitsandbytes.matmul_4bit(units, weight, quant_state=state)


def has_derivative(layer: nn.Linear) -> bool:
    """Whether autograd goes through the base: int4 kernels have none, nor has a 4-bit weight packed for inference."""
    weight = layer.weight
    packed = getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False)
    return not packed and not type(weight).__name__.startswith("Int4")


class ForwardOnlyBase(torch.autograd.Function):
    r"""A base whose kernel has no derivative: its own forward, and :math:`dx = dy\, W` with W from unit vectors."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: Any) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return layer.base_forward(x)

    @staticmethod
    def backward(ctx, dy: Tensor):
        layer, parts = ctx.layer, []
        for first in range(0, layer.in_features, _UNITS):
            last = min(first + _UNITS, layer.in_features)
            columns = dequantize_columns(layer, layer.weight, first, last, ctx.dtype)
            parts.append(dy @ columns.t().to(dy.dtype))
        return torch.cat(parts, dim=-1).to(ctx.dtype), None


def dequantized(layer: nn.Linear, weight: Tensor | None = None) -> Tensor:
    """W [N, K] in fp32, of the layer's weight or of another that is quantized in the same way."""
    weight = layer.weight if weight is None else weight
    kind = type(weight).__name__
    if kind == "Int8Params":
        if weight.data.is_floating_point():
            return weight.data.float()
        scales = layer.state.SCB if getattr(weight, "SCB", None) is None else weight.SCB
        dequantize = importlib.import_module("bitsandbytes").functional.int8_vectorwise_dequant
        return dequantize(weight.data, scales).float()
    if kind in ("Int8Tensor", "IntxUnpackedToInt8Tensor"):
        return weight.dequantize().float()
    dtype = weight.quant_state.dtype if kind == "Params4bit" else weight.dtype
    steps = range(0, layer.in_features, _UNITS)
    parts = [dequantize_columns(layer, weight, n, min(n + _UNITS, layer.in_features), dtype) for n in steps]
    return torch.cat(parts).t().contiguous().float()


def requantized(layer: nn.Linear, W: Tensor) -> nn.Parameter:
    """``W`` [N, K], fp32, quantized as the layer's weight is; the layer stays as it is.

    ``ValueError`` for a kind of weight that cannot be made anew: which kinds can is one table.
    """
    weight = layer.weight
    make = _KINDS.get(type(weight).__name__)
    if make is None or getattr(weight, "act_pre_scale", None) is not None:
        raise ValueError(f"a {type(weight).__name__} cannot be quantized anew here, only {', '.join(_KINDS)}")
    with torch.inference_mode(False), torch.no_grad():  # no inference tensor, wherever it is made
        return make(weight, W)


def kept_weight(layer: nn.Linear) -> tuple[Any, ...]:
    """What puts a layer's weight back, as it is now: ``put_back(layer, kept)``."""
    state = getattr(layer, "state", None)
    return (layer.weight, *((state.CB, state.SCB) if state is not None else ()))


def replace_weight(layer: nn.Linear, weight: nn.Parameter) -> None:
    """Put a weight in."""
    layer.weight = weight
    state = getattr(layer, "state", None)
    if state is not None:
        state.CB = state.SCB = None  # the next forward takes them from the weight
    _tell_module(layer)


def put_back(layer: nn.Linear, kept: tuple[Any, ...]) -> None:
    """The weight from before ``replace_weight``, the very one."""
    layer.weight, *rest = kept
    if rest:
        layer.state.CB, layer.state.SCB = rest
    _tell_module(layer)


def _tell_module(layer: nn.Linear) -> None:
    # bitsandbytes' 4-bit modules hold the state of their weight, too.
    if hasattr(layer.weight, "quant_state"):
        layer.weight.module, layer.quant_state = layer, layer.weight.quant_state


def _mapping(weight: Any) -> Any:
    kinds = importlib.import_module("torchao.quantization.quant_primitives").MappingType
    zero = weight.zero_point
    return kinds.SYMMETRIC if zero is None or not bool(zero.any()) else kinds.ASYMMETRIC


def _torchao(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _int8(weight: Any, W: Tensor) -> nn.Parameter:
    block = importlib.import_module("torchao.quantization.granularity").PerBlock(tuple(weight.block_size))
    names = ("act_quant_kwargs", "act_quant_scale", "act_quant_zero_point", "reduce_range")
    told = {name: getattr(weight, name) for name in names}
    return _torchao(type(weight).from_hp(W.to(weight.dtype), block, _mapping(weight), **told))


def _intx(weight: Any, W: Tensor) -> nn.Parameter:
    told = {"mapping_type": _mapping(weight), "activation_quantization": weight.activation_quantization}
    made = type(weight).from_hp(W.to(weight.dtype), tuple(weight.block_size), weight.target_dtype, **told)
    return _torchao(made)


def _int4(weight: Any, W: Tensor) -> nn.Parameter:
    if weight.act_mapping_type is not None:
        raise ValueError("an Int4OpaqueTensor of dynamic activations cannot be quantized anew here")
    return _torchao(type(weight).from_hp(W.to(weight.dtype), list(weight.block_size)))


def _bitsandbytes8(weight: Any, W: Tensor) -> nn.Parameter:
    # On the way to a device it is quantized, from a CPU's tensor alone.
    dtype = weight.dtype if weight.is_floating_point() else torch.float16
    made = type(weight)(W.to("cpu", dtype), requires_grad=False, has_fp16_weights=weight.has_fp16_weights)
    return made.to(weight.device)


def _bitsandbytes4(weight: Any, W: Tensor) -> nn.Parameter:
    names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
    told = {name: getattr(weight, name) for name in names}
    made = type(weight)(W.to("cpu", weight.quant_state.dtype), requires_grad=False, **told)
    return made.to(weight.device)


_KINDS = {
    "Int8Tensor": _int8,
    "IntxUnpackedToInt8Tensor": _intx,
    "Int4OpaqueTensor": _int4,
    "Int8Params": _bitsandbytes8,
    "Params4bit": _bitsandbytes4,
}
