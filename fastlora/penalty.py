"""FW-LoRA's penalty sum_m w_m ||s_m B_m A_m||_F^2 from r x r Gram matrices, with its gradient by hand."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor


def delta_norm_sq(A: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    """||s B A||_F^2 = s^2 sum((A A^T) o (B^T B)), differentiable; B A is never formed.

    A [r, K], B [N, r]; a scalar in fp32 for bf16 and fp16 factors, otherwise in their dtype. Autocast does not
    lower the precision. Raises ValueError for shapes that do not fit, TypeError for factors that are not floating.
    """
    _check_pair(A, B, "A", "B")
    scale = _finite("scale", scale)
    with torch.autocast(A.device.type, enabled=False):
        wide_A, wide_B = _widened(A, B)
        return scale * scale * ((wide_A @ wide_A.T) * (wide_B.T @ wide_B)).sum()


def importance_weights(importance: Tensor, normalise: str = "sum") -> Tensor:
    """Penalty factors 1 - I_m with I_m = F_m / sum F ("sum", FW-LoRA) or F_m / max F ("relative").

    importance F [matrices], finite and >= 0; the result has its shape, in fp32 or float64, without gradient. All
    zeros count as no importance anywhere: every factor is 1. Raises ValueError for other input.
    """
    if normalise not in ("sum", "relative"):
        raise ValueError(f"normalise must be 'sum' or 'relative', got {normalise!r}")
    if not isinstance(importance, Tensor) or not importance.is_floating_point():
        raise TypeError(f"importance must be a floating-point tensor, got {_described(importance)}")
    if importance.dim() != 1 or importance.numel() == 0:
        raise ValueError(f"importance must be a non-empty vector, got shape {tuple(importance.shape)}")
    values = importance.detach().double()
    if not bool((torch.isfinite(values) & (values >= 0)).all()):
        raise ValueError("importance must be finite and >= 0")
    # Relative to the largest first, so that a sum of huge values stays finite.
    largest = values.max()
    shares = values / torch.where(largest > 0, largest, torch.ones_like(largest))
    if normalise == "sum":
        total = shares.sum()
        shares = shares / torch.where(total > 0, total, torch.ones_like(total))
    return (1.0 - shares).to(importance.dtype if importance.dtype == torch.float64 else torch.float32)


def delta_penalty(
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scales: Sequence[float],
    weights: Tensor | Sequence[float],
    lmbda: float = 1.0,
) -> Tensor:
    """lambda sum_m w_m ||s_m B_m A_m||_F^2 as a differentiable scalar on the device of the first factor.

    As[m] [r_m, K_m], Bs[m] [N_m, r_m], one scale and one weight (from ``importance_weights``) for each. Raises
    ValueError for lists that are empty or differ in length and for shapes that do not fit.
    """
    factors = _check_lists(As, Bs, scales, weights)
    lmbda = _finite("lmbda", lmbda)
    terms = [
        (_on(weight, A.device) * delta_norm_sq(A, B, scale)).to(As[0].device)
        for A, B, scale, weight in zip(As, Bs, scales, factors, strict=True)
    ]
    return lmbda * torch.stack(terms).sum()


@torch.no_grad()
def delta_penalty_grad(
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scales: Sequence[float],
    weights: Tensor | Sequence[float],
    lmbda: float = 1.0,
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradient of ``delta_penalty`` by hand: dA = 2 lambda w s^2 (B^T B) A and dB = 2 lambda w s^2 B (A A^T).

    Returns (dAs, dBs) in the shapes and dtypes of the factors, computed in fp32 for bf16 and fp16; no graph is built.
    Raises as ``delta_penalty`` does.
    """
    factors = _check_lists(As, Bs, scales, weights)
    lmbda = _finite("lmbda", lmbda)
    dAs, dBs = [], []
    for A, B, scale, weight in zip(As, Bs, scales, factors, strict=True):
        coefficient = 2.0 * lmbda * _finite("scales", scale) ** 2 * _on(weight, A.device)
        with torch.autocast(A.device.type, enabled=False):
            wide_A, wide_B = _widened(A, B)
            dAs.append((coefficient * ((wide_B.T @ wide_B) @ wide_A)).to(A.dtype))
            dBs.append((coefficient * (wide_B @ (wide_A @ wide_A.T))).to(B.dtype))
    return dAs, dBs


def _widened(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.float32)
    return A.to(dtype), B.to(dtype)


def _on(weight: Tensor | float, device: torch.device) -> Tensor | float:
    return weight.to(device) if isinstance(weight, Tensor) else weight


def _check_pair(A: Tensor, B: Tensor, name_A: str, name_B: str) -> None:
    for name, factor in ((name_A, A), (name_B, B)):
        if not isinstance(factor, Tensor) or not factor.is_floating_point():
            raise TypeError(f"{name} must be floating-point tensors, got {_described(factor)}")
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
        raise ValueError(
            f"{name_A} must be [r, K] and {name_B} [N, r] with one r, got {tuple(A.shape)} and {tuple(B.shape)}"
        )


def _check_lists(
    As: Sequence[Tensor], Bs: Sequence[Tensor], scales: Sequence[float], weights: Tensor | Sequence[float]
) -> Sequence[Tensor] | list[float]:
    if isinstance(weights, Tensor) and weights.dim() != 1:
        raise ValueError(f"weights must be a vector, got shape {tuple(weights.shape)}")
    lengths = {"As": len(As), "Bs": len(Bs), "scales": len(scales), "weights": len(weights)}
    if len(As) == 0 or len(set(lengths.values())) != 1:
        listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"As, Bs, scales and weights must have one entry per matrix and not be empty, got {listed}")
    for A, B in zip(As, Bs, strict=True):
        _check_pair(A, B, "As", "Bs")
    if isinstance(weights, Tensor):
        return weights.detach().unbind()
    return [_finite("weights", weight) for weight in weights]


def _finite(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def _described(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
