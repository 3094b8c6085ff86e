"""What only a GPU can check: the committed tiles at real sizes, repeatability bit for bit, graph replays."""

from __future__ import annotations

import pytest
import torch
from fastlora.kernels import gradstat, linear, linear_backward, shrink, tiling, wgrad
from kernel_support import DEVICE, Data, Problem, assert_close, error, expected_dh, expected_h, wide

from fastlora import reference
from fastlora.functional import lora_linear

pytestmark = [
    pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU"),
    pytest.mark.usefixtures("poisoned"),
]
REAL = Problem(1000, 768, (768, 512, 264), (768, 512, 264), (8, 8, 8), 8)
ODD = Problem(517, 395, (391, 77), (391, 77), (5, 11), 3)
RANKS = Problem(700, 512, (512,), (256, 256), (64, 40), 8)
TILES = [(verb, kind, e.tile) for verb, kind, e in tiling.committed()]
NAMES = [f"{verb}-{kind}-{'x'.join(map(str, tile[:3]))}" for verb, kind, tile in TILES]


def run_verb(verb, data, tiles):
    """(found, wanted) pairs of a verb with one tile."""
    layout, s = data.layout, data.problem
    p = 0.25 if verb.endswith("dropout") else 0.0
    keep = {"threshold": reference.keep_threshold(p), "keep_scale": 1 / (1 - p)}
    options = {"seed": data.seed, **keep} if p else {}
    h, dh = expected_h(data, p).to(DEVICE, data.dtype), expected_dh(data).to(DEVICE, data.dtype)
    if verb.startswith("shrink"):
        found = [(shrink.shrink(data.x, [*data.A, data.P], 1, tiles=tiles, **options), expected_h(data, p))]
        if not p:
            dh = shrink.shrink_backward(data.slices(), data.B, layout.offsets, data.scale, layout.rank, tiles)
            found.append((dh, expected_dh(data)))
        return found
    if verb in ("linear", "expand"):
        strategy = "fused" if verb == "linear" else "library"
        y, sums = linear.linear(
            data.x, data.W, data.bias, h, data.B, data.places, layout.offsets, data.scale, True, strategy, tiles
        )
        update = [
            s * wide(h)[:, o : o + b.shape[1]] @ wide(b.to(data.dtype)).T
            for b, o, s in zip(data.B, layout.offsets, data.scale, strict=True)
        ]
        base = [
            wide(data.x) @ wide(w).T + (0 if b is None else wide(b)) for w, b in zip(data.W, data.bias, strict=True)
        ]
        wanted = torch.cat(base, 1) + torch.cat(update, 1)
        return [(torch.cat(y, 1), wanted)] + [
            (m, reference.column_moments(wide(o))) for m, o in zip(sums, y, strict=True)
        ]
    if verb.startswith(("linear_backward", "expand_dropout")):
        strategy = "library" if verb.startswith("expand") else "fused"
        dx = linear_backward.linear_backward(
            data.dy, data.W, dh, data.A, layout.offsets, strategy=strategy, tiles=tiles, **options
        )
        wanted = sum(wide(g) @ wide(w) for g, w in zip(data.dy, data.W, strict=True))
        for i, (a, o) in enumerate(zip(data.A, layout.offsets, strict=True)):
            part = wide(dh)[:, o : o + a.shape[0]] @ wide(a.to(data.dtype))
            wanted = wanted + (reference.dropout(part, data.seed.cpu(), i, p) if p else part)
        return [(dx, wanted)]
    if verb.startswith("wgrad"):
        dA, dB, Q = wgrad.wgrad(
            data.x, dh, data.slices(), h, layout.offsets, s.ranks, data.scale, s.probes, tiles=tiles, **options
        )
        found = []
        for i, part in enumerate(data.slices()):
            own = slice(layout.offsets[i], layout.offsets[i] + s.ranks[i])
            x = reference.dropout(wide(data.x), data.seed.cpu(), i, p) if p else wide(data.x)
            found += [(dA[i], wide(dh)[:, own].T @ x), (Q[i], wide(part).T @ wide(h)[:, layout.rank :])]
            found.append((dB[i], data.scale[i] * wide(part).T @ wide(h)[:, own]))
        return found
    if verb == "gradstat":
        offsets = [0, 3, 300, s.M]
        stat = gradstat.gradstat(data.x, data.dy[0], torch.tensor(offsets, device=DEVICE), tiles)
        return [(stat, reference.gradstat(wide(data.x), wide(data.dy[0]), offsets))]
    return [(gradstat.covariance(data.x, tiles), wide(data.x).T @ wide(data.x) / s.M)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("verb", "kind", "tile"), TILES, ids=NAMES)
@pytest.mark.parametrize("problem", [REAL, ODD, RANKS], ids=["real", "odd", "ranks"])
def test_committed_tile(verb, kind, tile, problem):
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    for found, wanted in run_verb(verb, Data(problem, dtype, torch.float32), tile):
        assert_close(found, wanted, dtype, verb)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("verb", ["shrink", "linear", "linear_backward", "wgrad", "gradstat"])
def test_two_runs_agree_bit_for_bit(verb, dtype):
    data = Data(REAL, dtype, torch.float32)
    for (first, _), (second, _) in zip(run_verb(verb, data, None), run_verb(verb, data, None), strict=True):
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

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    wanted = [leaf.grad.clone() for leaf in leaves]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        step()
    for leaf in leaves:
        leaf.grad.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(leaves, wanted, strict=True))


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
