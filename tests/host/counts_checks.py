"""What is checked of the counts of one call, in a process of its own."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import torch
from child import run
from torch import nn

import fastlora
from benchmarks.harness import peers
from benchmarks.harness.shapes import ANCHORS, Problem
from benchmarks.host import cases
from benchmarks.host.counts import counts, frames
from benchmarks.host.null_gpu import NAME
from fastlora.ops import native


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


# Of a forward and backward of q, k, v: Python functions of fastlora entered, at most; then exactly the calls of the
# dispatcher, allocations, launches of Triton kernels, products by the library and other kernels.
PINNED_GPU = {
    "fastlora": (40, 20, 13, 5, 0, 0),
    "probes": (44, 23, 16, 5, 0, 0),
    "act_var": (44, 27, 20, 6, 0, 0),
    "dropout": (46, 23, 14, 7, 0, 1),
    "four_adapters": (49, 46, 13, 6, 6, 6),
}
# The same without what a GPU does.
PINNED_CPU = {
    "fastlora": (43, 33, 11),
    "probes": (47, 33, 14),
    "act_var": (47, 33, 20),
    "dropout": (47, 36, 12),
}


def counted(variant, gpu=None):
    """Python functions of fastlora entered, torch's own differ from one version to the next, and all counts of a call.

    The call is one of many training steps: statistics and gradients of the step before are gone.
    """
    for _ in range(3):
        variant.forget()
        variant.call()
    if variant.tracker is not None:
        variant.tracker.step()
    own = f"{Path(fastlora.__file__).parent}/"
    entered = frames(variant.call, gpu, variant.forget)
    found = sum(count for name, count in entered.items() if name.startswith(own))
    return found, counts(variant.call, gpu, variant.forget)


def statistics_of_two_calls_do_not_add_up(gpu):
    """Else two kernels more a leaf would be counted, which a training step does not have."""
    with torch.device(gpu.device):
        variant = peers.ours(Problem(ANCHORS["A2"], torch.bfloat16), "probes", peers.TRACKED["probes"])
    added = counts(variant.call, gpu).gpu.kernels
    assert (counts(variant.call, gpu, variant.forget).gpu.kernels, added) == (0, 3)


def pinned(found, expected):
    for name, (most, *exactly) in expected.items():
        assert found[name][0] <= most, (name, found[name], expected[name])
        assert list(found[name][1:]) == exactly, (name, found[name], expected[name])
    assert found.keys() == expected.keys()


def of_a_group(problem):
    tracked = [peers.ours(problem, name, statistics) for name, statistics in peers.TRACKED.items()]
    return [peers.ours(problem), *tracked, cases.with_dropout(problem)]


def steps_of_a_group_on_a_gpu_are_pinned(gpu):
    with torch.device(gpu.device):
        problem = Problem(ANCHORS["A2"], torch.bfloat16)
        variants = [*of_a_group(problem), cases.batch(problem)]
    found = {}
    for variant in variants:
        own, seen = counted(variant, gpu)
        events = seen.gpu
        assert (events.to_host, events.to_device, events.synchronizes, events.fallbacks) == (0, 0, 0, 0), seen
        of_gpu = events.allocations, events.launches, events.gemms, events.kernels
        found[variant.name] = own, seen.dispatcher, *of_gpu
    pinned(found, PINNED_GPU)


def variances_of_a_step_are_one_kernel(gpu):
    """Where the library has CUDA: beside it norms of the probes, one product, the next step's signs, and what folds the
    sample in: its maximum, whether that is finite, the steps, how far the means are off, where, how far they move, and
    the two of a step that is left out; with two statistics what puts them together is the other one more.
    """
    found = {}
    there = native._KERNELS | {(name, NAME) for name in ("output_variances", "squared_norms", "philox_signs_")}
    with torch.device(gpu.device), mock.patch.object(native, "_KERNELS", there):
        for name in ("probes", "act_var"):
            variant = peers.ours(Problem(ANCHORS["A2"], torch.bfloat16), name, peers.TRACKED[name])
            variant.call()
            found[name] = gpu.count(variant.tracker.step).kernels
    assert found == {"probes": 12, "act_var": 14}, found


def steps_of_a_group_on_the_cpu_are_pinned(gpu):
    found = {}
    with mock.patch.dict(os.environ, FASTLORA_CPU_ENGINE="linear"):  # else the fastest multiplies, which time tells
        for variant in of_a_group(Problem(cases.TINY, torch.float32)):
            own, seen = counted(variant)
            found[variant.name] = own, seen.dispatcher, seen.allocations
    pinned(found, PINNED_CPU)


CHECKS = (
    frames_are_the_functions_entered, frames_of_a_backward_count, dispatcher_calls_and_allocations_are_counted,
    steps_of_a_layer_count_the_same, steps_of_a_group_on_a_gpu_are_pinned, steps_of_a_group_on_the_cpu_are_pinned,
    modules_are_as_torch_has_them, variances_of_a_step_are_one_kernel, statistics_of_two_calls_do_not_add_up,
)  # fmt: skip

if __name__ == "__main__":
    run(CHECKS)
