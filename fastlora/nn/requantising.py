"""The matrix that a quantised base multiplies by, and a base quantised anew from another matrix."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_UNITS = 1024  # unit vectors at once: 4 MiB of fp32 for 1024 outputs


def outputs_for_units(layer: nn.Linear, weight: Tensor, first: int, last: int, dtype: torch.dtype) -> Tensor:
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


class OwnForward(torch.autograd.Function):
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
            columns = outputs_for_units(layer, layer.weight, first, last, ctx.dtype)
            parts.append(dy @ columns.t().to(dy.dtype))
        return torch.cat(parts, dim=-1).to(ctx.dtype), None


def dequantised(layer: nn.Linear, weight: Tensor | None = None) -> Tensor:
    """W [N, K] in fp32, of the layer's weight or of another that is quantised in the same way."""
    weight = layer.weight if weight is None else weight
    kind = type(weight).__name__
    if kind == "Int8Params":
        if weight.data.is_floating_point():
            return weight.data.float()
        scales = layer.state.SCB if getattr(weight, "SCB", None) is None else weight.SCB
        dequantise = importlib.import_module("bitsandbytes").functional.int8_vectorwise_dequant
        return dequantise(weight.data, scales).float()
    if kind in ("Int8Tensor", "IntxUnpackedToInt8Tensor"):
        return weight.dequantize().float()
    dtype = weight.quant_state.dtype if kind == "Params4bit" else weight.dtype
    steps = range(0, layer.in_features, _UNITS)
    parts = [outputs_for_units(layer, weight, n, min(n + _UNITS, layer.in_features), dtype) for n in steps]
    return torch.cat(parts).t().contiguous().float()


def requantised(layer: nn.Linear, W: Tensor) -> nn.Parameter:
    """``W`` [N, K], fp32, quantised as the layer's weight is; the layer stays as it is.

    ``ValueError`` for a kind of weight that cannot be made anew: which kinds can is one table.
    """
    weight = layer.weight
    make = _KINDS.get(type(weight).__name__)
    if make is None or getattr(weight, "act_pre_scale", None) is not None:
        raise ValueError(f"a {type(weight).__name__} cannot be quantised anew here, only {', '.join(_KINDS)}")
    return make(weight, W)


def replace_weight(layer: nn.Linear, weight: nn.Parameter) -> tuple[Any, ...]:
    """Put a weight in; returns what puts the old one back, as it was: ``put_back(layer, kept)``."""
    state = getattr(layer, "state", None)
    kept = (layer.weight, *((state.CB, state.SCB) if state is not None else ()))
    layer.weight = weight
    if state is not None:
        state.CB = state.SCB = None  # the next forward takes them from the weight
    _tell_module(layer)
    return kept


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
        raise ValueError("an Int4OpaqueTensor of dynamic activations cannot be quantised anew here")
    return _torchao(type(weight).from_hp(W.to(weight.dtype), list(weight.block_size)))


def _bitsandbytes8(weight: Any, W: Tensor) -> nn.Parameter:
    # On the way to a device it is quantised, from a CPU's tensor alone.
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
