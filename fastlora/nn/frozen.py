"""Linears without adapters whose products the CPU's engines compute, too."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._utils.torch_compat import wants_plain_operators
from ..ops.flops import tell_counters
from ..ops.matmul import AUTO, ENGINES


class FrozenLinear(nn.Linear):
    r"""``y = x W^\top + b`` without gradients for W and b; the plain path once either asks for one, or off the CPU.

    ``x`` [..., K], ``weight`` [N, K], y [..., N]. Made by ``inject(..., accelerate_frozen=True)`` out of ``nn.Linear``
    by a change of class; arguments and errors (``RuntimeError`` for shapes that do not fit) are ``nn.Linear``'s.

    >>> layer = fastlora.nn.FrozenLinear(8, 6).requires_grad_(False)
    >>> layer(torch.ones(4, 8)).shape
    torch.Size([4, 6])
    """

    engine: str = AUTO

    def forward(self, input: Tensor) -> Tensor:
        trained = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        if trained or input.device.type != "cpu":
            return super().forward(input)
        if not torch.compiler.is_compiling() and ENGINES.settled_on_linear(
            input.shape[:-1].numel(), self.weight, self.engine
        ):
            return super().forward(input)
        if wants_plain_operators():
            return super().forward(input)
        tell_counters()
        return torch.ops.fastlora.frozen_linear(input, self.weight, self.bias, self.engine)
