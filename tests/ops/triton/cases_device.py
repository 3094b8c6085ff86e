"""What only a GPU can check: the committed tiles at real sizes, repeatability bit for bit, graph replays."""

from __future__ import annotations

import pytest
import torch
from fastlora.kernels import linear, shrink, tiling
from support.every_verb import run_verb
from support.triton_help import DEVICE, Data, Problem, assert_close, assert_replayed, error, wide

from fastlora.ops.lora import lora_linear

pytestmark = [
    pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU"),
    pytest.mark.usefixtures("poisoned"),
]
REAL = Problem(1000, 768, (768, 512, 264), (768, 512, 264), (8, 8, 8), 8)
ODD = Problem(517, 395, (391, 77), (391, 77), (5, 11), 3)
RANKS = Problem(700, 512, (512,), (256, 256), (64, 40), 8)
TILES = [(verb, kind, e.tile) for verb, kind, e in tiling.committed()]
NAMES = [f"{verb}-{kind}-{'x'.join(map(str, tile[:3]))}" for verb, kind, tile in TILES]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("verb", "kind", "tile"), TILES, ids=NAMES)
@pytest.mark.parametrize("problem", [REAL, ODD, RANKS], ids=["real", "odd", "ranks"])
def test_committed_tile(verb, kind, tile, problem):
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    for found, wanted in run_verb(verb, Data(problem, dtype, torch.float32), tile):
        assert_close(found, wanted, dtype, verb)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "verb", ["shrink", "shrink_linear", "shrink_linear_backward", "linear", "linear_moments", "linear_backward",
             "wgrad", "expand_backward", "gradstat", "gradstat_diagonal", "covariance", "grouped_shrink",
             "grouped_shrink_dropout"]
)  # fmt: skip
def test_two_runs_agree_bit_for_bit(verb, dtype):
    data, runs = Data(REAL, dtype, torch.float32), []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(run_verb(verb, data, None))
    for (first, _), (second, _) in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_tf32_is_used_only_when_allowed():
    data = Data(REAL, torch.float32)
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        ((found, wanted), *_) = run_verb("linear_backward", data, None)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert error(found, wanted) < 2e-3
    ((found, wanted), *_) = run_verb("linear_backward", data, None)
    assert_close(found, wanted, torch.float32, "ieee")


def test_graph_replay_equals_eager():
    data = Data(REAL, torch.bfloat16, torch.float32)
    A = [a.clone().requires_grad_() for a in data.A]
    B = [b.clone().requires_grad_() for b in data.B]
    x = data.x.clone().requires_grad_()
    leaves = [x, *A, *B]

    def step():
        for leaf in leaves:
            leaf.grad = None
        y = lora_linear(x, data.W, data.bias, A, B, data.scale, backend="triton")
        torch.autograd.backward(y, data.dy)

    assert_replayed(step, leaves)


def test_offsets_beyond_32_bits():
    rows, width = 2**31 // 1024 + 40, 1024
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB")
    x = torch.randn(rows, width, device=DEVICE, dtype=torch.bfloat16)
    A = torch.randn(4, width, device=DEVICE)
    h = shrink.shrink(x, [A])
    assert_close(h[-50:], wide(x[-50:]) @ wide(A.bfloat16()).T, torch.bfloat16, "h")
    W, B = torch.randn(width, width, device=DEVICE).bfloat16() / 32, torch.randn(width, 4, device=DEVICE)
    (y,), _ = linear.linear(x, [W], [None], h, [B], [(0, 0)], [0], [2.0], strategy="fused")
    wanted = wide(x[-50:]) @ wide(W).T + 2.0 * wide(h[-50:]) @ wide(B.bfloat16()).T
    assert_close(y[-50:], wanted, torch.bfloat16, "y")
