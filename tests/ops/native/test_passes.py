"""The two fused passes against their formulas in float64, and the operators behind the statistics."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from support.native_help import DTYPES, interleaved_columns, needs_library

from fastlora.ops import reference
from fastlora.ops.backends.native import native_kernels

pytestmark = [needs_library, pytest.mark.every_isa]

ops = torch.ops.fastlora


@dataclass
class Problem:
    """Operands of one group; ``outputs`` and ``columns`` say where each projection lies."""

    x: torch.Tensor
    y: list[torch.Tensor]
    A: list[torch.Tensor]
    B: list[torch.Tensor]
    P: torch.Tensor | None
    outputs: list[int]
    columns: list[int]
    scales: list[float]
    drop: tuple = ()  # seed, p, streams

    @property
    def rank(self) -> int:
        return sum(a.shape[0] for a in self.A)

    def forward(self, moments: bool = True):
        where = (self.outputs, self.columns, self.scales)
        return ops.lora_forward_(self.y, self.x, self.A, self.P, self.B, *where, moments, *self.drop)

    def backward(self, dx, dy, h, outputs=None, probes=0, need=(True, True)):
        where = (self.outputs if outputs is None else outputs, self.columns, self.scales)
        return ops.lora_backward_(dx, dy, self.x, h, self.A, self.B, *where, probes, *need, *self.drop)

    def slices(self, matrices):
        return [matrices[j][:, c : c + b.shape[0]] for j, c, b in zip(self.outputs, self.columns, self.B, strict=True)]


def strided(rows: int, columns: int, dtype: torch.dtype, layout: str) -> torch.Tensor:
    if layout == "slice":
        return torch.randn(rows, columns + 5, dtype=torch.float32).to(dtype)[:, 2 : 2 + columns]
    if layout == "transposed":
        return torch.randn(columns, rows, dtype=torch.float32).to(dtype).t()
    return torch.randn(rows, columns, dtype=torch.float32).to(dtype)


def make(rows, depth, widths, ranks, dtype, adapter=None, fused=False, probes=0, layout="contiguous") -> Problem:
    adapter = adapter or dtype
    shapes = [sum(widths)] if fused else widths
    return Problem(
        x=strided(rows, depth, dtype, layout),
        y=[strided(rows, width, dtype, "slice" if layout == "slice" else "contiguous") for width in shapes],
        A=[strided(rank, depth, adapter, layout) for rank in ranks],
        B=[strided(width, rank, adapter, layout) for width, rank in zip(widths, ranks, strict=True)],
        P=torch.randn(probes, depth).sign() if probes else None,
        outputs=[0] * len(widths) if fused else list(range(len(widths))),
        columns=[sum(widths[:i]) for i in range(len(widths))] if fused else [0] * len(widths),
        scales=[0.5 + 0.75 * i for i in range(len(widths))],
    )


def wide(tensor: torch.Tensor, problem: Problem) -> torch.Tensor:
    """A factor as the passes use it: rounded to x's dtype."""
    return tensor.to(problem.x.dtype).double()


def close(actual: torch.Tensor, exact: torch.Tensor, terms: int, what: str) -> None:
    """fp32 sums of ``terms`` products, one rounding to the result's dtype."""
    assert actual.shape == exact.shape, what
    if exact.numel() == 0:
        return
    scale = exact.abs().max().item()
    eps = torch.finfo(actual.dtype).eps
    allowed = (eps + (8 + terms**0.5) * torch.finfo(torch.float32).eps) * max(scale, 1.0)
    error = (actual.double() - exact).abs().max().item()
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


