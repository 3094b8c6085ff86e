"""Every operator, with every backend, dtype and kind of device, against the float64 formula: what ``doctor`` asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import multi_tensor
from .backends import BACKENDS
from .functional import lora_grouped, lora_linear
from .penalty import weighted_penalty
from .segments import Batch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_M, _K, _N, _R, _PROBES = 7, 19, (11, 5), (3, 2), 2
_SCALE = [0.5, 2.0]


def self_tests() -> Iterator[dict[str, Any]]:
    """Verdicts: right, wrong, or not here with the reason; outputs, gradients and statistics of each operator."""
    for name, backend in BACKENDS.items():
        for device in ("cpu", *(("cuda",) if torch.cuda.is_available() else ())):
            for dtype in DTYPES:
                found = {"backend": name, "device": device, "dtype": str(dtype).removeprefix("torch.")}
                reason = backend.unsupported_reason(torch.device(device), dtype)
                for operator, run in OPERATORS.items():
                    yield {"operator": operator, **found, **_verdict(run, name, torch.device(device), dtype, reason)}


def _verdict(
    run: Callable, backend: str, device: torch.device, dtype: torch.dtype, reason: str | None
) -> dict[str, Any]:
    if reason is not None:
        return {"verdict": "not here", "reason": reason}
    try:
        return _compared(run, backend, device, dtype)
    except Exception as error:  # whatever a broken build raises is what this is asked about
        return {"verdict": "wrong", "reason": f"{type(error).__name__}: {error}"}


def _compared(run: Callable, backend: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Largest error against float64 over the largest value, and what the formula itself has in this dtype."""
    operands = _operands(device, dtype)
    mine = run(backend, operands)
    if mine is None:
        return {"verdict": "not here", "reason": "this operator is another backend's"}
    exact, formula = run("reference", [t.double() for t in operands]), run("reference", operands)
    worst, allowed = 0.0, 0.0
    for own, plain, true in zip(mine, formula, exact, strict=True):
        scale = true.abs().max().clamp(min=1e-30)
        worst = max(worst, float((own.double() - true).abs().max() / scale))
        allowed = max(allowed, float((plain.double() - true).abs().max() / scale))
    # The operands are rounded once; sums of this length may be taken in another order.
    allowed = 4 * allowed + 2 * torch.finfo(dtype).eps
    return {"verdict": "right" if worst <= allowed else "wrong", "error": worst, "allowed": allowed}


def _operands(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """x, two weights, A and B of each, and the gradients of the outputs."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(_M, _K), *((n, _K) for n in _N), *((r, _K) for r in _R), *zip(_N, _R, strict=True)]
    made = [torch.randn(shape, generator=generator) for shape in (*shapes, *((_M, n) for n in _N))]
    return [t.to(device, dtype) for t in made]


def _split(operands: list[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    x, *rest = [t.detach().clone() for t in operands]
    return x, rest[:2], rest[2:4], rest[4:6], rest[6:]


def _probes(x: Tensor, sets: int) -> tuple[list[Tensor], list[Tensor]]:
    """Leaves and probe rows of as many adapters."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    leaves = [torch.zeros(n, _PROBES, dtype=acc, device=x.device, requires_grad=True) for _ in range(sets) for n in _N]
    P = torch.ones(_PROBES, _K, dtype=acc, device=x.device)
    P[1, ::2] = -1.0
    return leaves, [P] * sets


def _linear(backend: str, operands: list[Tensor]) -> list[Tensor]:
    """[y, dx, dA, dB, Q] of a group of two projections."""
    x, weights, A, B, dy = _split(operands)
    Z, P = _probes(x, 1)
    leaves = [t.requires_grad_() for t in (x, *A, *B)]
    y = lora_linear(x, weights, [None, None], A, B, _SCALE, Z=Z, P=P[0], backend=backend)
    torch.autograd.backward(y, dy)
    return [*(t.detach() for t in y), *(t.grad for t in (*leaves, *Z))]


def _grouped(backend: str, operands: list[Tensor]) -> list[Tensor]:
    """The same with two adapters, and rows that have none."""
    x, weights, A, B, dy = _split(operands)
    A, B = A + [a[:1] * 0.5 for a in A], B + [b[:, :1] * 2 for b in B]
    Z, P = _probes(x, 2)
    leaves = [t.detach().requires_grad_() for t in (x, *A, *B)]
    batch = Batch(("a", "b"), torch.tensor([0, 1, -1, 0, 1, 1, 0]))
    y = lora_grouped(
        leaves[0], weights, [None, None], leaves[1:5], leaves[5:], _SCALE * 2, batch, Z=Z, P=P, backend=backend
    )
    torch.autograd.backward(y, dy)
    return [*(t.detach() for t in y), *(t.grad for t in (*leaves, *Z))]


def _gradstat(backend: str, operands: list[Tensor]) -> list[Tensor]:
    """Squares and absolute values of dyᵀx of two runs of rows: the exact statistics."""
    x, _, _, _, dy = _split(operands)
    return [BACKENDS[backend].gradstat(x, torch.cat(dy, dim=1), [0, 3, _M])]


def _penalty(backend: str, operands: list[Tensor]) -> list[Tensor] | None:
    """FW-LoRA's penalty of two matrices and its gradients: one launch of the native library, or the formula."""
    if backend not in ("native", "reference"):
        return None
    _, _, A, B, _ = _split(operands)
    leaves = [t.requires_grad_() for t in (*A, *B)]
    weights = torch.tensor([0.25, 0.75], device=A[0].device)
    value = (multi_tensor.penalty if backend == "native" else weighted_penalty)(A, B, _SCALE, weights, 0.1)
    value.backward()
    return [value.detach(), *(t.grad for t in leaves)]


OPERATORS: dict[str, Callable[[str, list[Tensor]], list[Tensor] | None]] = {
    "lora_linear": _linear,
    "lora_grouped": _grouped,
    "gradstat": _gradstat,
    "penalty": _penalty,
}
