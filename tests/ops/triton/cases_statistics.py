"""Statistics in Triton: sums and squares of dy^T x, covariances; against float64."""

from __future__ import annotations

import pytest
import torch
from fastlora.kernels import gradstat, tiling
from fastlora.kernels.tiling import TileConfig
from support.every_verb import run_verb
from support.triton_help import (
    DEVICE,
    FUSED,
    Data,
    Problem,
    assert_close,
    wide,
)

from fastlora.ops import reference

pytestmark = pytest.mark.usefixtures("poisoned")
SMALL = TileConfig(16, 16, 16, 4, 2, band=2)
KINDS = {
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
}
kinds = pytest.mark.parametrize(("dtype", "factors"), KINDS.values(), ids=KINDS)


def all_parts(x, dy, offsets):
    """[matrices, runs, 2] in float64."""
    return torch.stack([reference.gradstat(wide(x), wide(part), offsets) for part in dy])


@kinds
def test_gradstat(dtype, factors):
    x, *dy = (torch.randn(53, n + 3, device=DEVICE).to(dtype)[:, :n] for n in (40, 35, 1, 0, 16))
    offsets = [0, 0, 7, 40, 53]
    found = gradstat.gradstat(x, dy, torch.tensor(offsets, device=DEVICE), SMALL)
    assert_close(found, all_parts(x, dy, offsets), torch.float32, "gradstat")


@kinds
@pytest.mark.parametrize(("offsets", "parts"), [([0, 300], 4), ([0, 17, 300], 2), ([0, 0, 300], 2), ([0, 3, 300], 2)])
def test_rows_are_split_where_tiles_are_few(dtype, factors, offsets, parts, monkeypatch):
    x, *dy = (torch.randn(300, n + 3, device=DEVICE).to(dtype)[:, :n] for n in (20, 35, 17))
    grids, real = [], gradstat.launch
    monkeypatch.setattr(gradstat, "launch", lambda *given, **options: grids.append(given[1]) or real(*given, **options))
    ends = torch.tensor(offsets, device=DEVICE)
    found = gradstat.gradstat(x, dy, ends, SMALL)
    assert grids == [(10, len(offsets) - 1, parts)]
    assert_close(found, all_parts(x, dy, offsets), torch.float32, "gradstat")
    assert torch.equal(gradstat.gradstat(x, dy, ends, SMALL), found)


def test_more_runs_than_a_grid_takes(monkeypatch):
    x, dy, grids, real = torch.randn(53, 40, device=DEVICE), torch.randn(53, 35, device=DEVICE), [], gradstat.launch

    def launch(kernel, grid, *rest, **options):
        grids.append(grid)
        real(kernel, grid, *rest, **options)

    monkeypatch.setattr(gradstat, "launch", launch)
    monkeypatch.setattr(gradstat, "GRID_LIMIT", 3)
    offsets = [0, 5, 7, 7, 20, 31, 40, 53]
    found = gradstat.gradstat(x, [dy], torch.tensor(offsets, device=DEVICE), SMALL)
    assert [grid[1] for grid in grids] == [3, 3, 1]
    assert_close(found, all_parts(x, [dy], offsets), torch.float32, "gradstat")


def test_splits_fit_the_grid():
    assert tiling.choose_split(1, 2**40, 2) <= tiling.GRID_LIMIT


@pytest.mark.parametrize(("M", "N"), [(21, 50), (3, 7), (0, 5)])
def test_covariance(M, N):
    x = torch.randn(M, N, device=DEVICE)
    found = gradstat.covariance(x, SMALL)
    # Tiles below the diagonal are copies; in a tile on it the two halves are rounded by the library's own product.
    rounding = torch.finfo(torch.float32).eps * (x.abs().T @ x.abs())
    assert ((found - found.T).abs() <= rounding).all()
    assert_close(found, wide(x).T @ wide(x) / max(M, 1), torch.float32, "covariance")


@pytest.mark.parametrize("N", [1, 16, 17, 33, 80])
def test_every_triangular_tile_is_met(N):
    assert torch.isfinite(gradstat.covariance(torch.ones(2, N, device=DEVICE), SMALL)).all()


def test_no_matrix_of_the_weight_is_allocated(monkeypatch):
    sizes, real = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *s, **o: sizes.append(real(*s, **o)) or sizes[-1])
    x, dy = torch.randn(30, 64, device=DEVICE), torch.randn(30, 64, device=DEVICE)
    gradstat.gradstat(x, [dy], torch.tensor([0, 30], device=DEVICE), SMALL)
    assert sum(t.numel() for t in sizes) < 64


