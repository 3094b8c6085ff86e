"""What is checked of steps inside the capture of a CUDA graph, in a process of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from child import run

import fastlora
from benchmarks.harness import peers
from benchmarks.harness.shapes import ANCHORS, Problem
from benchmarks.host import cases


def refused(call: Callable[[], object], *words: str) -> None:
    try:
        call()
    except RuntimeError as error:
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError("nothing was refused")


def made(gpu, statistics=(), **options):
    with torch.device(gpu.device):
        return peers.ours(Problem(ANCHORS["A2"], torch.bfloat16), "fastlora", statistics, **options)


def tracked_layers_are_refused_in_a_capture(gpu):
    """A graph replays the probes of one step and the sums of one backward, whichever estimator takes them."""
    options = ({}, {"estimator": "exact"}, {"probe_kind": "columns"})
    for statistics, given in [(("act_var",), {}), *[(("grad_sq",), found) for found in options]]:
        variant = made(gpu, statistics, **given)
        for _ in range(2):  # the second takes what the first kept
            variant.forget()
            variant.call()
        with gpu.capturing():
            refused(variant.call, "track: expected no capture", "close()")
            refused(lambda layer=variant.model.attn.q, x=variant.x: layer(x), "track: expected no capture")
            with torch.no_grad():
                variant.model(variant.x)
        variant.forget()
        variant.call()
        variant.tracker.step()
        assert variant.tracker.steps == 1
        variant.tracker.close()
        with gpu.capturing():
            variant.call()


def tracker_step_is_refused_in_a_capture(gpu):
    variant = made(gpu, ("grad_sq",))
    tracker = variant.tracker
    variant.call()
    leaves = [leaf for layer in tracker.layers.values() for leaf in layer.probes["default"].Z.values()]
    with gpu.capturing():
        refused(tracker.step, "track: expected no capture")
        assert tracker.steps == 0 and all(leaf.grad is not None for leaf in leaves)
    tracker.step()
    assert tracker.steps == 1 and all(leaf.grad is None for leaf in leaves)
    tracker.close()
    with gpu.capturing():
        tracker.step()


def a_captured_step_copies_nothing(gpu):
    variant = made(gpu)
    for _ in range(3):
        variant.call()
    with gpu.capturing():
        found = gpu.count(variant.call)
    assert (found.to_device, found.to_host, found.synchronizes, found.fallbacks) == (0, 0, 0, 0), found
    assert found.launches >= 4, found


def tables_of_adapters_are_not_made_in_a_capture(gpu):
    with torch.device(gpu.device):
        batch = cases.batch(Problem(ANCHORS["A2"], torch.bfloat16))
    batch.call()
    fastlora.set_ranks(batch.model, {f"attn.{name}": 3 for name in batch.model.attn.names}, adapter="a1")
    with gpu.capturing():
        refused(batch.call, "adapters: expected", "before the capture")
    for _ in range(3):
        batch.call()
    with gpu.capturing():
        found = gpu.count(batch.call)
    assert (found.to_device, found.to_host, found.fallbacks) == (0, 0, 0) and found.launches >= 4, found


def probes_cast_no_factor(gpu):
    """A and P are read in one dtype: nothing but our kernels runs."""
    with torch.device(gpu.device):
        problem = Problem(ANCHORS["A2"], torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = peers.Model(problem).to(gpu.device)
        config = fastlora.LoraConfig(r=8, lora_alpha=16, target_modules="qkv", adapter_dtype=dtype)
        fastlora.inject(model, config)
        step = cases.Step("fastlora", model, problem.x.clone().requires_grad_(), problem.split(problem.dy, dim=2))
        step.call()
        model(step.x)
        with fastlora.track(model, every=1) as tracker:
            for _ in range(3):
                step.call()
                tracker.step()
            found = gpu.count(step.call)
            assert (found.launches, found.kernels, found.to_device) == (5, 0, 0), (dtype, found)


def probes_of_one_adapter_of_several_cast_no_factor(gpu):
    """What a batch runs besides our kernels is the same in both dtypes."""
    found = {}
    with torch.device(gpu.device):
        problem = Problem(ANCHORS["A2"], torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        model = peers.Model(problem).to(gpu.device)
        config = fastlora.LoraConfig(r=8, lora_alpha=16, target_modules="qkv", adapter_dtype=dtype)
        fastlora.inject(model, config)
        fastlora.add_adapter(model, "other", config)
        ids = torch.arange(problem.shape.batch) % 2
        x, dy = problem.x.clone().requires_grad_(), problem.split(problem.dy, dim=2)
        with fastlora.use_adapters(model, ids), fastlora.track(model, every=1, adapter="default") as tracker:
            for _ in range(3):
                torch.autograd.backward(model(x), dy)
                x.grad = None
                model.zero_grad()
                tracker.step()
            seen = gpu.count(lambda x=x, dy=dy, model=model: torch.autograd.backward(model(x), dy))
            tracker.step()
        found[dtype] = seen.launches, seen.gemms, seen.kernels
    assert found[torch.float32] == found[torch.bfloat16] and found[torch.float32][0] >= 4, found


CHECKS = (
    tracked_layers_are_refused_in_a_capture, tracker_step_is_refused_in_a_capture, a_captured_step_copies_nothing,
    tables_of_adapters_are_not_made_in_a_capture, probes_cast_no_factor,
    probes_of_one_adapter_of_several_cast_no_factor,
)  # fmt: skip

if __name__ == "__main__":
    run(CHECKS)
