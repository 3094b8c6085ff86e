"""The CPU backend over the compiled library."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from .. import native
from ..layout import Gradients, LoraCall, Need, as_rows
from ..matmul import ENGINES, matmul_backward
from . import eager
from .base import ComposedBackend, with_counts


class NativeBackend(ComposedBackend):
    """The compiled kernels: one pass over the rows in each direction around the library's matmul.

    Adapters that share a batch are composed where one of them has dropout.
    """

    @property
    def whole(self) -> tuple[Callable, Callable]:
        """As ``Backend.whole``."""
        return torch.ops.fastlora.linear_lora_forward.default, torch.ops.fastlora.linear_lora_backward.default

    def forward(self, call: LoraCall) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """As ``Backend.forward``."""
        if call.drop is not None and call.rows is not None:
            return super().forward(call)
        layout, ops = call.layout.of(0), torch.ops.fastlora
        outputs = [ENGINES.forward(call.x, w, b, call.engine) for w, b in zip(call.W, call.bias, strict=True)]
        y, x, A, B = [as_rows(out) for out in outputs], as_rows(call.x), _readable(call.A), _readable(call.B)
        where = (layout.outputs, layout.places, call.scale)
        if call.rows is None:
            P = call.P[0] if call.P else None
            drop = () if call.drop is None else (call.drop.key, call.drop.p[0], call.drop.streams)
            h, sums = ops.lora_forward_.default(y, x, A, P, B, *where, call.moments, *drop)
        else:
            _, order, ranges, _ = call.rows
            starts = call.layout.starts
            h, sums = ops.lora_grouped_forward_.default(y, x, A, call.P, B, order, ranges, *where, starts, call.moments)
        return outputs, h, with_counts(sums, call)

    def backward(self, call: LoraCall, h: Tensor, dy: Sequence[Tensor | None], need: Need) -> Gradients:
        """As ``Backend.backward``; gradients of a projection whose dy is None are zero."""
        if call.drop is not None and call.rows is not None:
            return super().backward(call, h, dy, need)
        layout, ops = call.layout.of(0), torch.ops.fastlora
        dx = matmul_backward(dy, call.W, call.engine) if need.dx else None
        position, live = _defined(dy)
        x, A, B = as_rows(call.x), _readable(call.A), _readable(call.B)
        where = ([position[j] for j in layout.outputs], layout.places, call.scale)
        if call.rows is None:
            probes = call.probes[0] if call.probes and need.dZ else 0
            drop = () if call.drop is None else (call.drop.key, call.drop.p[0], call.drop.streams)
            dA, dB, Q = ops.lora_backward_.default(dx, live, x, h, A, B, *where, probes, need.dA, need.dB, *drop)
        else:
            _, order, ranges, _ = call.rows
            probes = call.probes or [0] * ranges.shape[0]
            dA, dB, Q = ops.lora_grouped_backward_.default(
                dx, live, x, h, A, B, order, ranges, *where, call.layout.starts, probes, need.dA, need.dB
            )
        return Gradients(dx, dA, dB, Q)


def _defined(dy: Sequence[Tensor | None]) -> tuple[list[int], list[Tensor]]:
    """The gradients that are there, and the place of each among them (-1: not there)."""
    position, live = [], []
    for grad in dy:
        position.append(-1 if grad is None else len(live))
        if grad is not None:
            live.append(grad)
    return position, live


def _readable(factors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Factors in a dtype that the kernels read."""
    if _NATIVE_DTYPES.issuperset([f.dtype for f in factors]):
        return factors
    return [f.to(torch.float32) for f in factors]


_NATIVE_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))


def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    if not native.available():
        return f"the native library is not there: {native.reason()}"
    if device.type != "cpu":
        return f"its kernels run on the CPU, the tensors are on {device.type}"
    if dtype not in _NATIVE_DTYPES:
        return f"its kernels take float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return None


def native_kernels() -> SimpleNamespace | None:
    if not native.available():
        return None
    ops = torch.ops.fastlora
    return SimpleNamespace(
        shrink=ops.shrink,
        expand_=ops.expand_,
        wgrad=ops.wgrad,
        outer=ops.outer,
        dropout=ops.dropout,
        dropout_rows=ops.dropout_rows,
        gradstat=functools.partial(eager.gradstat, add_norms=ops.add_norms_.default),
        column_moments=lambda y: ops.expand_(y, y[:, :0], [], [], [], [], True),
    )
