"""What a tracked call takes is kept from call to call, and is the right one after whatever may change it."""

import copy

import pytest
import torch
from support.node_help import inputs, model

import fastlora
from fastlora.ops import reference

NAMES = ("q_proj", "k_proj", "v_proj")


def leaves(tracker):
    return [layer.probes[tracker.adapter] for layer in tracker.layers.values()]


def backward(built, x):
    """dy of each output, and the outputs, after one forward and backward of squares."""
    for p in built.parameters():
        p.grad = None
    y = built(x)
    for out in y:
        out.retain_grad()
    sum(out.square().sum() for out in y).backward()
    return [out.grad.double().flatten(0, -2) for out in y], [out.detach().double().flatten(0, -2) for out in y]


def check(tracker, x, dy, y, calls=1, keep=None):
    """Q and the moments are those of ``calls`` such calls, in float64."""
    seen = x.detach().double().flatten(0, -2)
    for probe, grad, out in zip(leaves(tracker), dy, y, strict=True):
        if probe.Z:
            (Z,) = probe.Z.values()
            torch.testing.assert_close(
                Z.grad.double(), calls * (grad.T @ seen) @ probe.P.double().T, rtol=1e-4, atol=1e-4
            )
        if probe.V is not None:
            rows = out if keep is None else out[keep]
            torch.testing.assert_close(probe.V.grad, calls * reference.counted_moments(rows), rtol=1e-4, atol=1e-4)


def test_probes_that_are_redrawn_and_masks_that_come_and_go():
    built, x = model(), inputs()
    backward(built, x)  # what it keeps knows of no tracker
    keep = torch.arange(x.shape[:-1].numel()) % 3 > 0
    with fastlora.track(built, statistics=("grad_sq", "act_var"), every=1) as tracker:
        drawn = []
        for _ in range(3):
            found = [backward(built, x) for _ in range(2)]
            check(tracker, x, *found[0], calls=2)
            drawn.append(leaves(tracker)[0].P.clone())
            tracker.step()
            with tracker.mask(keep.view(x.shape[:-1])):
                check(tracker, x, *backward(built, x), keep=keep)
            tracker.step()
            with torch.no_grad():
                built(x)
            assert all(leaf.V.grad is None for leaf in leaves(tracker))
        assert not torch.equal(drawn[0], drawn[1])


def test_steps_that_are_not_sampled_leave_no_statistics():
    built, x = model(), inputs()
    with fastlora.track(built, statistics=("grad_sq", "act_var"), every=2) as tracker:
        for step in range(6):
            found = backward(built, x)
            if step % 2 == 0:
                check(tracker, x, *found)
            else:
                assert all(t.grad is None for leaf in leaves(tracker) for t in (*leaf.Z.values(), leaf.V))
            tracker.step()


@pytest.mark.parametrize("second", [("grad_sq",), ("act_var",), ("grad_sq", "act_var")])
def test_a_tracker_after_another(second):
    built, x = model(), inputs()
    with fastlora.track(built, statistics=("grad_sq", "act_var"), every=1) as first:
        for _ in range(2):
            backward(built, x)
        old = leaves(first)
        first.step()
    backward(built, x)
    assert all(t.grad is None for leaf in old for t in (*leaf.Z.values(), leaf.V))
    with fastlora.track(built, statistics=second, every=1, seed=7) as tracker:
        for _ in range(3):
            check(tracker, x, *backward(built, x))
            tracker.step()
    assert all(t.grad is None for leaf in old for t in (*leaf.Z.values(), leaf.V))


def test_trackers_of_two_adapters_by_turns():
    built, x = model(), inputs()
    fastlora.add_adapter(built, "b", fastlora.LoraConfig(r=3, target_modules=list(NAMES), init_lora_weights=False))
    trackers = {
        name: fastlora.track(built, statistics=("grad_sq", "act_var"), every=1, adapter=name, seed=i)
        for i, name in enumerate(("default", "b"))
    }
    for name in ("default", "b", "b", "default"):
        fastlora.set_adapter(built, name)
        check(trackers[name], x, *backward(built, x))
        for tracker in trackers.values():
            for leaf in leaves(tracker):
                leaf.clear()


def test_dropout_that_is_on_in_some_calls():
    built, x = model(lora_dropout=0.5), inputs()
    with fastlora.track(built, statistics=("grad_sq", "act_var"), every=1) as tracker:
        for training in (False, True, True, False, False):
            built.train(training)
            dy, y = backward(built, x)
            check(tracker, x, dy, y)
            assert torch.equal(y[0], built(x)[0].detach().double().flatten(0, -2)) != training
            tracker.step()


def test_layers_that_run_together_and_alone():
    built, x = model(), inputs()
    with fastlora.track(built, statistics=("grad_sq", "act_var"), every=1) as tracker:
        for together in (True, True, False, False, True):
            if together:
                dy, y = backward(built, x)
            else:  # each by itself, outside of the owner
                y = [getattr(built, name)(x) for name in NAMES]
                for out in y:
                    out.retain_grad()
                sum(out.square().sum() for out in y).backward()
                dy, y = [o.grad.double().flatten(0, -2) for o in y], [o.detach().double().flatten(0, -2) for o in y]
            check(tracker, x, dy, y)
            tracker.step()


def test_a_copy_is_not_tracked():
    built, x = model(), inputs()
    with fastlora.track(built, statistics=("grad_sq", "act_var"), every=1) as tracker:
        backward(built, x)
        tracker.step()
        twin = copy.deepcopy(built)
        backward(twin, x)
        assert all(t.grad is None for leaf in leaves(tracker) for t in (*leaf.Z.values(), leaf.V))