SHAPES = [
    (33, 50, [40, 17, 9], [3, 0, 5]),
    (1, 1, [1], [1]),
    (0, 5, [3], [2]),
    (7, 65, [130], [17]),
    (200, 31, [64, 64, 5], [8, 8, 8]),
    (61, 2048, [33], [9]),
    (5, 9, [4, 3], [0, 0]),
    (26, 20, [30], [210]),  # more ranks than rows in any block
]
LAYOUTS = ["contiguous", "slice", "transposed"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapter", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_pass(shape, adapter, dtype):
    for index, fused in enumerate((False, True, True)):
        problem = make(*shape, dtype, adapter, fused, probes=index, layout=LAYOUTS[index])
        before = [y.double() for y in problem.y]
        h, moments = problem.forward()
        factors = [wide(t, problem) for t in problem.A] + ([problem.P.double()] if problem.P is not None else [])
        exact_h = problem.x.double() @ torch.cat(factors).t()
        close(h, exact_h, shape[1], "h")
        offset = 0
        for part, b, s in zip(problem.slices(before), problem.B, problem.scales, strict=True):
            part += s * exact_h[:, offset : offset + b.shape[1]] @ wide(b, problem).t()
            offset += b.shape[1]
        for y, exact, sums in zip(problem.y, before, moments, strict=True):
            close(y, exact, shape[1], "y")
            exact_sums = reference.column_moments(y)
            # A sum may cancel: its terms, whose squares' sum is in the second row, set the scale.
            scale = (exact_sums[1] * y.shape[0]).sqrt().clamp(min=1)
            allowed = 32 * torch.finfo(torch.float32).eps * torch.stack([scale, exact_sums[1]])
            assert ((sums - exact_sums).abs() <= allowed).all()
        assert problem.forward(False)[1] == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapter", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward_pass(shape, adapter, dtype):
    for index, fused in enumerate((False, True, True)):
        problem = make(*shape, dtype, adapter, fused, probes=index, layout=LAYOUTS[index])
        rows, depth = problem.x.shape
        h = strided(rows, problem.rank + index, dtype, LAYOUTS[index])
        dx = strided(rows, depth, dtype, "slice" if index == 1 else "contiguous")
        dy = [strided(rows, y.shape[1], dtype, LAYOUTS[index]) for y in problem.y]
        exact_dx, x = dx.double(), problem.x.double()
        dA, dB, Q = problem.backward(dx, dy, h, probes=index)
        assert [t.dtype for t in (*dA, *dB)] == [adapter] * 2 * len(dA)
        offset = 0
        for i, grad in enumerate(problem.slices([g.double() for g in dy])):
            a, b, s = wide(problem.A[i], problem), wide(problem.B[i], problem), problem.scales[i]
            dh = s * grad @ b
            exact_dx += dh @ a
            close(dA[i], dh.t() @ x, rows * max(b.shape[0], 1), "dA")
            close(dB[i], s * grad.t() @ h[:, offset : offset + b.shape[1]].double(), rows, "dB")
            if index:
                assert Q[i].dtype == torch.float32
                close(Q[i], grad.t() @ h[:, problem.rank :].double(), rows, "Q")
            offset += b.shape[1]
        close(dx, exact_dx, shape[1], "dx")
        assert len(Q) == (len(dA) if index else 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (70, 450, [33, 20, 8], [3, 0, 5])], ids=str)
