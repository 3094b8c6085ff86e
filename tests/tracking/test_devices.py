"""A tracker of layers on more than one device: what is drawn follows to each of them, at every draw.

A second device with values is the CPU under another name, one without is the meta device.
"""

from __future__ import annotations

import pytest
import torch
from support.column_help import columns
from support.tracker_help import data, loss_of, model, track
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastlora
from fastlora.nn.probe_rows import ColumnSampler, RademacherProbes, SampleSigns

CPU, OTHER, META = torch.device("cpu"), torch.device("cpu", 0), torch.device("meta")
KINDS = {"rademacher": track, "columns": columns}


def _drawn(sampler):
    return sampler.columns if isinstance(sampler, ColumnSampler) else sampler.rows


class CopiesTo(TorchDispatchMode):
    """The devices that something is copied to, in place."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            self.found.append(args[0].device.type)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampler", [RademacherProbes, ColumnSampler])
def test_a_draw_is_the_same_on_every_device(sampler):
    made = sampler([5, 7], 64, 3, CPU, ("grad_sq",) if sampler is ColumnSampler else ())
    here, there = _drawn(made).on(CPU), _drawn(made).on(OTHER)
    for again in (lambda: made.draw(0), lambda: made.draw(1), lambda: (made.restart(4), made.draw(1))):
        before = [part.clone() for part in here]
        again()
        for mine, copy, old in zip(here, there, before, strict=True):
            assert mine.data_ptr() != copy.data_ptr() and torch.equal(mine, copy) and not torch.equal(mine, old)
    assert _drawn(made).on(OTHER) is there


def test_signs_are_the_same_on_every_device():
    signs = SampleSigns(torch.tensor(3), 4)
    for micro in (1, 2):
        here, there = (signs.take(6, None, 0, micro, device) for device in (CPU, OTHER))
        assert here.data_ptr() != there.data_ptr() and torch.equal(here, there) and here.abs().eq(1).all()
        assert signs.take(6, None, 0, micro, OTHER) is there
    assert signs.count() == 12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("statistics", ["grad_sq", "fisher"])
def test_scores_do_not_depend_on_which_device_a_layer_is_on(kind, statistics):
    def scores(split):
        m = model(torch.float32)
        with KINDS[kind](m, statistics=(statistics,), ema=None) as tracker:
            drawn = _drawn(tracker._sampler)
            for i, probe in enumerate(list(tracker._tracked.probes.values()) if split else ()):
                name, i = ("P", i // 3) if kind == "rademacher" else ("columns", i)
                setattr(probe, name, drawn.on(OTHER)[i])
            for step in range(4):
                loss_of(m, data(torch.float32, seed=step)).backward()
                if step == 2:  # a state is taken up, with draws of its own
                    tracker.load_state_dict(tracker.state_dict())
                    loss_of(m, data(torch.float32, seed=step)).backward()
                tracker.step()
            return dict(tracker.scores(statistics))

    assert scores(split=True) == scores(split=False) and all(scores(split=True).values())


def _pair(second):
    m = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    fastlora.inject(m, fastlora.LoraConfig(r=2, target_modules=["0", "1"]))
    m[1].to(second)
    return m


@pytest.mark.parametrize("kind", KINDS)
def test_one_copy_a_draw_to_another_device_and_none_on_one(kind):
    found = {}
    for second in (CPU, META):
        m = _pair(second)
        with KINDS[kind](m, statistics=("grad_sq",)) as tracker:
            for again in (tracker.step, lambda tracker=tracker: tracker.load_state_dict(tracker.state_dict())):
                m[0](torch.ones(3, 8)).sum().backward()
                with CopiesTo() as copies:
                    again()
                found.setdefault(second, []).append(copies.found)
            own = tracker._tracked.probes["1"]
            read = own.P if kind == "rademacher" else own.columns
            assert any(read is part for part in _drawn(tracker._sampler).on(second))
    assert all("meta" not in copies for copies in found[CPU])
    assert [copies.count("meta") for copies in found[META]] == [1, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_signs_go_to_the_device_of_each_layer(kind):
    m = _pair(META)
    with KINDS[kind](m, statistics=("fisher",)) as tracker:
        for layer, device in zip(m, (CPU, META), strict=True):
            x = torch.ones(3, 8, device=device)
            layer(x).sum().backward()
            assert tracker._step.signs_for(x).device == device
