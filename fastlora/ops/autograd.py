"""How an operator meets autograd, autocast and the dispatcher."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._utils.torch_compat import (
    apply_directly,
    autocasting,
    can_skip_dispatcher,
    differentiated_again,
    untracked,
    wants_plain_operators,
    without_autocast,
    without_graph,
)
from .flops import tell_counters

LIBRARY = torch.library.Library("fastlora", "FRAGMENT")


class Operator(NamedTuple):
    """An adapted linear as autograd sees it: ``forward(x, W, bias, A, B, Z, V, *rest)`` gives [*y, h, *moments].

    ``rest`` ends with (backend, engine) and is not differentiable.
    """

    name: str
    forward: Callable
    backward: Callable  # (dy, x, h, W, A, B, *backward_rest(rest), need, backend, engine)
    backward_rest: Callable[[tuple], tuple]
    formula: Callable  # (x, W, bias, A, B, Z, rest) -> y, differentiable any number of times
    probe_leaves: Callable[[Sequence[Tensor], tuple], list[Tensor]]  # (B, rest) -> zero leaves like Z

    def apply(self, x: Tensor, *arguments) -> list[Tensor]:
        """The operator, without the dispatcher where that has the same effect."""
        W, bias, A, B, Z, V = arguments[:6]
        if not autocasting(x) and can_skip_dispatcher((x, *W, *bias, *A, *B, *Z, *V)):
            return _autograd(self, x, *arguments, plain=True)
        if wants_plain_operators():
            return self._formula_of_torch(x, *arguments)
        tell_counters()
        return getattr(torch.ops.fastlora, self.name)(x, *arguments)

    def _formula_of_torch(self, x: Tensor, W, bias, A, B, Z, V, *rest) -> list[Tensor]:
        """The outputs from torch's own operators, which every transform and exporter knows."""
        for given, what in ((Z or V, "no tracker to be open"), (rest[3], "one adapter for all rows")):
            if given:
                raise ValueError(f"model: expected {what} under torch.func, torch.jit.trace and torch.export")
        return self.formula(x, W, bias, A, B, (), rest)

    def register(self, fake: Callable, backward_fake: Callable) -> None:
        """Kernels, autograd, autocast and shapes of the operator and its backward."""
        LIBRARY.impl(self.name, self.forward, "CompositeExplicitAutograd")
        LIBRARY.impl(self.name, functools.partial(_autograd, self), "Autograd")
        LIBRARY.impl(self.name, _autocast(self.name, "cpu"), "AutocastCPU")
        LIBRARY.impl(self.name, _autocast(self.name, "cuda"), "AutocastCUDA")
        LIBRARY.impl(f"{self.name}_backward", self.backward, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastlora::{self.name}", fake, lib=LIBRARY)
        torch.library.register_fake(f"fastlora::{self.name}_backward", backward_fake, lib=LIBRARY)


class LoraRest(NamedTuple):
    """What a call of an operator holds besides differentiable tensors."""

    operator: Operator
    counts: tuple[int, int, int, int]  # weights, adapter factors, probe leaves, moment leaves
    rest: tuple
    kernel: Callable  # the forward, through the dispatcher or not
    below: Callable  # guard under which it runs

    def split(self, tensors: Sequence) -> tuple[Sequence, ...]:
        """Cut the flat list [W, bias, A, B, Z, V] into its six parts."""
        weights, projections, leaves, _ = self.counts
        a = 2 * weights
        b, z = a + projections, a + 2 * projections
        v = z + leaves
        return tensors[:weights], tensors[weights:a], tensors[a:b], tensors[b:z], tensors[z:v], tensors[v:]


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: LoraRest, x: Tensor, *flat: Tensor | None):
        W, bias, A, B, Z, V = call.split(flat)
        with call.below():
            out = call.kernel(x, W, bias, A, B, Z, V, *call.rest)
        plain = out[call.counts[0] :]
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*plain)
        ctx.save_for_backward(x, plain[0], *W, *bias, *A, *B, *plain[1:])
        return tuple(out)

    @staticmethod
    def backward(ctx, *grads):
        call: LoraRest = ctx.call
        operator, (weights, projections) = call.operator, call.counts[:2]
        ctx.spent = True
        dy = grads[:weights]
        needs = ctx.needs_input_grad
        if all([g is None for g in dy]):
            return (None,) * len(needs)
        x, h, *saved = ctx.saved_tensors
        first = 2 * weights
        second, last = first + projections, first + 2 * projections
        W, A, B, moments = saved[:weights], saved[first:second], saved[second:last], saved[last:]
        if differentiated_again(dy):
            bias = saved[weights:first]
            return (None, *differentiable_backward(call, needs[1:], dy, x, W, bias, A, B, moments))
        parts = call.split(needs[2:])
        need = [needs[1], True in parts[2], True in parts[3], True in parts[4], True in parts[0], True in parts[1]]
        kernel, below = operator.backward, untracked
        if not can_skip_dispatcher((x, h, *dy, *saved)):
            tell_counters()
            kernel, below = getattr(torch.ops.fastlora, f"{operator.name}_backward"), without_graph
        with below():
            out = kernel(dy, x, h, W, A, B, *operator.backward_rest(call.rest), need, *call.rest[-2:])
        return (None, *_arrange(need, parts, out, moments))


