"""The only door to torch's private names, each with what it falls back to."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))

without_graph = torch._C._AutoDispatchBelowAutograd
# Neither views nor versions are tracked: what a kernel that is called directly makes and changes is new.
untracked = torch._C._AutoDispatchBelowADInplaceOrView


def autocasting(x: Tensor) -> bool:
    """Whether autocast is on where a tensor is; torch knows none for tensors without storage."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def nothing_watches() -> bool:
    """Whether no mode, transform, tracer or compiler sees what the dispatcher is called for."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
    )


def can_skip_dispatcher(tensors: Sequence[Tensor | None]) -> bool:
    """Whether nothing watches the dispatcher and no tensor is a subclass, so that a kernel may be called without it.

    On a small layer going through the dispatcher to a kernel written in Python costs more than the kernel.
    """
    return nothing_watches() and _PLAIN.issuperset(map(type, tensors))


def apply_directly(function: type[torch.autograd.Function]) -> Any:
    """``function.apply`` without its search for dead functorch wrappers, which ``nothing_watches`` rules out."""
    return super(torch.autograd.Function, function).apply


def in_backward() -> bool:
    """Whether the autograd engine is running: there, a forward is a recomputation under activation checkpointing."""
    return torch._C._current_graph_task_id() != -1


def in_reentrant_checkpoint() -> bool:
    """Whether a caller is the forward of a reentrant checkpoint, which runs without gradients and is repeated."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            return True
        frame = frame.f_back
    return False


def saving_hooks() -> Any:
    """The innermost hooks on saved tensors: those of non-reentrant checkpointing among them."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def checkpoint_frame(hooks: Any) -> Any:
    """What identifies one non-reentrant checkpoint, from its hooks in the forward and in the recomputation alike."""
    pack = getattr(hooks[0], "_torchdynamo_orig_callable", hooks[0])
    for cell in getattr(pack, "__closure__", None) or ():
        held = cell.cell_contents
        held = held() if isinstance(held, weakref.ref) else held
        if type(held).__name__ == "_CheckpointFrame":
            return held
    return None


def set_requires_grad(parameters: Iterable[torch.Tensor], learns: bool) -> None:
    """``requires_grad_`` that compiled models notice.

    torch 2.11 goes on with code that was compiled for what had gradients before (pytorch issue 139476): parameters that
    are let go would get none. There everything that was compiled is dropped; 2.13 compiles again by itself.
    """
    changed = [p for p in parameters if p.requires_grad is not learns]
    for parameter in changed:
        parameter.requires_grad_(learns)
    if changed and torch.__version__ < (2, 13) and "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _foreach(name: str, single: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    """``torch._foreach_<name>``, one launch over a list; where torch has none, ``single`` of one after another."""

    def one_by_one(tensors: Sequence[Tensor], others: Any) -> list[Tensor]:
        listed = others if isinstance(others, (list, tuple)) else [others] * len(tensors)
        return [single(tensor, other) for tensor, other in zip(tensors, listed, strict=True)]

    return getattr(torch, f"_foreach_{name}", one_by_one)


# Of a list of tensors and a list of as many others, or one number or tensor for all.
multiply_each = _foreach("mul", torch.mul)
divide_each = _foreach("div", torch.div)
subtract_each = _foreach("sub", torch.sub)
add_to_each_ = _foreach("add_", Tensor.add_)
norm_of_each = _foreach("norm", torch.linalg.vector_norm)
