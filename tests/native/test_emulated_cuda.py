"""The code of the CUDA kernels run on the host: coroutines for threads, barriers and warp operations emulated.

It shows the logic, the indices and missing barriers; what only the device has (speed, its memory model, the launch) it
cannot show.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "csrc"
pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or not SOURCES.is_dir(), reason="needs g++ and the sources"
)  # fmt: skip


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    target = tmp_path_factory.mktemp("emulated") / "kernels.so"
    flags = [
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-shared",
        "-Wall",
        "-Wno-unknown-pragmas",
        "-Werror",
        f"-I{SOURCES}",
        f"-I{HERE}",
    ]
    subprocess.run(["g++", *flags, str(HERE / "emulated_kernels.cpp"), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def sort(kernels, ids: torch.Tensor, adapters: int):
    order, ranges = torch.full_like(ids, -5), torch.full((adapters, 2), -5)
    count = ctypes.c_int64
    kernels.build_segments(pointer(ids), count(ids.numel()), count(adapters), pointer(order), pointer(ranges))
    return order, ranges


def loop(ids: list[int], adapters: int):
    rows_of = [[m for m, id in enumerate(ids) if id == g] for g in range(adapters)]
    order = [m for rows in rows_of for m in rows] + [m for m, id in enumerate(ids) if not 0 <= id < adapters]
    ranges, begin = [], 0
    for rows in rows_of:
        ranges.append([begin, begin + len(rows)] if rows else [0, 0])
        begin += len(rows)
    return order, ranges


@pytest.mark.parametrize("rows", [0, 1, 31, 32, 33, 257, 5000])
@pytest.mark.parametrize("adapters", [0, 1, 3, 64])
def test_segments_are_a_stable_sort(kernels, rows, adapters):
    for seed, low in ((1, -1), (2, -3)):
        kernels.set_seed(seed)
        ids = torch.randint(low, max(adapters + (seed - 1), low + 1), (rows,))
        order, ranges = sort(kernels, ids, adapters)
        assert (order.tolist(), ranges.tolist()) == loop(ids.tolist(), adapters)


def test_more_adapters_than_a_block_scans_at_once(kernels):
    ids = torch.randint(-1, 300, (900,))
    order, ranges = sort(kernels, ids, 300)
    assert (order.tolist(), ranges.tolist()) == loop(ids.tolist(), 300)


@pytest.mark.parametrize("kind", ["identical", "none", "runs"])
def test_segments_of_long_runs(kernels, kind):
    ids = {
        "identical": torch.full((4000,), 2),
        "none": torch.full((4000,), -1),
        "runs": torch.arange(4000) // 700,
    }[kind]
    order, ranges = sort(kernels, ids, 6)
    assert (order.tolist(), ranges.tolist()) == loop(ids.tolist(), 6)


def test_more_rows_than_the_smallest_chunks_hold(kernels):
    ids = torch.randint(-1, 2, (4096 * 256 + 70,))
    order, ranges = sort(kernels, ids, 2)
    expected = torch.sort(torch.where(ids < 0, 2, ids), stable=True)[1]
    assert torch.equal(order, expected)
    ends = torch.tensor([(ids == 0).sum(), (ids >= 0).sum()])
    assert ranges.tolist() == [[0, int(ends[0])], [int(ends[0]), int(ends[1])]]


@pytest.mark.parametrize("adapters", [0, 1, 5, 300])
@pytest.mark.parametrize("block", [1, 16, 10_000])
def test_tiles(kernels, adapters, block):
    kernels.set_seed(3)
    ids = torch.randint(-1, max(adapters, 1), (700,)).clamp(max=adapters - 1)
    _, ranges = sort(kernels, ids, adapters)
    count = -(-700 // block) + adapters
    tiles = torch.full((count, 2), -5)
    kernels.segment_tiles(
        pointer(ranges), ctypes.c_int64(adapters), ctypes.c_int64(block), ctypes.c_int64(count), pointer(tiles)
    )
    expected = [[g, m] for g, (begin, end) in enumerate(ranges.tolist()) for m in range(begin, end, block)]
    assert tiles.tolist() == expected + [[-1, 0]] * (count - len(expected))
