"""``tracker.step()`` of a whole model: its cost is per step, so a single layer overstates it."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

import fastlora

from .harness.interleave import spread
from .harness.peers import TRACKED, Model
from .harness.shapes import SHAPES, Problem

BLOCKS = 12


class _Stack(nn.Module):
    def __init__(self, problem: Problem):
        super().__init__()
        self.blocks = nn.ModuleList([Model(problem) for _ in range(BLOCKS)])

    def forward(self, x):
        return sum(out.sum() for block in self.blocks for out in block(x))


@pytest.mark.benchmark(group="tracker", timer=time.thread_time, disable_gc=True)
@pytest.mark.parametrize("statistics", TRACKED)
def test_step(statistics, benchmark, record):
    """One step over 12 fused qkv of DeiT-Base: 36 matrices."""
    torch.manual_seed(0)
    shape = SHAPES["S1"]
    model = _Stack(Problem(shape, torch.float32))
    fastlora.inject(model, fastlora.LoraConfig(r=shape.rank, target_modules="qkv", split_qkv=True))
    tracker = fastlora.track(model, statistics=TRACKED[statistics], every=1)
    x = torch.randn(1, 16, shape.width, requires_grad=True)
    benchmark.pedantic(tracker.step, setup=lambda: model(x).backward(), rounds=48, warmup_rounds=2)
    assert all(value > 0 for kind in tracker.kinds for value in tracker.scores(kind).values())
    if not benchmark.disabled:
        times = [1e3 * t for t in benchmark.stats.stats.data]
        record({"kind": "step", "statistics": list(tracker.kinds), "matrices": len(tracker.keys), "ms": spread(times)})
