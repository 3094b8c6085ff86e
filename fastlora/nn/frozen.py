"""``FrozenLinear``: a frozen ``nn.Linear`` on the matmul engine that is fastest for its shape on this CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import frozen_op  # noqa: F401  the import registers the operator
from ..engines import AUTO, ENGINES


class FrozenLinear(nn.Linear):
    r"""``y = x W^\top + b`` without gradients for W and b; the plain path once either asks for one, or off the CPU.

    Made by ``inject(..., accelerate_frozen=True)`` out of ``nn.Linear`` by a change of class.
    """

    engine: str = AUTO

    def forward(self, x: Tensor) -> Tensor:
        trained = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        if trained or x.device.type != "cpu":
            return super().forward(x)
        if not torch.compiler.is_compiling() and ENGINES.settled_on_linear(
            x.shape[:-1].numel(), self.weight, self.engine
        ):
            return super().forward(x)
        return torch.ops.fastlora.frozen_linear(x, self.weight, self.bias, self.engine)
