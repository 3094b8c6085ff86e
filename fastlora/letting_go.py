"""Parameters that stand still for some steps, also in compiled models."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch


def set_learning(parameters: Iterable[torch.Tensor], learns: bool) -> None:
    """``requires_grad_`` that compiled models notice.

    torch 2.11 goes on with code that was compiled for what had gradients before (pytorch issue 139476): parameters that
    are let go would get none. There everything that was compiled is dropped; 2.13 compiles again by itself.
    """
    changed = [p for p in parameters if p.requires_grad is not learns]
    for parameter in changed:
        parameter.requires_grad_(learns)
    if changed and torch.__version__ < (2, 13) and "torch._dynamo" in sys.modules:
        torch.compiler.reset()
