"""What the operators count as under ``torch.utils.flop_counter``: two for a multiplication and an addition."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .._utils.torch_compat import active_modes
from .layout import GroupLayout, picks_columns

_NONE = "none"  # the engine of ``matmul.NONE``: somebody else multiplies, and is counted there


def tell_counters() -> None:
    """Give the FLOP counters that are on our formulas; called where a mode may watch.

    A counter copies torch's table when it is made, and importing that table imports Triton.
    """
    for mode in active_modes():
        table = getattr(getattr(mode, "counter", mode), "flop_registry", None)
        if isinstance(table, dict):
            table.update({getattr(torch.ops.fastlora, name): formula for name, formula in _FORMULAS.items()})


def _largest(sizes: Sequence[int], projections: int) -> int:
    """The adapter with the most; of a mixed batch every row counts as one of it, since ids are not read back."""
    return max([sum(sizes[g : g + projections]) for g in range(0, len(sizes), projections)], default=0)


def _lora_linear(x, W, bias, A, B, Z, V, P, *rest, out_val=None) -> int:
    """``2 M (sum_j N_j K + sum_i r_i (K + N_i))``, and ``2 M K k`` for k rows of P."""
    base = 0 if rest[-1] == _NONE else sum(w.numel() for w in W)
    update = _largest([a.numel() + b.numel() for a, b in zip(A, B, strict=True)], GroupLayout(W, B).projections)
    return (
        2 * x.shape[:-1].numel() * (base + update + max([0 if picks_columns(p) else p.numel() for p in P], default=0))
    )


def _lora_linear_backward(dy, x, h, W, A, B, probes, *rest, out_val=None) -> int:
    """``2 M sum_j N_j K`` for dx and for dW, ``2 M N r`` for dy B and for dB, ``2 M r K`` for dx and for dA and
    ``2 M N k`` for Q, of the outputs that have a gradient."""
    (dx, dA, dB, dZ, dW, _), engine = rest[-3], rest[-1]
    live = sum(w.numel() for w, g in zip(W, dy, strict=True) if g is not None)
    layout, k = GroupLayout(W, B), max(probes, default=0)
    there = [dy[j] is not None for j in layout.of(0).outputs] * (len(A) // layout.projections)
    each = [
        a.numel() * (dx + dA) + b.numel() * (dB + (dx or dA)) + b.shape[0] * k * dZ if seen else 0
        for a, b, seen in zip(A, B, there, strict=True)
    ]
    total = live * (dW + (dx and engine != _NONE)) + _largest(each, layout.projections)
    return 2 * x.shape[:-1].numel() * total


def _frozen_linear(x, W, bias, engine, out_val=None) -> int:
    return 0 if engine == _NONE else 2 * x.shape[:-1].numel() * W.numel()


def _frozen_linear_backward(dy, W, engine, out_val=None) -> int:
    return _frozen_linear(dy, W, None, engine)


_FORMULAS = {
    "lora_linear": _lora_linear,
    "lora_linear_backward": _lora_linear_backward,
    "frozen_linear": _frozen_linear,
    "frozen_linear_backward": _frozen_linear_backward,
}
