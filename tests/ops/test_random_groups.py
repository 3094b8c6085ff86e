"""What may come together, drawn at random: blocks of rows, ranks of 0, masks, probes, signs, moments, adapters,
outputs without a gradient, checkpoints and precisions, against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from support.random_groups import computed, differences, draw

from fastlora.ops import native

LOW = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = [("reference", (torch.float64,)), ("eager", LOW), *([("native", LOW)] if native.available() else [])]


@pytest.mark.usefixtures("library_matmul")
@pytest.mark.parametrize(("backend", "dtypes"), BACKENDS, ids=[name for name, _ in BACKENDS])
@pytest.mark.parametrize("bound", [False, True], ids=["operator", "bound"])
@pytest.mark.parametrize("again", [False, True], ids=["once", "checkpoint"])
def test_random_groups(backend, dtypes, bound, again):
    wrong = {}
    for seed in range(60 if backend == "native" else 15):
        group = draw(1000 * bound + 2000 * again + seed, dtypes)
        wrong[seed] = differences(group, computed(group, backend, bound, again))
    assert not {seed: found for seed, found in wrong.items() if found}