def squares(x, dy, offsets):
    """Sum over the runs of the squared entries of dy^T x."""
    runs = zip(offsets[:-1], offsets[1:], strict=True)
    return sum((wide(dy)[a:b].T @ wide(x)[a:b]).square() for a, b in runs)


@kinds
def test_diagonal(dtype, factors):
    x, *dy = (torch.randn(53, n + 3, device=DEVICE).to(dtype)[:, :n] for n in (40, 35, 20))
    offsets = [0, 0, 7, 40, 53]
    before = torch.rand(55, 40, device=DEVICE)
    diagonal = before.clone()
    found = gradstat.gradstat(x, dy, torch.tensor(offsets, device=DEVICE), SMALL, diagonal=diagonal)
    assert_close(found, all_parts(x, dy, offsets), torch.float32, "gradstat")
    assert_close(diagonal, wide(before) + squares(x, torch.cat(dy, 1), offsets), torch.float32, "diagonal")


def test_padded_and_packed_samples_agree():
    lengths, K, N = (5, 1, 9, 0), 20, 18
    packed = [torch.randn(sum(lengths), n, device=DEVICE) for n in (K, N)]
    padded = [torch.zeros(len(lengths), max(lengths), n, device=DEVICE) for n in (K, N)]
    for i, rows in enumerate(torch.arange(sum(lengths)).split(lengths)):
        for source, target in zip(packed, padded, strict=True):
            target[i, : len(rows)] = source[rows]
    ends = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE)
    found = gradstat.gradstat(packed[0], packed[1:], ends, SMALL)
    every = torch.arange(len(lengths) + 1, device=DEVICE) * max(lengths)
    same = gradstat.gradstat(padded[0].flatten(0, 1), [padded[1].flatten(0, 1)], every, SMALL)
    assert_close(same, wide(found), torch.float32, "padded")
    assert (found[0, 3] == 0).all()


@pytest.mark.parametrize(("M", "N"), [(21, 50), (3, 7), (0, 5)])
def test_added_covariance(M, N):
    x, before = torch.randn(M, N, device=DEVICE), torch.randn(N, N, device=DEVICE)
    total = before.clone()
    gradstat.add_gram_(total, x, torch.tensor(0.5, device=DEVICE), SMALL)
    wanted = wide(before) + 0.5 * wide(x).T @ wide(x)
    assert_close(total.triu(), wanted.triu(), torch.float32, "covariance")


def test_a_weight_of_zero_adds_nothing():
    x, total = torch.full((9, 20), float("nan"), device=DEVICE), torch.zeros(20, 20, device=DEVICE)
    gradstat.add_gram_(total, x, torch.tensor(0.0, device=DEVICE), SMALL)
    assert (total == 0).all()


def test_out_of_memory_leaves_the_diagonal_as_it_was(monkeypatch):
    """The n-th allocation fails, for every n: an error, or all of the result, and nothing in between."""
    data, real = Data(FUSED, torch.float32), torch.empty
    offsets = torch.tensor([0, 9, 24], device=DEVICE)
    for fatal in range(5):
        allocated = []

        def empty(*size, allocated=allocated, fatal=fatal, **options):
            allocated.append(size)
            if len(allocated) > fatal:
                raise torch.OutOfMemoryError("out of memory")
            return real(*size, **options)

        kept = torch.full((48, 32), 7.0, device=DEVICE)
        monkeypatch.setattr(torch, "empty", empty)
        try:
            gradstat.gradstat(data.x, data.dy[:1], offsets, SMALL, diagonal=kept)
        except torch.OutOfMemoryError:
            assert (kept == 7.0).all()
            assert fatal < 4
        else:
            assert (kept != 7.0).any() and fatal > 1
        monkeypatch.setattr(torch, "empty", real)


@pytest.mark.parametrize("verb", sorted({verb for verb, _, _ in tiling.committed()}))
def test_every_committed_verb_as_a_gpu_runs_it(verb):
    data = Data(Problem(45, 24, (18, 9), (18, 9), (3, 4), 2), torch.float32)
    for found, wanted in run_verb(verb, data, SMALL._replace(columns=32) if "grouped" in verb else SMALL):
        assert_close(found, wanted, torch.float32, verb)
