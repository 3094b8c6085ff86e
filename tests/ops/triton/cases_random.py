"""Random groups on the Triton backend, its strategies drawn too, against the formula in float64."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from fastlora.kernels import expand_backward, linear, linear_backward, shrink_linear, shrink_linear_backward
from support.random_groups import computed, differences, draw
from support.triton_help import DEVICE

from fastlora.ops import backends

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="operands are drawn on the CPU")
STRATEGIES = {
    shrink_linear: ("fused", "separate"),
    shrink_linear_backward: ("fused", "separate"),
    expand_backward: ("fused", "separate"),
    linear: ("fused", "library", "augmented"),
    linear_backward: ("fused", "library", "augmented"),
}


@pytest.mark.parametrize("seed", range(24))
def test_random_groups(seed, poisoned, monkeypatch):
    own = dataclasses.replace(backends.BACKENDS["triton"], unsupported_reason=lambda device, dtype: None)
    monkeypatch.setitem(backends.BACKENDS, "triton", own)
    for module, names in STRATEGIES.items():
        chosen = random.Random(f"{seed} {module.__name__}").choice(names)
        monkeypatch.setattr(module, "choose_strategy", lambda *size, chosen=chosen: chosen)
        monkeypatch.setattr(module, "aligned", lambda tensors: True)
    group = draw(seed, (torch.float32, torch.bfloat16, torch.float16), (5, 8, 20, 33))
    assert not differences(group, computed(group, "triton", bool(seed % 2), seed % 3 == 0))
