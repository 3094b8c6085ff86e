"""Threads: none, more than rows, and those that a fork leaves behind."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from support.native_help import needs_library

pytestmark = needs_library

ops = torch.ops.fastlora


def test_zero_threads_are_refused_and_change_nothing():
    threads = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="positive"):
        torch.set_num_threads(0)
    assert torch.get_num_threads() == threads
    x = torch.randn(9, 9)
    assert torch.equal(ops.shrink(x, torch.eye(9)), x)


@pytest.mark.parametrize("rows", [1, 7, 8, 17, 40])
def test_more_threads_than_rows(rows):
    """Work enough for 32 threads in so few rows that most of them would have none."""
    x, dy, B = torch.randn(rows, 16384), torch.randn(rows, 4096), torch.randn(4096, 65)
    A, h = torch.randn(65, 16384), torch.randn(rows, 65)
    for threads in (1, 32):
        torch.set_num_threads(threads)
        results = [ops.shrink(x, A), ops.outer(h, x)]
        y, dx = torch.zeros(rows, 4096), torch.zeros(rows, 16384)
        results += [*ops.lora_forward_([y], x, [A], None, [B], [0], [0], [1.0], False)[:1], y]
        dA, dB, _ = ops.lora_backward_(dx, [dy], x, h, [A], [B], [0], [0], [1.0], 0, True, True)
        results += [dx, *dA, *dB]
        if threads == 1:
            alone = results
    for one, other in zip(alone, results, strict=True):
        # Sums over rows in another order; everything else does not depend on the split.
        assert (one - other).abs().max() <= 64 * torch.finfo(torch.float32).eps * one.abs().max()


FORK = """
import os, sys, torch
import fastlora
from fastlora.ops import native

torch.set_num_threads(2)
torch.manual_seed(0)
x, A, B, dy = torch.randn(2000, 256), torch.randn(24, 256), torch.randn(512, 24), torch.randn(2000, 512)

def call(y, dx):
    h, _ = torch.ops.fastlora.lora_forward_([y], x, [A], None, [B], [0], [0], [1.0], False)
    dA, dB, _ = torch.ops.fastlora.lora_backward_(dx, [dy], x, h, [A], [B], [0], [0], [1.0], 0, True, True)
    return [h, y, dx, *dA, *dB]

order, ranges = torch.empty(0, dtype=torch.int64), torch.tensor([[0, 2000]])
factors = [torch.randn(24, 256) for _ in range(64)], [torch.randn(512, 24) for _ in range(64)]
ones = [1.0] * 64, torch.ones(64, dtype=torch.float64)

def of_many(y, dx):
    few = [A], [B], order, ranges, [0], [0], [1.0], [0, 24]
    h, _ = torch.ops.fastlora.lora_grouped_forward_([y], x, [A], [], *few[1:], False)
    dA, dB, _ = torch.ops.fastlora.lora_grouped_backward_(dx, [dy], x, h, *few, [0], True, True)
    return [h, y, dx, *dA, *dB, torch.ops.fastlora.penalty(*factors, *ones)]

# In the child even torch.zeros would wait for ever for the parent's threads.
layer = fastlora.nn.Linear(64, 64, r=4)
buffers = [torch.zeros(2000, width) for _ in range(4) for width in (512, 256)]
before = call(*buffers[:2]) + of_many(*buffers[2:4])
output = layer(x[:, :64])
child = os.fork()
if child == 0:
    after = call(*buffers[4:6]) + of_many(*buffers[6:])
    same = all(a.numpy().tobytes() == b.numpy().tobytes() for a, b in zip(before, after))
    torch.set_num_threads(1)
    layer(x[:, :64]).sum().backward()
    same = same and bool(((layer(x[:, :64]) - output).abs() < 1e-3).all())
    os._exit(0 if same else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_a_forked_child_gets_the_same_bits_and_does_not_hang():
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
