"""Random groups on the Triton backend, its strategies drawn too, against the formula in float64."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from fastlora.kernels import expand_backward, linear, linear_backward, shrink_linear, shrink_linear_backward
from support.random_groups import computed, differences, draw, on
from support.triton_help import DEVICE

from fastlora.ops import backends

# On a GPU a call is met, recorded, and then repeated by its plan.
TIMES = 2 if DEVICE == "cpu" else 4
STRATEGIES = {
    shrink_linear: ("fused", "separate"),
    shrink_linear_backward: ("fused", "separate"),
    expand_backward: ("fused", "separate"),
    linear: ("fused", "library", "augmented"),
    linear_backward: ("fused", "library", "augmented"),
}


@pytest.mark.parametrize("seed", range(24))
def test_random_groups(seed, poisoned, monkeypatch):
    if DEVICE == "cpu":
        own = dataclasses.replace(backends.BACKENDS["triton"], unsupported_reason=lambda device, dtype: None)
        monkeypatch.setitem(backends.BACKENDS, "triton", own)
    for module, names in STRATEGIES.items():
        chosen = random.Random(f"{seed} {module.__name__}").choice(names)
        monkeypatch.setattr(module, "choose_strategy", lambda *size, chosen=chosen: chosen)
        if DEVICE == "cpu":
            monkeypatch.setattr(module, "aligned", lambda tensors: True)
    group = draw(seed, (torch.float32, torch.bfloat16, torch.float16), (5, 8, 20, 33))
    there = on(group, DEVICE)
    assert not differences(group, computed(there, "triton", bool(seed % 2), seed % 3 == 0, TIMES))
