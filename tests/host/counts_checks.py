"""What is checked of the counts of one call, in a process of its own."""

from __future__ import annotations

import torch
from child import run
from torch import nn

import fastlora
from benchmarks.host.counts import counts, frames


def one():
    return 1


def three():
    return [one() for _ in range(2)]


def frames_are_the_functions_entered(gpu):
    assert (counts(one).frames, counts(three).frames) == (1, 3)
    found = counts(lambda: (three(), len("abc"), abs(-1)))
    assert (found.frames, found.c_functions) == (4, 2), found
    assert frames(three) == {f"{__file__}:three": 1, f"{__file__}:one": 2}


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, dy):
        return (dy * [one(), three()][0],)


def frames_of_a_backward_count(gpu):
    """A GPU's backward runs in another thread, where nothing watches by itself."""

    def step(device):
        x = torch.ones(4, device=device, requires_grad=True)
        dy = torch.ones(4, device=device)
        return lambda: Scale.apply(x).backward(dy)

    here, there = frames(step("cpu")), frames(step(gpu.device), gpu)
    name = f"{__file__}:one"
    assert here[name] == there[name] == 3, (here, there)
    assert counts(step(gpu.device), gpu) == counts(step(gpu.device), gpu)


def dispatcher_calls_and_allocations_are_counted(gpu):
    a, b = torch.ones(8), torch.ones(8)
    found = counts(lambda: torch.add(a, b).mul_(a))
    assert found.operators == {"aten::add": 1, "aten::mul_": 1} and found.dispatcher == 2, found
    assert found.allocations == 1 and found.gpu is None, found
    x, w = (torch.ones(8, 8, device=gpu.device) for _ in range(2))
    found = counts(lambda: torch.mm(x, w).add_(x), gpu)
    assert found.allocations == 0 and found.gpu.allocations == 1, found
    assert (found.gpu.gemms, found.gpu.kernels, found.gpu.launches) == (1, 1, 0), found


def steps_of_a_layer_count_the_same(gpu):
    for device, watched in (("cpu", None), (gpu.device, gpu)):
        dtype = torch.float32 if watched is None else torch.bfloat16
        layer = fastlora.nn.Linear(64, 64, r=4, device=device, dtype=dtype)
        x = torch.ones(32, 64, device=device, dtype=dtype, requires_grad=True)
        dy = torch.ones(32, 64, device=device, dtype=dtype)

        def step(layer=layer, x=x, dy=dy):
            x.grad = None
            layer.zero_grad()
            torch.autograd.backward(layer(x), dy)

        for _ in range(2):
            step()  # what a GPU does is written down at the second call of its kind
        first, second = counts(step, watched), counts(step, watched)
        assert first == second and first.frames > 10 and first.dispatcher > 2, (first, second)
        assert (first.gpu is None) == (watched is None)
        if watched is not None:
            assert first.gpu.launches >= 4 and first.gpu.to_host == first.gpu.to_device == 0, first
        # A hook is two frames more: the test can fail.
        layer.register_forward_hook(lambda *_: [one()] and None)
        assert counts(step, watched).frames >= first.frames + 2


def modules_are_as_torch_has_them(gpu):
    """What the counts are compared with: three frozen layers are three products forward and three backward."""
    layers = [nn.Linear(64, 64, device=gpu.device).requires_grad_(False) for _ in range(3)]
    x = torch.ones(32, 64, device=gpu.device, requires_grad=True)
    dy = [torch.ones(32, 64, device=gpu.device) for _ in layers]
    found = counts(lambda: torch.autograd.backward([layer(x) for layer in layers], dy), gpu)
    assert found.gpu.gemms == 6 and found.gpu.launches == 0 and found.operators["aten::linear"] == 3, found


CHECKS = (
    frames_are_the_functions_entered, frames_of_a_backward_count, dispatcher_calls_and_allocations_are_counted,
    steps_of_a_layer_count_the_same, modules_are_as_torch_has_them,
)  # fmt: skip

if __name__ == "__main__":
    run(CHECKS)