def test_passes_with_dropout(shape, dtype):
    """Each projection sees the x that its own mask leaves, in both directions; the probes see all of it."""
    seed = torch.tensor(-(2**61) + 7)
    for index, p in enumerate((0.1, 0.5, 0.9)):
        problem = make(*shape, dtype, torch.float32, index > 0, probes=index, layout=LAYOUTS[index])
        projections, rows, x = len(problem.A), shape[0], problem.x.double()
        problem.drop = seed, p, [2**32 - 1, 0, 9][:projections]
        seen = [reference.dropout(x, seed, stream, p) for stream in problem.drop[2]]
        before = [y.double() for y in problem.y]
        h, _ = problem.forward()
        parts = [one @ wide(a, problem).t() for one, a in zip(seen, problem.A, strict=True)]
        probes = [] if problem.P is None else [x @ problem.P.double().t()]
        close(h, torch.cat([*parts, *probes], 1), shape[1], "h")
        for own, part, b, s in zip(problem.slices(before), parts, problem.B, problem.scales, strict=True):
            own += s * part @ wide(b, problem).t()
        for found, exact in zip(problem.y, before, strict=True):
            close(found, exact, shape[1], "y")
        dx, dy = strided(rows, shape[1], dtype, "slice"), [strided(*t.shape, dtype, LAYOUTS[index]) for t in problem.y]
        exact_dx = dx.double()
        dA, dB, Q = problem.backward(dx, dy, h, probes=index)
        ranks = h.double().split([*map(len, problem.A), index], 1)
        for i, grad in enumerate(problem.slices([g.double() for g in dy])):
            dh = problem.scales[i] * grad @ wide(problem.B[i], problem)
            exact_dx += reference.dropout(dh @ wide(problem.A[i], problem), seed, problem.drop[2][i], p)
            close(dA[i], dh.t() @ seen[i], rows * max(grad.shape[1], 1), "dA")
            close(dB[i], problem.scales[i] * grad.t() @ ranks[i], rows, "dB")
            if index:
                close(Q[i], grad.t() @ h[:, problem.rank :].double(), rows, "Q")
        close(dx, exact_dx, shape[1], "dx")


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_leaves_out_what_is_not_needed(dtype):
    problem = make(200, 40, [8, 6], [2, 3], dtype)
    problem.drop = torch.tensor(3), 0.4, [5, 1]
    dy, h = [torch.randn(200, n).to(dtype) for n in (8, 6)], torch.randn(200, 5).to(dtype)
    dx = torch.zeros(200, 40, dtype=dtype)
    dA, _, _ = problem.backward(dx, dy, h)
    assert all(map(torch.equal, problem.backward(None, dy, h, need=(True, False))[0], dA))
    alone = torch.zeros_like(dx)
    assert problem.backward(alone, dy, h, need=(False, True))[0] == [] and torch.equal(alone, dx)
    # A projection without a gradient gives nothing, and the other keeps the mask of its place.
    second = torch.zeros_like(dx)
    only, _, _ = problem.backward(second, dy[1:], h, outputs=[-1, 0])
    assert not only[0].any() and torch.equal(only[1], dA[1]) and not torch.equal(second, dx)
    exact = problem.scales[1] * dy[1].double() @ problem.B[1].double() @ problem.A[1].double()
    close(second, reference.dropout(exact, *problem.drop[:1], 1, 0.4), 40, "dx")


def test_what_is_dropped_is_zero_whatever_it_was():
    problem = make(9, 70, [8], [2], torch.float32)
    problem.drop = torch.tensor(11), 0.5, [0]
    gone = reference.dropout(torch.ones_like(problem.x), *problem.drop[:1], 0, 0.5) == 0
    problem.x[gone] = torch.nan
    h, _ = problem.forward()
    dA, _, _ = problem.backward(None, [torch.randn(9, 8)], h)
    assert h.isfinite().all() and dA[0].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths, blocks", [([24, 12, 6], 6), ([64, 128], 2), ([3, 6], 3)])
def test_projections_that_interleave_are_those_of_sorted_columns(widths, blocks, dtype):
    problem = make(75, 40, widths, [3, 17, 5][: len(widths)], dtype, torch.float32, True, probes=2, layout="slice")
    columns, order = interleaved_columns(widths, blocks)
    dy, h = strided(75, sum(widths), dtype, "slice"), strided(75, problem.rank + 2, dtype, "slice")
    start, results = problem.y[0].clone(), []
    for places, own in ((problem.columns, order), (columns, list(range(len(order))))):
        problem.columns, problem.y, dx = places, [start[:, own].clone()], torch.ones_like(problem.x)
        _, (moments,) = problem.forward()
        found = problem.backward(dx, [dy[:, own]], h, probes=2)
        back = torch.tensor(own).argsort()
        results.append([problem.y[0][:, back], moments[:, back], dx, *[t for part in found for t in part]])
    for one, other in zip(*results, strict=True):
        close(other, one.double(), 128, "interleaved")


def test_backward_pass_leaves_out_what_is_not_needed():
    problem = make(40, 12, [8, 6], [2, 3], torch.float32, probes=2)
    dy, h = [torch.randn(40, 8), torch.randn(40, 6)], torch.randn(40, 7)
    dA, dB, Q = problem.backward(torch.zeros(40, 12), dy, h, probes=2)
    only_A = problem.backward(None, dy, h, need=(True, False))
    only_Q = problem.backward(None, dy, h, probes=2, need=(False, False))
    assert all(map(torch.equal, only_A[0], dA)) and only_A[1] == only_A[2] == []
    assert all(map(torch.equal, only_Q[2], Q)) and only_Q[0] == only_Q[1] == []
    assert len(dB) == 2


