"""FIM-LoRA's statistic: the mean squared gradient of B, at B = 0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .nn.linear import DEFAULT, matrix_key
from .parallel import ranks_of, unwrapped, whole
from .reduction import averaged
from .scores import Scores
from .tracking_checks import checked_layers


class UpdateVariance:
    r"""``lora_b_var`` of each matrix: mean over the entries of B [N, r] of the mean over passes of dB².

    .. math:: \frac{1}{N r} \sum_{ij} \Big( \overline{dB_{ij}^2} - \big(\overline{dB_{ij}}\big)^2 \Big)

    with bars for means over passes and the last term with ``centred`` only. dB carries the scale s. At B = 0 dA is 0
    and dB is not, so B alone is read: N r numbers where the weight's own gradient has N K. A pass with a gradient that
    is not finite is left out. dB is averaged over the ranks of ``process_group`` before it is squared.

    Raises ``ValueError`` for a model without adapters or whose B is not zero.
    """

    def __init__(self, model: nn.Module, adapter: str = DEFAULT, centred: bool = False, process_group: Any = None):
        self._ranks, model = ranks_of(model, process_group), unwrapped(model)
        layers = checked_layers(model, adapter)
        self._centred = centred
        self._matrices: dict[str, nn.Parameter] = {}
        self._costs: dict[str, int] = {}
        for path, layer in layers.items():
            for name, B in layer.lora_B[adapter]._parameters.items():
                if B is None:
                    continue
                key = matrix_key(path, name)
                if bool(B.detach().any()):
                    raise ValueError(f"model: B of {key!r} is not zero; 'fim' scores an adapter before its training")
                self._matrices[key] = B
                self._costs[key] = layer.slices[name] + layer.in_features
        device = next(iter(layers.values())).weight.device
        self._squares = torch.zeros(len(self._matrices), dtype=torch.float64, device=device)
        self._counts = torch.zeros_like(self._squares)
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._sums: dict[str, Tensor] = {}

    def __enter__(self) -> UpdateVariance:
        return self

    def __exit__(self, *exc: object) -> None:
        self._sums.clear()

    @torch.no_grad()
    def step(self) -> None:
        """Take in the gradients of one backward pass and clear them."""
        taken = {key: whole(B.grad) for key, B in self._matrices.items() if B.grad is not None}
        if self._ranks is not None:
            shapes = {key: B.shape for key, B in self._matrices.items()}
            taken = averaged(taken, shapes, self._ranks, self._squares.device)
        device = self._squares.device
        squares = {key: grad.double().square().mean().to(device) for key, grad in taken.items()}
        finite = (
            torch.stack(list(squares.values())).isfinite().all()
            if squares
            else self._counts.new_ones((), dtype=torch.bool)
        )
        zero = self._squares.new_zeros(())
        self._squares += torch.where(finite, torch.stack([squares.get(key, zero) for key in self._matrices]), 0.0)
        self._counts += finite * torch.tensor([key in taken for key in self._matrices], device=device)
        self._skipped += ~finite
        for key, grad in taken.items():
            if self._centred:
                kept = torch.where(finite.to(grad.device), grad.double(), 0.0)
                self._sums[key] = kept + self._sums.get(key, 0.0)
        for B in self._matrices.values():
            B.grad = None

    @property
    def skipped(self) -> int:
        """Passes left out because a gradient was not finite (reads back from the device)."""
        return int(self._skipped)

    def scores(self) -> Scores:
        """The statistic by matrix key; ``RuntimeError`` while a matrix has none."""
        counts = self._counts.tolist()
        missing = [key for key, count in zip(self._matrices, counts, strict=True) if count == 0]
        if missing or not counts:
            shown = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "") or "any matrix: every rank is 0"
            raise RuntimeError(f"no lora_b_var yet for {shown}")
        if self._centred and min(counts) < 2:
            raise RuntimeError("no centred lora_b_var yet: it takes two passes or more")
        values = (self._squares / self._counts).tolist()
        if self._centred:
            means = [
                (self._sums[key] / count).square().mean() for key, count in zip(self._matrices, counts, strict=True)
            ]
            values = [max(v - float(m), 0.0) for v, m in zip(values, means, strict=True)]
        return Scores(dict(zip(self._matrices, values, strict=True)), "lora_b_var", costs=self._costs)
