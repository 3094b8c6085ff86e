"""A model as it was: what a pass over data may change in it, put back."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .nn.linear import DEFAULT, adapted_layers, check_adapter


@contextmanager
def restored(model: nn.Module, adapter: str = DEFAULT) -> Iterator[None]:
    """Gradients, requires_grad, buffers, modes and RNG states after the block are those from before it.

    Inside, gradients start empty, grad mode is on, and the adapter's factors require gradients, so that passes reach
    them although a schedule may hold them frozen. Parameters themselves are not copied: the block must not step an
    optimiser. RNG: torch's (CPU and the model's CUDA devices), Python's, and NumPy's where it is loaded.

    Raises ``ValueError`` for a model without adapters.
    """
    layers = adapted_layers(model) if isinstance(model, nn.Module) else {}
    if not layers:
        raise ValueError("model: has no adapters; call fastlora.inject first")
    check_adapter(adapter)
    parameters = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    # By name too: a forward may assign a new tensor instead of writing into the old one.
    buffers = [
        (m, n, b, None if b is None else b.detach().clone()) for m in model.modules() for n, b in m._buffers.items()
    ]
    modes = [(m, m.training) for m in model.modules()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    put_back = _python_generators()
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        try:
            for p, _, _ in parameters:
                p.grad = None
            for layer in layers.values():
                if adapter in layer.adapter_specs:
                    layer.lora_A[adapter].requires_grad_(True)
                    layer.lora_B[adapter].requires_grad_(True)
            yield
        finally:

            def restore() -> None:
                for p, grad, needs in parameters:
                    p.grad = grad
                    p.requires_grad_(needs)
                with torch.no_grad():
                    for module, name, buffer, value in buffers:
                        module._buffers[name] = buffer
                        if buffer is not None:
                            buffer.copy_(value)
                for module, training in modes:
                    module.training = training
                put_back()

            uninterrupted(restore)


def uninterrupted(work: Callable[[], None]) -> None:
    """Call ``work``, which may begin anew at any point, to its end: Ctrl-C meanwhile is passed on afterwards."""
    try:
        work()
    except KeyboardInterrupt:
        work()
        raise


def _python_generators() -> Callable[[], None]:
    state, numpy = random.getstate(), sys.modules.get("numpy")
    numpy_state = None if numpy is None else numpy.random.get_state()

    def put_back() -> None:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)

    return put_back
