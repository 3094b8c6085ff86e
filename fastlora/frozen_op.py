"""The operator ``fastlora::frozen_linear``: a linear whose weight needs no gradient, on the CPU's fastest engine."""

from __future__ import annotations

import torch
from torch import Tensor

from ._operator import LIBRARY, low_precision
from .engines import ENGINES, UNPACKED

LIBRARY.define("frozen_linear(Tensor x, Tensor W, Tensor? bias, str engine) -> Tensor")
LIBRARY.define("frozen_linear_backward(Tensor dy, Tensor W, str engine) -> Tensor")


def _forward_fake(x, W, bias, engine):
    return x.new_empty((*x.shape[:-1], W.shape[0]))


def _backward_kernel(dy, W, engine):
    rows = dy.reshape(-1, W.shape[0]).to(W.dtype)
    return ENGINES.backward(rows, W, engine).view(*dy.shape[:-1], W.shape[1])


def _backward_fake(dy, W, engine):
    return W.new_empty((*dy.shape[:-1], W.shape[1]))


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, bias: Tensor | None, engine: str) -> Tensor:
        ctx.engine = engine
        ctx.save_for_backward(W)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.fastlora.frozen_linear(x, W, bias, engine)

    @staticmethod
    def backward(ctx, dy: Tensor):
        (W,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return dy @ W, None, None, None
        return torch.ops.fastlora.frozen_linear_backward(dy, W, ctx.engine), None, None, None


def _autograd_kernel(x, W, bias, engine):
    if torch.is_grad_enabled() and x.requires_grad:
        return _FrozenLinear.apply(x, W, bias, engine)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.fastlora.frozen_linear(x, W, bias, engine)


def _autocast_kernel(x, W, bias, engine):
    dtype = torch.get_autocast_dtype("cpu")
    low = low_precision(W, dtype)
    excluded = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    with torch._C._ExcludeDispatchKeyGuard(excluded):
        return torch.ops.fastlora.frozen_linear(
            low_precision(x, dtype),
            low,
            None if bias is None else low_precision(bias, dtype),
            engine if low is W else UNPACKED,
        )


LIBRARY.impl("frozen_linear", ENGINES.forward, "CompositeExplicitAutograd")
LIBRARY.impl("frozen_linear", _autograd_kernel, "Autograd")
LIBRARY.impl("frozen_linear", _autocast_kernel, "AutocastCPU")
LIBRARY.impl("frozen_linear_backward", _backward_kernel, "CompositeExplicitAutograd")
torch.library.register_fake("fastlora::frozen_linear", _forward_fake, lib=LIBRARY)
torch.library.register_fake("fastlora::frozen_linear_backward", _backward_fake, lib=LIBRARY)
