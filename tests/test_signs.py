"""The signs of many groups: natively or by the formula, the bits of the reference."""

from __future__ import annotations

import pytest
import torch

from fastlora.ops import native, reference
from fastlora.ops.multi_tensor import Signs


@pytest.mark.parametrize("how", ["native", "formula"])
@pytest.mark.parametrize("first", [0, 7])
def test_every_group_has_the_signs_of_its_own_counters(first, how, monkeypatch):
    if how == "formula":
        monkeypatch.setattr(native, "has_kernel", lambda operator, device: False)
    elif not native.available():
        pytest.skip(native.reason())
    counts, seed, signs = [2, 0, 5, 1], torch.tensor(-3), Signs([2, 0, 5, 1], tag=4, first=first)
    for step in (0, 9):  # what is kept between steps serves both
        found = signs.fill_(torch.full((128 * sum(counts),), torch.nan), seed, step)
        for g, (part, count) in enumerate(zip(found.split([128 * c for c in counts]), counts, strict=True)):
            words = map(torch.tensor, (step, first + g, 4))
            assert torch.equal(part, reference.signs(seed, *words, 128 * count))
