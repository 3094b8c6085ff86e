"""What is asked of a family in other ways to run it: recomputation of blocks, compiled code."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from fastlora.nn.linear import adapted_layers

from . import checks


def check_checkpointing(base: nn.Module, run: checks.Run, role: str) -> str:
    """Gradients with every block recomputed in the backward; ``checks.NONE`` where the library recomputes nothing."""
    model = checks.adapted(base, role)
    loss = checks.loss_of(run(model))
    if not loss.requires_grad:
        return checks.NONE
    loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    if not _recomputes(model):
        return checks.NONE
    plain = copy.deepcopy(base).requires_grad_(False)
    _recomputes(plain)
    try:
        run(plain)
    except Exception as error:  # noqa: BLE001 - the library's own
        return f"the model itself fails: {' '.join(str(error).split())[:90]}"
    calls, handles = [0], []
    for path in adapted_layers(model):
        owner = checks.at(model, path.rpartition(".")[0])
        handles.append(owner.register_forward_pre_hook(lambda module, args: calls.__setitem__(0, calls[0] + 1)))
    loss = checks.loss_of(run(model))
    before = calls[0]
    loss.backward()
    if calls[0] == before:
        return checks.NONE
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys(), f"gradients of {sorted(found.keys() ^ wanted.keys())[:2]}"
    largest = max(float(grad.abs().max()) for grad in wanted.values())
    for name, grad in found.items():
        # Some models round to float32 inside, and not alike in a recomputation. Beside the largest, 1e-15 is zero.
        close = dict(rtol=1e-5, atol=1e-6 * float(wanted[name].abs().max()) + 1e-15 * largest)
        torch.testing.assert_close(grad, wanted[name], **close, msg=f"{name}: gradient")
    return checks.OK


def _recomputes(model: nn.Module) -> bool:
    """Switch recomputation on without the randomness of training."""
    for switch in ("gradient_checkpointing_enable", "set_grad_checkpointing", "enable_gradient_checkpointing"):
        method = getattr(model, switch, None)
        if callable(method):
            try:
                method()
            except (ValueError, AssertionError, TypeError, AttributeError, NotImplementedError):
                return False
            for module in model.modules():
                if getattr(module, "gradient_checkpointing", False):
                    module.training = True
            return True
    return False


def check_compile(base: nn.Module, run: checks.Run, role: str) -> str:
    """Outputs and gradients of the compiled model, operators not yet made into kernels (``aot_eager``)."""
    model = checks.adapted(base, role)
    expected = run(model)
    checks.loss_of(expected).backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    try:
        out = _compiled_pass(model, run)
    except RuntimeError as error:
        try:
            _compiled_pass(copy.deepcopy(base), run)
        except RuntimeError:
            return f"nor does the base alone compile: {checks.short(str(error))}"
        raise
    checks.same(out, expected, "outputs")
    apart = 0.0
    for name, p in model.named_parameters():
        if p.grad is not None:
            exact = wanted.get(name, torch.zeros_like(p))  # compiled code gives zeros for an absent expert
            if not torch.allclose(p.grad, exact, rtol=1e-6, atol=1e-10):
                error = float((p.grad - exact).abs().max() / (exact.abs().max() + 1e-300))
                assert error < 1e-5 and checks.computes_in_float32(base, run), f"{name}: gradient"
                apart = max(apart, error)
    return f"gradients agree to {apart:.0e}: the model itself computes in float32 inside" if apart else checks.OK


def _compiled_pass(model: nn.Module, run: checks.Run) -> Any:
    """Outputs of a compiled pass whose backward has run."""
    torch._dynamo.reset()
    out = run(torch.compile(model, backend="aot_eager"))
    checks.loss_of(out).backward()
    return out