def test_projection_without_a_gradient_gets_zeros():
    problem = make(40, 12, [8, 6], [2, 3], torch.float32)
    dy, h, dx = [torch.randn(40, 6)], torch.randn(40, 5), torch.zeros(40, 12)
    dA, dB, _ = problem.backward(dx, dy, h, outputs=[-1, 0])
    assert not dA[0].any() and not dB[0].any() and dA[1].any()
    exact = problem.scales[1] * dy[0].double() @ problem.B[1].double() @ problem.A[1].double()
    close(dx, exact, 12, "dx")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("drop", [(), (torch.tensor(5), 0.1, [0, 1, 2])], ids=["", "dropout"])
def test_threads_and_repeatability(drop, dtype):
    problem, results = make(900, 130, [130] * 3, [11] * 3, dtype, torch.float32, True, probes=4), {}
    problem.drop = drop
    start, dy = problem.y[0].clone(), [torch.randn(900, 390).to(dtype)]

    def call():
        problem.y[0].copy_(start)
        dx = torch.ones_like(problem.x)
        h, moments = problem.forward()
        dA, dB, Q = problem.backward(dx, dy, h, probes=4)
        return [h, problem.y[0].clone(), *moments, dx, *dA, *dB, *Q]

    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results[threads] = call()
        assert all(map(torch.equal, call(), results[threads])), f"{threads} threads do not repeat"
    for threads in (2, 3):
        for one, other in zip(results[1], results[threads], strict=True):
            assert (one - other).abs().max() <= 64 * torch.finfo(torch.float32).eps * one.abs().max()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"A": [torch.ones(2, 5)]}, "A has 5 columns, but x has 6"),
        ({"A": [torch.ones(3, 6)]}, "A has 3 rows, but B has 2"),
        ({"B": [torch.ones(4, 2), torch.ones(4, 2)]}, "B has 2 entries, but A has 1"),
        ({"B": [torch.ones(4, 2).double()]}, "B has dtype Double"),
        ({"y": [torch.ones(4, 4)]}, "y has 4 rows, but x has 5"),
        ({"y": [torch.ones(5, 4).half()]}, "y has dtype Half, but x has Float"),
        ({"y": [torch.ones(4, 5).t()]}, "y has column stride 5"),
        ({"outputs": [1]}, "outputs: 1 was asked for, of 1"),
        ({"outputs": [-1]}, "outputs: -1"),
        ({"columns": [1]}, "columns: 1 to 5 were asked for, but there are 4"),
        ({"columns": [0, 2]}, "columns has 2 entries, but outputs has 1"),
        ({"columns": [0, 3, 3]}, "columns: blocks of 3 every 3 were asked for, of 4"),
        ({"columns": [0, 0, 3]}, "columns: blocks of 0 every 3"),
        ({"columns": [0, 2, 1]}, "columns: blocks of 2 every 1"),
        ({"columns": [0, 2, 3]}, "columns: 0 to 5 were asked for, but there are 4"),
        ({"scales": []}, "scales has 0 entries"),
        ({"P": torch.ones(2, 5)}, "P has 5 columns"),
        ({"drop": (torch.tensor(1), 1.0, [0])}, "p is 1"),
        ({"drop": (torch.tensor(1), 0.5, [])}, "streams has 0 entries, but A has 1"),
        ({"drop": (torch.tensor(1), 0.5, [-1])}, "projection is -1"),
        ({"drop": (torch.ones(1), 0.5, [0])}, "seed has 1 dimensions"),
    ],
)
def test_forward_errors(change, message):
    problem = make(5, 6, [4], [2], torch.float32)
    for name, value in change.items():
        setattr(problem, name, value)
    before = [y.clone() for y in problem.y]
    with pytest.raises(RuntimeError, match=message):
        problem.forward()
    assert all(map(torch.equal, before, problem.y))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dx": torch.ones(5, 7)}, "dx has 7 columns, but x has 6"),
        ({"dy": [torch.ones(4, 4)]}, "dy has 4 rows, but x has 5"),
        ({"dy": [torch.ones(5, 4).bfloat16()]}, "dy has dtype BFloat16"),
        ({"h": torch.ones(5, 1)}, "h has 1 columns; rank \\+ probes is 2"),
        ({"probes": -1}, "probes is -1"),
        ({"outputs": [-2]}, "outputs: -2"),
    ],
)
def test_backward_errors(change, message):
    problem = make(5, 6, [4], [2], torch.float32)
    arguments = {"dx": torch.ones(5, 6), "dy": [torch.ones(5, 4)], "h": torch.ones(5, 2), **change}
    with pytest.raises(RuntimeError, match=message):
        problem.backward(**arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_schemas_and_fake_tensors(dtype):
    problem = make(6, 5, [7, 3], [1, 2], dtype, torch.float32, probes=2)
    where = (problem.outputs, problem.columns, problem.scales)
    dy, h, utils = (
        [torch.ones_like(y) for y in problem.y],
        torch.ones(6, 5, dtype=dtype),
        ("test_schema", "test_faketensor"),
    )
    for moments in (True, False):
        arguments = (problem.y, problem.x, problem.A, problem.P, problem.B, *where, moments)
        torch.library.opcheck(ops.lora_forward_.default, arguments, test_utils=utils)
    for dx in (torch.ones_like(problem.x), None):
        arguments = (dx, dy, problem.x, h, problem.A, problem.B, *where, 2, True, dx is None)
        torch.library.opcheck(ops.lora_backward_.default, arguments, test_utils=utils)
    torch.library.opcheck(
        ops.philox_signs_.default, (torch.ones(384), torch.tensor(3), 1, 2, 3, [1, 2]), test_utils=utils
    )
    torch.library.opcheck(
        ops.add_norms_.default, (torch.zeros(2, dtype=torch.float64), torch.ones(5)), test_utils=utils
    )


@pytest.mark.parametrize("seed", [0, 1, -1, 2**62 + 12345])
def test_philox_signs_are_those_of_the_reference(seed):
    seed, counts = torch.tensor(seed), [3, 0, 1, 17]
    for step in (0, 5, 2**32 - 1):
        out = torch.empty(128 * sum(counts))
        ops.philox_signs_(out, seed, step, 7, 2, counts)
        parts = [
            reference.signs(seed, *map(torch.tensor, (step, 7 + group, 2)), 128 * count)
            for group, count in enumerate(counts)
        ]
        assert torch.equal(out, torch.cat(parts))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.ones(100), torch.tensor(1), 0, 0, 1, [1]), "out has 100 elements; counts need 128"),
        ((torch.ones(128), torch.tensor(1), -1, 0, 1, [1]), "step is -1"),
        ((torch.ones(128), torch.tensor(1.0), 0, 0, 1, [1]), "seed has 0 dimensions and dtype Float"),
        ((torch.ones(128), torch.tensor(1), 0, 0, 1, [2, -1]), "counts has -1"),
    ],
)
def test_philox_signs_errors(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        ops.philox_signs_(*arguments)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 1000, 70001])
def test_norms(count):
    tile, sums = torch.randn(count), torch.tensor([1.0, 2.0], dtype=torch.float64)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        mine = sums.clone()
        ops.add_norms_(mine, tile)
        exact = sums + torch.stack([tile.double().square().sum(), tile.double().abs().sum()])
        torch.testing.assert_close(mine, exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("absolute", [True, False])
def test_gradstat(dtype, absolute):
    for depth, width, offsets in ((31, 17, [0, 5, 5, 40]), (64, 600, [0, 40]), (300, 290, [0, 9, 40])):
        x, dy = torch.randn(40, depth).to(dtype), torch.randn(40, width + 3).to(dtype)[:, 2:-1]
        found = native_kernels().gradstat(x, dy, offsets, absolute)
        exact = reference.gradstat(x.double(), dy.double(), offsets)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found[:, 0].double(), exact[:, 0], rtol=1e-5, atol=0)
        assert absolute or not found[:, 1].any()
        if absolute:
            torch.testing.assert_close(found[:, 1].double(), exact[:, 1], rtol=1e-5, atol=0)


def test_gradstat_keeps_no_gradient():
    """The largest tensor made on the way is a tile, not [N, K]."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    x, dy = torch.randn(20, 512), torch.randn(20, 2048)
    with Watch():
        native_kernels().gradstat(x, dy, [0, 20])
    assert largest == 256 * 512 * 4
