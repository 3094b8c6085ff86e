"""The Fisher-weighted penalty and its gradient: formula and fused operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._utils.errors import check_choice, check_instance, check_number, wrong_value
from .._utils.torch_compat import multiply_each

FORMS = ("delta", "decay")
NORMALIZE = ("sum", "relative", "uniform")


def importance_weights(importance: Tensor, normalize: str = "sum") -> Tensor:
    """Penalty factors 1 - I_m, in fp32 or float64, without gradient.

    ``"sum"``: I_m = F_m / sum F (FW-LoRA); ``"relative"``: F_m / max F; ``"uniform"``: 1 / matrices whatever F is, the
    control that has the mean of the factors of ``"sum"`` everywhere. importance F [matrices], finite and >= 0. All
    zeros count as no importance anywhere: under "sum" and "relative" every factor is 1. Raises ValueError for other
    input.
    """
    check_choice("normalize", normalize, NORMALIZE)
    accepted = "a floating vector of at least one importance"
    check_instance("importance", importance, Tensor, accepted)
    if not importance.is_floating_point() or importance.dim() != 1 or importance.numel() == 0:
        raise wrong_value("importance", accepted, importance)
    if not bool((torch.isfinite(importance) & (importance >= 0)).all()):
        raise ValueError("importance: expected finite numbers >= 0, got others")
    return unchecked_weights(importance, normalize)


def unchecked_weights(importance: Tensor, normalize: str) -> Tensor:
    """``importance_weights`` of values that are known to be valid: nothing is read back from the device."""
    values = importance.detach().double()
    if normalize == "uniform":
        shares = torch.full_like(values, 1.0 / len(values))
    else:
        # Relative to the largest first, so that a sum of huge values stays finite.
        largest = values.max()
        shares = values / torch.where(largest > 0, largest, torch.ones_like(largest))
        if normalize == "sum":
            total = shares.sum()
            shares = shares / torch.where(total > 0, total, torch.ones_like(total))
    return (1.0 - shares).to(importance.dtype if importance.dtype == torch.float64 else torch.float32)


def weighted_penalty(
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scales: Sequence[float],
    weights: Tensor | Sequence[Tensor] | Sequence[float],
    weight: float = 1.0,
    form: str = "delta",
) -> Tensor:
    """FW-LoRA's regulariser as a differentiable scalar on the device of the first factor.

    ``"delta"``: lambda sum_m w_m ||s_m B_m A_m||_F^2; ``"decay"``: (lambda / 2) sum_m w_m (||A_m||_F^2 + ||B_m||_F^2),
    whose gradient is weight decay of A and B with the coefficient lambda w_m. As[m] [r_m, K_m], Bs[m] [N_m, r_m], one
    scale and one weight (of ``importance_weights``) for each. Raises ValueError for lists that are empty or differ
    in length and for shapes that do not fit.
    """
    check_choice("form", form, FORMS)
    factors = _check_lists(As, Bs, scales, weights)
    coefficients = _coefficients(scales, factors, weight, form)
    terms = []
    for members in _alike(As, Bs):
        A, B, coefficient = _stacked(As, Bs, coefficients, members)
        with torch.autocast(A.device.type, enabled=False):
            if form == "delta":
                norms = ((A @ A.mT) * (B.mT @ B)).sum(dim=(1, 2))
            else:
                norms = A.square().sum(dim=(1, 2)) + B.square().sum(dim=(1, 2))
            terms.append((coefficient.view(-1) * norms).sum().to(As[0].device))
    return torch.stack(terms).sum()


@torch.no_grad()
def weighted_penalty_grad(
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scales: Sequence[float],
    weights: Tensor | Sequence[Tensor] | Sequence[float],
    weight: float = 1.0,
    form: str = "delta",
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradient of ``weighted_penalty`` by hand, without a graph.

    ``"delta"``: dA = 2 lambda w s^2 (B^T B) A, dB = 2 lambda w s^2 B (A A^T); ``"decay"``: dA = lambda w A, dB =
    lambda w B. Returns (dAs, dBs) in the shapes and dtypes of the factors, computed in fp32 for bf16 and fp16.
    Matrices of one shape go together, in a handful of launches. Raises as ``weighted_penalty`` does.
    """
    check_choice("form", form, FORMS)
    factors = _check_lists(As, Bs, scales, weights)
    coefficients = _coefficients(scales, factors, weight, form)
    dAs, dBs = list(As), list(Bs)
    for members in _alike(As, Bs):
        A, B, coefficient = _stacked(As, Bs, coefficients, members)
        with torch.autocast(A.device.type, enabled=False):
            if form == "delta":
                dA, dB = (B.mT @ B) @ (2.0 * coefficient * A), B @ (A @ (2.0 * coefficient * A).mT)
            else:
                dA, dB = 2.0 * coefficient * A, 2.0 * coefficient * B
        for index, da, db in zip(members, dA.to(As[members[0]].dtype), dB.to(Bs[members[0]].dtype), strict=True):
            dAs[index], dBs[index] = da, db
    return dAs, dBs


def checked_options(weight: float, form: str, normalize: str) -> None:
    """Refuse what ``weighted_penalty`` and ``importance_weights`` would refuse, by name."""
    _finite("weight", weight)
    check_choice("form", form, FORMS)
    check_choice("normalize", normalize, NORMALIZE)


