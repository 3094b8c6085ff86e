"""Elements beyond 2^31: rows so far apart that a 32-bit offset would wrap; the memory between them is never touched."""

from __future__ import annotations

import pytest
import torch
from fastlora.kernels import (
    expand_backward,
    gradstat,
    grouped,
    linear,
    linear_backward,
    shrink,
    shrink_linear,
    shrink_linear_backward,
    wgrad,
)
from fastlora.kernels.grouped import LoraRanks, RowBatch
from fastlora.kernels.tiling import TileConfig
from support.triton_help import DEVICE, assert_close, wide

from fastlora.ops import reference

SMALL = TileConfig(16, 16, 16, 4, 2, band=2)
STRIDE = 2**30 + 64
K, N, R = 24, 18, 3


def far(columns: int, values: torch.Tensor | None = None) -> torch.Tensor:
    """Three rows that lie ``STRIDE`` elements apart: the stride fits 32 bits, the last row's offset does not."""
    try:
        rows = torch.empty_strided((3, columns), (STRIDE, 1), dtype=torch.float16, device=DEVICE)
    except (RuntimeError, torch.OutOfMemoryError):
        pytest.skip("4 GiB of address space cannot be reserved")
    return rows.copy_(torch.randn(3, columns) if values is None else values)


@pytest.fixture
def operands():
    """x, dy (both far), A, B and an h that is near."""
    A, B = torch.randn(R, K, device=DEVICE), torch.randn(N, R, device=DEVICE)
    return far(K), far(N), A, B, torch.randn(3, R, device=DEVICE).half()


def test_shrink_and_dh(operands):
    x, dy, A, B, _ = operands
    half = torch.float16
    assert_close(shrink.shrink(x, [A], tiles=SMALL), wide(x) @ wide(A.half()).T, half, "h")
    assert_close(shrink.shrink_backward([dy], [B], [0], [1.0], R, SMALL), wide(dy) @ wide(B.half()), half, "dh")


def test_one_pass_over_dy(operands):
    _, dy, _, B, h = operands
    dh, _, dB, _ = expand_backward.expand_backward(None, [dy], h, [B], [0], [1.0], R, 0, strategy="fused", tiles=SMALL)
    assert_close(dh, wide(dy) @ wide(B.half()), torch.float16, "dh")
    assert_close(dB[0], wide(dy).T @ wide(h), torch.float32, "dB")


def test_h_beside_y_and_dh_beside_dx(operands):
    x, dy, A, B, _ = operands
    W, half = torch.randn(N, K, device=DEVICE).half(), torch.float16
    y, h, _ = shrink_linear.shrink_linear(
        x, [W], [None], [A], None, [B], [(0, 0)], [0], [1.0], strategy="fused", tiles=SMALL
    )
    assert_close(h, wide(x) @ wide(A.half()).T, half, "h")
    assert_close(y[0], wide(x) @ wide(W).T + wide(h) @ wide(B.half()).T, half, "y")
    both = shrink_linear_backward.shrink_linear_backward(
        [dy], [W], [B], [A], [(0, 0)], [0], [1.0], strategy="fused", tiles=SMALL
    )
    assert_close(both[1], wide(dy) @ wide(B.half()), half, "dh")
    assert_close(both[0], wide(dy) @ wide(W) + wide(both[1]) @ wide(A.half()), half, "dx")


@pytest.mark.parametrize("tma", [False, True])
def test_linear(operands, tma):
    x, _, _, B, h = operands
    W, bias = torch.randn(N, K, device=DEVICE).half(), torch.randn(N, device=DEVICE).half()
    y = far(N)
    projection = linear.Projection(W, bias, B, y, None, 0, 1.0)
    linear.expand(x, h, [projection], True, SMALL._replace(tma=tma))
    wanted = wide(x) @ wide(W).T + wide(bias) + wide(h) @ wide(B.half()).T
    assert_close(y, wanted, torch.float16, "y")
    linear.expand(x, h, [projection], False, SMALL)
    assert_close(y, wanted + wide(h) @ wide(B.half()).T, torch.float16, "y, updated")


@pytest.mark.parametrize("tma", [False, True])
def test_linear_backward(operands, tma):
    _, dy, A, _, dh = operands
    W = torch.randn(N, K, device=DEVICE).half()
    wanted = wide(dh) @ wide(A.half())
    dx = linear_backward.linear_backward([dy], [W], dh, [A], [0], strategy="fused", tiles=SMALL._replace(tma=tma))
    assert_close(dx, wide(dy) @ wide(W) + wanted, torch.float16, "dx")
    dx = far(K, torch.ones(3, K))
    linear_backward.add_adapters_(dx, dh, [A], [0], tiles=SMALL)
    assert_close(dx, 1 + wanted, torch.float16, "dx, updated")


def test_wgrad_and_statistics(operands):
    x, dy, _, _, h = operands
    dA, dB, _ = wgrad.wgrad(x, h, [dy], h, [0], [R], [1.0], 0, tiles=SMALL)
    assert_close(dA[0], wide(h).T @ wide(x), torch.float32, "dA")
    assert_close(dB[0], wide(dy).T @ wide(h), torch.float32, "dB")
    found = gradstat.gradstat(x, [dy], torch.tensor([0, 1, 3], device=DEVICE), SMALL)
    assert_close(found[0], reference.gradstat(wide(x), wide(dy), [0, 1, 3]), torch.float32, "gradstat")
    assert_close(gradstat.covariance(x, SMALL), wide(x).T @ wide(x) / 3, torch.float32, "covariance")


def test_rows_of_several_adapters(operands):
    x, dy, A, B, h = operands
    order, ranges = torch.tensor([2, 0, 1], device=DEVICE), torch.tensor([[0, 1], [1, 3]], device=DEVICE)
    batch, own = RowBatch(order, ranges, reference.segment_tiles), LoraRanks(((R,), (R,)), (0, 0))
    found = grouped.grouped_shrink(x, [A, 2 * A], batch, own, SMALL)
    scale = torch.tensor([[2.0], [2.0], [1.0]], dtype=torch.float64)
    assert_close(found, scale * (wide(x) @ wide(A.half()).T), torch.float16, "h")
    dA, dB, _ = grouped.grouped_wgrad(x, h, [dy], h, [N], batch, own, [1.0, 1.0], tiles=SMALL)
    assert_close(dA[1], wide(h)[:2].T @ wide(x)[:2], torch.float32, "dA")
    assert_close(dB[0], wide(dy)[2:].T @ wide(h)[2:], torch.float32, "dB")
