"""The small matrices of all layers in one launch: the native multi-tensor operators, or why they cannot take them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import native
from .penalty import weighted_penalty

_FACTORS = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (Tensor, torch.nn.Parameter)


def unsupported_reason(
    operator: str, tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype] = _FACTORS
) -> str | None:
    """Why a native operator cannot take these tensors, or None."""
    if not native.available():
        return f"the native library is not there: {native.reason()}"
    if torch.compiler.is_compiling():
        return "torch.compile traces the formula"
    device = tensors[0].device
    for tensor in tensors:
        if type(tensor) not in _PLAIN:
            return f"its kernels take plain tensors, not {type(tensor).__name__}"
        if tensor.device != device:
            return f"one launch takes one device, the matrices are on {device} and {tensor.device}"
        if tensor.dtype not in dtypes:
            shown = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            return f"its kernels take {shown}, not {str(tensor.dtype).removeprefix('torch.')}"
    return None if native.has_kernel(operator, device) else f"it has no kernel for {device.type}"


def squared_norms(tensors: Sequence[Tensor], factor: float | Tensor = 1.0) -> Tensor:
    """``factor ||t||^2`` of one tensor or more, float64 [tensors]: one launch where a native operator takes them."""
    if unsupported_reason("squared_norms", tensors, (*_FACTORS, torch.float64)) is None:
        return torch.ops.fastlora.squared_norms(tensors).mul_(factor)
    device = tensors[0].device
    norms = torch.stack([norm.to(device) for norm in torch._foreach_norm(tensors, 2)])
    return norms.double().square().mul_(factor)


def output_variances(sums: Sequence[Tensor], sizes: Sequence[Sequence[int]]) -> Tensor:
    """``sum_o max(0, E y_o^2 - (E y_o)^2)`` over each run of columns of one layer or more, float64 [runs].

    ``sums``: [sum y; sum y^2] of a layer with the number of rows in the last column; ``sizes``: its runs of columns.
    A fixed number of launches, one where a native operator takes the tensors.
    """
    flat_sizes = [size for runs in sizes for size in runs]
    if unsupported_reason("output_variances", sums, (torch.float64,)) is None:
        return torch.ops.fastlora.output_variances(sums, [len(runs) for runs in sizes], flat_sizes)
    device = sums[0].device
    live = [given.to(device) for given in sums]
    flat = torch.cat([given[:, :-1] for given in live], dim=1)
    mean, square = flat / torch.cat([given[0, -1:].expand(given.shape[1] - 1) for given in live])
    # Nothing is negative here, so that the 1-norm is the sum.
    parts = (square - mean.square()).clamp_(min=0).split(flat_sizes)
    return torch.stack(torch._foreach_norm(parts, 1))


def copy_overlap_(to: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    """``to_i = source_i`` where both have the row and the column, else 0; only one of the two sizes may differ."""
    every = [*to, *source]
    if every and unsupported_reason("resize_ranks_", every, (*_FACTORS, torch.float64)) is None:
        torch.ops.fastlora.resize_ranks_(to, source)
        return
    for mine, old in zip(to, source, strict=True):
        rows, columns = (min(a, b) for a, b in zip(mine.shape, old.shape, strict=True))
        mine.zero_()
        mine[:rows, :columns] = old[:rows, :columns]


def penalty(A: Sequence[Tensor], B: Sequence[Tensor], scale: Sequence[float], weights: Tensor, lmbda: float) -> Tensor:
    """``lambda sum_m w_m ||s_m B_m A_m||_F^2`` with a graph, value and gradient in one launch each; w [matrices]."""
    return _Penalty.apply(lmbda, tuple(scale), weights, *A, *B)


def add_penalty_grad_(
    dA: Sequence[Tensor], dB: Sequence[Tensor], A: Sequence[Tensor], B: Sequence[Tensor], scale: Sequence[float],
    weights: Tensor, lmbda: float,
) -> None:  # fmt: skip
    """``dA += 2 lambda w s^2 (B^T B) A``, ``dB += 2 lambda w s^2 B (A A^T)`` in one launch, empty ones left out."""
    torch.ops.fastlora.penalty_grad_(dA, dB, A, B, scale, weights, lmbda)


def empty_grad(factor: Tensor) -> Tensor:
    """Zeros for the gradient of a factor, as ``add_penalty_grad_`` writes it."""
    return torch.zeros_like(factor, memory_format=torch.contiguous_format)


class _Penalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, lmbda: float, scale: tuple[float, ...], weights: Tensor, *factors: Tensor) -> Tensor:
        ctx.lmbda, ctx.scale = lmbda, scale
        ctx.save_for_backward(weights, *factors)
        count = len(scale)
        return lmbda * torch.ops.fastlora.penalty(factors[:count], factors[count:], scale, weights)

    @staticmethod
    def backward(ctx, grad: Tensor):
        weights, *factors = ctx.saved_tensors
        count, needed = len(ctx.scale), ctx.needs_input_grad[3:]
        A, B = factors[:count], factors[count:]
        if torch.is_grad_enabled():  # create_graph: the formula can be differentiated again
            value = grad * weighted_penalty(A, B, ctx.scale, weights, ctx.lmbda)
            wanted = [factor for factor, need in zip(factors, needed, strict=True) if need]
            found = iter(torch.autograd.grad(value, wanted, create_graph=True))
            return (None, None, None, *(next(found) if need else None for need in needed))
        # The incoming gradient stays on the device: it weighs the terms.
        out = [empty_grad(f) if need else f.new_empty(0) for f, need in zip(factors, needed, strict=True)]
        add_penalty_grad_(out[:count], out[count:], A, B, ctx.scale, weights * grad, ctx.lmbda)
        return (None, None, None, *(g if need else None for g, need in zip(out, needed, strict=True)))
