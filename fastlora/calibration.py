"""Scores from a few backward passes, with the model left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .nn.linear import adapted_layers
from .scores import Scores, composite
from .tracker import Tracker, track


def _fc(tracker: Tracker) -> Scores:
    parts = tracker.scores("grad_sq", reduce="mean"), tracker.scores("grad_abs"), tracker.scores("act_var")
    return composite(*parts)


def _fw(tracker: Tracker) -> Scores:
    return tracker.scores("grad_sq")


# method -> (statistics to take, scores from the tracker)
METHODS: dict[str, tuple[tuple[str, ...], Callable[[Tracker], Scores]]] = {
    "fc": (("grad_sq", "grad_abs", "act_var"), _fc),
    "fw": (("grad_sq",), _fw),
}


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    steps: int = 8,
    method: str | Callable[[Tracker], Scores] = "fc",
) -> Scores:
    """Exact statistics over ``steps`` backward passes, combined into one score a matrix.

    ``"fc"``: ``0.6 z(grad_sq / NK) + 0.2 z(grad_abs) + 0.2 z(act_var)`` (FC-LoRA); ``"fw"``: mean ``grad_sq``; a
    callable gets the tracker, which holds grad_sq, fisher, grad_abs and act_var.

    ``loss_fn(model, batch)`` returns a scalar loss. Gradients, buffers, modes and the RNG state are put back.
    Raises ``ValueError`` naming the argument: no batch, a loss that is not a finite scalar or has no gradient.
    """
    if not callable(method) and method not in METHODS:
        raise ValueError(f"method: expected one of {tuple(METHODS)} or a callable, got {method!r}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps: expected a positive integer, got {steps!r}")
    kinds, score = (("grad_sq", "fisher", "grad_abs", "act_var"), method) if callable(method) else METHODS[method]
    with _restored(model), track(model, "exact", ema=None, statistics=kinds) as tracker:
        done = 0
        for batch in batches:
            loss = loss_fn(model, batch)
            _check_loss(loss, done)
            loss.backward()
            tracker.step()
            done += 1
            if done == steps:
                break
        if done == 0:
            raise ValueError("batches: yielded nothing, at least one batch is needed")
        if tracker.skipped == done:
            raise ValueError("batches: every backward pass gave gradients that are not finite")
        return score(tracker)


def _check_loss(loss: Any, index: int) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(f"loss_fn: expected a scalar tensor, got {type(loss).__name__} for batch {index}")
    if not loss.requires_grad:
        raise ValueError(
            f"loss_fn: the loss of batch {index} has no gradient; it must come from the model in grad mode"
        )
    if not bool(loss.isfinite()):
        raise ValueError(f"loss_fn: the loss of batch {index} is {loss.item()}")


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Gradients, buffers, requires_grad, modes and RNG state before equal those after."""
    if not adapted_layers(model):
        raise ValueError("model: has no adapters; call fastlora.inject first")
    grads = [(p, p.grad) for p in model.parameters()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    modes = [(m, m.training) for m in model.modules()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        try:
            for p, _ in grads:
                p.grad = None
            yield
        finally:
            for p, grad in grads:
                p.grad = grad
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            for module, training in modes:
                module.training = training
