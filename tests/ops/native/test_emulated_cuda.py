"""The code of the CUDA kernels run on the host: coroutines for threads, barriers and warp operations emulated.

It shows the logic, the indices and missing barriers; what only the device has (speed, its memory model, the launch) it
cannot show.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastlora.ops.penalty import weighted_penalty, weighted_penalty_grad
from fastlora.ops.reference import signs

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[2] / "csrc"
pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or not SOURCES.is_dir(), reason="needs g++ and the sources"
)  # fmt: skip


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    target = tmp_path_factory.mktemp("emulated") / "kernels.so"
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-Wall", "-Wno-unknown-pragmas", "-Werror"]
    if sanitizers := os.environ.get("FASTLORA_SANITIZE"):
        # Coroutines change stacks behind AddressSanitizer's back: it watches the tensors and the scratch memory alone.
        flags += [f"-fsanitize={sanitizers}", "--param", "asan-stack=0", "--param", "asan-globals=0"]
    flags += [f"-I{SOURCES}", f"-I{HERE}"]
    subprocess.run(["g++", *flags, str(HERE / "emulated_kernels.cpp"), "-o", str(target)], check=True)
    library = ctypes.CDLL(str(target))
    library.penalty.restype = ctypes.c_float
    return library


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


TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
# Rank, width, depth; the last is several chunks each way, with a rest.
SHAPES = [(8, 33, 50), (1, 1, 1), (17, 40, 90), (0, 6, 7), (3, 0, 70), (40, 5, 2), (18, 1100, 513)]


def array(kind, values):
    values = list(values)
    return (kind * len(values))(*values)


def penalty(kernels, A, B, dA, dB, scales, weights, weight=1.0):
    """The value without gradients, else adds to them and returns how much scratch memory was left unused."""
    gradient = dA is not None
    dA, dB = (dA, dB) if gradient else (A, B)
    rows = list(zip(A, B, dA, dB, strict=True))
    pointers = array(
        ctypes.c_void_p, [t.data_ptr() if t.numel() or not gradient else None for row in rows for t in row]
    )
    sizes = [[*(t.stride(0) if t.dim() == 2 else 0 for t in row), row[0].shape[1], *row[1].shape] for row in rows]
    return kernels.penalty(
        pointers,
        array(ctypes.c_int64, sum(sizes, [])),
        array(ctypes.c_int, [TYPES[t.dtype] for row in rows for t in row]),
        array(ctypes.c_double, scales),
        ctypes.c_int64(len(A)),
        pointer(weights),
        TYPES[weights.dtype],
        ctypes.c_double(weight),
        gradient,
    )


def factors(dtype, shapes):
    A = [torch.randn(r, depth + 1).to(dtype)[:, :depth] for r, _, depth in shapes]
    B = [torch.randn(width, r).to(dtype) for r, width, _ in shapes]
    return A, B, [0.25 + 0.5 * (i % 7) for i in range(len(shapes))], torch.rand(len(shapes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_penalty_and_its_gradient(kernels, dtype):
    kernels.set_seed(4)
    A, B, scales, weights = factors(dtype, SHAPES)
    wide_A, wide_B = [a.double() for a in A], [b.double() for b in B]
    exact = weighted_penalty(wide_A, wide_B, scales, weights.double())
    for given_weights in (weights, weights.double()):
        assert penalty(kernels, A, B, None, None, scales, given_weights) == pytest.approx(float(exact), rel=1e-5)
    dA, dB = weighted_penalty_grad(wide_A, wide_B, scales, weights.double(), 0.3)
    into_A, into_B = [torch.ones(a.shape) for a in A], [torch.ones(b.shape) for b in B]
    unused = penalty(kernels, A, B, into_A, into_B, scales, weights, 0.3)
    assert unused == 3 * 3  # of the B without rows
    for result, gradient in zip(into_A + into_B, dA + dB, strict=True):
        eps = 30 * torch.finfo(torch.float32).eps * float(gradient.abs().max() if gradient.numel() else 0)
        torch.testing.assert_close(result.double(), 1 + gradient, rtol=0, atol=eps + 1e-6)


def test_penalty_gradient_in_low_precision_and_left_out(kernels):
    A, B, scales, weights = factors(torch.bfloat16, [(4, 9, 20), (2, 30, 3)])
    dA, dB = weighted_penalty_grad(A, B, scales, weights, 1e-2)
    into_A, into_B = [torch.ones_like(A[0]), torch.empty(0)], [torch.empty(0), torch.ones_like(B[1])]
    penalty(kernels, A, B, into_A, into_B, scales, weights, 1e-2)
    for result, gradient in ((into_A[0], dA[0]), (into_B[1], dB[1])):
        exact = 1 + gradient.float()
        assert ((result.float() - exact).abs() <= 2 * torch.finfo(torch.bfloat16).eps * exact.abs()).all()


def test_more_matrices_than_one_table_holds(kernels):
    shapes = [(1 + i % 2, 3, 4) for i in range(240)]
    A, B, scales, weights = factors(torch.float32, shapes)
    exact = weighted_penalty(A, B, scales, weights)
    assert penalty(kernels, A, B, None, None, scales, weights) == pytest.approx(float(exact), rel=1e-5)
    dA, dB = weighted_penalty_grad(A, B, scales, weights, 0.5)
    into_A, into_B = [torch.zeros(a.shape) for a in A], [torch.zeros(b.shape) for b in B]
    assert penalty(kernels, A, B, into_A, into_B, scales, weights, 0.5) == 0
    for result, gradient in zip(into_A + into_B, dA + dB, strict=True):
        torch.testing.assert_close(result, gradient, rtol=1e-5, atol=1e-5)


def test_squared_norms(kernels):
    kernels.set_seed(5)
    tensors = [torch.randn(n).to(dtype) for dtype in TYPES for n in (0, 1, 511, 8192, 8193, 20000)]
    tensors += torch.randn(1400).split(1)  # more than one table holds
    out = torch.full((len(tensors),), -5.0, dtype=torch.float64)
    kernels.squared_norms(
        array(ctypes.c_void_p, [t.data_ptr() for t in tensors]),
        array(ctypes.c_int64, [t.numel() for t in tensors]),
        array(ctypes.c_int, [TYPES[t.dtype] for t in tensors]),
        ctypes.c_int64(len(tensors)),
        pointer(out),
    )
    exact = torch.stack([t.double().square().sum() for t in tensors])
    torch.testing.assert_close(out, exact, rtol=1e-13, atol=0)


def test_output_variances(kernels):
    kernels.set_seed(6)
    layers = [[5], [], [300, 0, 40], [1] * 1200]  # more runs than one table holds
    y = [torch.randn(33, sum(runs), dtype=torch.float64) + 3.0 for runs in layers]
    y[0][:, 2] = 0.1  # constant: a variance that rounds below 0
    rows = torch.full((2, 1), 33.0, dtype=torch.float64)
    sums = [torch.cat([torch.stack([t.sum(0), t.square().sum(0)]), rows], dim=1) for t in y]
    firsts = [[sum(runs[:i]) for i in range(len(runs))] for runs in layers]
    each = [
        (s, [sum(r), f, n]) for s, r, fs in zip(sums, layers, firsts, strict=True) for f, n in zip(fs, r, strict=True)
    ]
    out = torch.full((len(each),), -5.0, dtype=torch.float64)

    def run():
        pointers = array(ctypes.c_void_p, [s.data_ptr() for s, _ in each])
        runs = array(ctypes.c_int64, [number for _, numbers in each for number in numbers])
        kernels.output_variances(pointers, runs, ctypes.c_int64(len(each)), pointer(out))

    run()
    parts = [part for t, runs in zip(y, layers, strict=True) for part in t.split(runs, dim=1)]
    exact = torch.stack([(part - part.mean(0)).square().mean(0).sum() for part in parts])
    torch.testing.assert_close(out, exact, rtol=1e-12, atol=1e-12)
    sums[0][:] = torch.tensor([[3.0], [3.0 - 1e-9]], dtype=torch.float64)
    sums[0][:, -1] = 3.0
    sums[2][1, 5] = float("nan")
    sums[3][:, -1] = 0.0
    run()
    assert out[0] == 0.0 and out[1].isnan() and out[2] == 0.0 and not out[3].isnan() and not out[4:].isfinite().any()


@pytest.mark.parametrize("dtype", TYPES)
def test_resized_ranks(kernels, dtype):
    source = [torch.randn(3, 700).to(dtype), torch.randn(50, 4).to(dtype), torch.randn(0, 5).to(dtype)]
    to = [torch.full(size, 9.0, dtype=dtype)[:, 1:] for size in ((5, 701), (50, 3), (2, 6))]
    sizes = [
        [t.stride(0), s.stride(0), *t.shape, min(t.shape[0], s.shape[0]), min(t.shape[1], s.shape[1]), t.itemsize]
        for t, s in zip(to, source, strict=True)
    ]
    pairs = [t.data_ptr() for pair in zip(to, source, strict=True) for t in pair]
    kernels.resize_ranks(array(ctypes.c_void_p, pairs), array(ctypes.c_int64, sum(sizes, [])), ctypes.c_int64(len(to)))
    for t, s in zip(to, source, strict=True):
        expected = torch.zeros_like(t)
        rows, columns = min(t.shape[0], s.shape[0]), min(t.shape[1], s.shape[1])
        expected[:rows, :columns] = s[:rows, :columns]
        assert torch.equal(t, expected) and (t._base[:, 0] == 9).all()


@pytest.mark.parametrize("counts", [[1], [3, 0, 70, 300, 0], [0], [1] * 4500], ids=lambda c: f"{len(c)}-{sum(c)}")
def test_probe_signs(kernels, counts):
    seed, step, first, tag = torch.tensor(-(2**61) + 12345), 7, 40, 2
    out = torch.full((128 * sum(counts) + 1,), 9.0)
    kernels.philox_signs(
        pointer(seed), step, first, tag, array(ctypes.c_int64, counts), ctypes.c_int64(len(counts)), pointer(out)
    )
    numbers = [(group, count) for group, count in enumerate(counts) if count]
    words = [[torch.tensor(v) for v in (step, first + group, tag)] for group, _ in numbers]
    shown = range(len(numbers)) if len(numbers) < 10 else (0, 3999, 4000, 4499)
    starts = [sum(counts[:group]) for group, _ in numbers]
    for i in shown:
        expected = signs(seed, *words[i], 128 * numbers[i][1])
        assert torch.equal(out[128 * starts[i] :][: expected.numel()], expected)
    assert out[-1] == 9 and set(out[:-1].tolist()) <= {-1.0, 1.0}