def _coefficients(
    scales: Sequence[float], weights: Sequence[Tensor] | list[float], weight: float, form: str
) -> list[Tensor] | list[float]:
    """lambda w s^2, or lambda w / 2: one launch when the weights are tensors."""
    weight = _finite("weight", weight)
    checked = [_finite("scales", scale) for scale in scales]
    constants = [weight * scale * scale if form == "delta" else weight / 2 for scale in checked]
    if isinstance(weights[0], Tensor):
        return list(multiply_each(list(weights), constants))
    return [constant * weight for constant, weight in zip(constants, weights, strict=True)]


def _alike(As: Sequence[Tensor], Bs: Sequence[Tensor]) -> list[list[int]]:
    """Positions of the matrices that can be computed as one batch."""
    groups: dict[tuple, list[int]] = {}
    for index, (A, B) in enumerate(zip(As, Bs, strict=True)):
        groups.setdefault((A.shape, B.shape, A.dtype, B.dtype, A.device, B.device), []).append(index)
    return list(groups.values())


def _stacked(
    As: Sequence[Tensor], Bs: Sequence[Tensor], coefficients: Sequence[Tensor | float], members: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """A [m, r, K], B [m, N, r] and the coefficients [m, 1, 1], all wide."""
    A, B = torch.stack([As[i] for i in members]), torch.stack([Bs[i] for i in members])
    dtype = torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.float32)
    chosen = [coefficients[i] for i in members]
    if isinstance(chosen[0], Tensor):
        coefficient = torch.stack(chosen).to(A.device, dtype)
    else:
        coefficient = torch.tensor(chosen, dtype=dtype, device=A.device)
    return A.to(dtype), B.to(dtype), coefficient.view(-1, 1, 1)


def _check_pair(A: Tensor, B: Tensor) -> None:
    for name, factor in (("As", A), ("Bs", B)):
        if not check_instance(name, factor, Tensor, "floating tensors").is_floating_point():
            raise wrong_value(name, "floating tensors", factor)
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
        shapes = f"{tuple(A.shape)} and {tuple(B.shape)}"
        raise ValueError(f"As: expected [r, K], and Bs [N, r] with the same r, got {shapes}")


def _check_lists(
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scales: Sequence[float],
    weights: Tensor | Sequence[Tensor] | Sequence[float],
) -> Sequence[Tensor] | list[float]:
    if isinstance(weights, Tensor) and weights.dim() != 1:
        raise wrong_value("weights", "a vector", weights)
    lengths = {"As": len(As), "Bs": len(Bs), "scales": len(scales), "weights": len(weights)}
    if len(As) == 0 or len(set(lengths.values())) != 1:
        listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"As: expected one entry a matrix, as in Bs, scales and weights, got {listed}")
    for A, B in zip(As, Bs, strict=True):
        _check_pair(A, B)
    if isinstance(weights, Tensor):
        return weights.detach().unbind()
    if all(isinstance(weight, Tensor) for weight in weights):
        return [weight.detach() for weight in weights]
    return [_finite("weights", weight) for weight in weights]


def _finite(name: str, value: object) -> float:
    return float(check_number(name, value))


def penalty(A: Sequence[Tensor], B: Sequence[Tensor], scale: Sequence[float], weights: Tensor, weight: float) -> Tensor:
    """``lambda sum_m w_m ||s_m B_m A_m||_F^2`` with a graph, value and gradient a native call each; w [matrices]."""
    return _Penalty.apply(weight, tuple(scale), weights, *A, *B)


def add_penalty_grad_(
    dA: Sequence[Tensor], dB: Sequence[Tensor], A: Sequence[Tensor], B: Sequence[Tensor], scale: Sequence[float],
    weights: Tensor, weight: float,
) -> None:  # fmt: skip
    """``dA += 2 lambda w s^2 (B^T B) A``, ``dB += 2 lambda w s^2 B (A A^T)`` in one call, empty ones left out."""
    torch.ops.fastlora.penalty_grad_(dA, dB, A, B, scale, weights, weight)


def empty_grad(factor: Tensor) -> Tensor:
    """Zeros for the gradient of a factor, as ``add_penalty_grad_`` writes it."""
    return torch.zeros_like(factor, memory_format=torch.contiguous_format)


class _Penalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: float, scale: tuple[float, ...], weights: Tensor, *factors: Tensor) -> Tensor:
        ctx.weight, ctx.scale = weight, scale
        ctx.save_for_backward(weights, *factors)
        count = len(scale)
        return weight * torch.ops.fastlora.penalty(factors[:count], factors[count:], scale, weights)

    @staticmethod
    def backward(ctx, grad: Tensor):
        weights, *factors = ctx.saved_tensors
        count, needed = len(ctx.scale), ctx.needs_input_grad[3:]
        A, B = factors[:count], factors[count:]
        if torch.is_grad_enabled():  # create_graph: the formula can be differentiated again
            value = grad * weighted_penalty(A, B, ctx.scale, weights, ctx.weight)
            wanted = [factor for factor, need in zip(factors, needed, strict=True) if need]
            found = iter(torch.autograd.grad(value, wanted, create_graph=True))
            return (None, None, None, *(next(found) if need else None for need in needed))
        # The incoming gradient stays on the device: it weighs the terms.
        out = [empty_grad(f) if need else f.new_empty(0) for f, need in zip(factors, needed, strict=True)]
        add_penalty_grad_(out[:count], out[count:], A, B, ctx.scale, weights * grad, ctx.weight)
        return (None, None, None, *(g if need else None for g, need in zip(out, needed, strict=True)))