_apply_eager = apply_directly(_LoRALinear)


def _arrange(need, parts, out, moments):
    """Place the returned gradients beside the inputs [x, W, bias, A, B, Z, V], None where none is needed."""
    found = iter(out)
    dx = next(found) if need[0] else None
    A, B, Z, W, bias = [
        [g if flag else None for flag, g in zip(flags, found, strict=False)] if wanted else [None] * len(flags)
        for wanted, flags in zip(need[1:], (parts[2], parts[3], parts[4], parts[0], parts[1]), strict=True)
    ]
    return [dx, *W, *bias, *A, *B, *Z, *moments]


def differentiable_backward(call, needs, dy, x, W, bias, A, B, moments):
    """Gradients of the written-out formula, which autograd can differentiate again and batch."""
    Z = call.operator.probe_leaves(B, call.rest) if call.counts[2] else []
    flat = [x, *W, *bias, *A, *B, *Z]
    wanted = [t for t, flag in zip(flat, needs, strict=False) if flag]
    with torch.enable_grad():
        y = call.operator.formula(x, W, bias, A, B, Z, call.rest)
    live = [(out, g) for out, g in zip(y, dy, strict=True) if g is not None]
    grads = iter(
        torch.autograd.grad([o for o, _ in live], wanted, [g for _, g in live], create_graph=True, allow_unused=True)
    )
    placed = [next(grads) if flag else None for _, flag in zip(flat, needs, strict=False)]
    return (*placed, *moments)


def _autograd(operator: Operator, x, W, bias, A, B, Z, V, *rest, plain: bool | None = None):
    """The operator with a graph; ``plain``: what ``can_skip_dispatcher`` says, where it was asked."""
    flat = (*W, *bias, *A, *B, *Z, *V)
    if plain is None:
        plain = can_skip_dispatcher((x, *flat))
    kernel, below = operator.forward, untracked
    if not plain:
        kernel, below = getattr(torch.ops.fastlora, operator.name), without_graph
    if torch.is_grad_enabled() and (x.requires_grad or any([t is not None and t.requires_grad for t in flat])):
        call = LoraRest(operator, (len(W), len(A), len(Z), len(V)), rest, kernel, below)
        return list((_apply_eager if plain else _LoRALinear.apply)(call, x, *flat))
    with below():
        return kernel(x, W, bias, A, B, Z, V, *rest)


def _autocast(name: str, device_type: str):
    def kernel(x, W, bias, *rest):
        dtype = torch.get_autocast_dtype(device_type)
        *rest, engine = rest
        low = [low_precision(w, dtype) for w in W]
        if engine == "auto" and any(a is not b for a, b in zip(low, W, strict=True)):
            engine = "unpacked"  # a weight that is cast anew for every call is not worth packing
        with without_autocast(device_type):
            low_bias = [None if b is None else low_precision(b, dtype) for b in bias]
            return getattr(torch.ops.fastlora, name)(low_precision(x, dtype), low, low_bias, *rest, engine)

    return kernel


def low_precision(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # Autocast leaves float64 alone; adapters and statistics keep their dtype and are cast inside the kernels.
    return tensor if tensor.dtype in (dtype, torch.float64) else tensor.to(dtype)


def like(grad: Tensor | None, target: Tensor) -> Tensor:
    """The gradient in the target's dtype, zeros where none flowed."""
    if grad is None:
        return torch.zeros_like(target, memory_format=torch.contiguous_format)
    return grad if grad.dtype == target.dtype else grad.to(target.dtype)
