"""The same seed gives the same bits on every backend; another number of threads only moves roundings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.op_help import BACKENDS
from support.seeded_training import trained

import fastlora


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_seed_gives_the_same_bits(backend):
    (first, scores), (second, again) = trained(backend), trained(backend)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) and scores == again
    other, _ = trained(backend, seed=1)
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


HASH = """
import hashlib, sys
sys.path[:0] = [{tests!r}, {tools!r}]
import torch
from support.seeded_training import trained
torch.set_num_threads(1)
weights, scores = trained({backend!r})
print(hashlib.sha256(b"".join(w.numpy().tobytes() for w in weights) + repr(scores).encode()).hexdigest())
"""


def test_processes_agree():
    """Nothing hangs on addresses, hash seeds or the order of a set."""
    here, found = Path(__file__).parents[1], []
    for hash_seed in ("0", "1"):
        code = HASH.format(tests=str(here), tools=str(here.parent / "tools"), backend="auto")
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "FASTLORA_CPU_ENGINE": "linear"}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(done.stdout.split()[-1])
    assert found[0] == found[1]


def wide(threads: int) -> list[torch.Tensor]:
    """Outputs and gradients of layers large enough to be split over threads."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({name: torch.nn.Linear(256, n) for name, n in (("q", 256), ("k", 128), ("v", 128))})
    fastlora.inject(model, fastlora.LoraConfig(r=8, target_modules="qkv", init_lora_weights=False))
    x = torch.randn(3000, 256, requires_grad=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with fastlora.track(model, every=1) as tracker:
            y = [model[name](x) for name in "qkv"]
            sum(out.square().sum() for out in y).backward()
            tracker.step()
        values = torch.tensor(list(tracker.scores().values()), dtype=torch.float64)
    finally:
        torch.set_num_threads(before)
    return [*(out.detach() for out in y), x.grad, *(p.grad for p in model.parameters() if p.grad is not None), values]


def test_threads_move_roundings_only():
    """64 roundings of the largest entry, as for the operators: only sums over rows are taken in another order."""
    one, two, again = wide(1), wide(2), wide(2)
    assert all(torch.equal(a, b) for a, b in zip(two, again, strict=True))
    for a, b in zip(one, two, strict=True):
        assert (a - b).abs().max() <= 64 * torch.finfo(torch.float32).eps * a.abs().max()
