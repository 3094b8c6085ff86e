"""Problems, poisoned allocations and float64 answers for the kernel tests; the same on a GPU and in the interpreter."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastlora.ops import reference
from fastlora.ops.backends import triton as triton_backend
from fastlora.ops.layout import Layout, group_layout

DEVICE = os.environ.get("FASTLORA_KERNEL_DEVICE", "cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SCALES = (2.0, 0.7, 1.3, 0.9)


@dataclass(frozen=True)
class Problem:
    """Sizes of one group: outputs of the weights, widths and ranks of the projections that tile them."""

    M: int
    K: int
    outputs: tuple[int, ...]
    widths: tuple[int, ...]
    ranks: tuple[int, ...]
    probes: int = 0
    blocks: tuple[int, ...] = ()


SEPARATE = Problem(35, 34, (33, 17, 20), (33, 17, 20), (3, 1, 5), 4)
FUSED = Problem(24, 32, (48,), (16, 16, 16), (4, 0, 2), 8)
TINY = Problem(1, 5, (3,), (3,), (1,))
WIDE_RANK = Problem(17, 20, (18,), (18,), (70,), 3)
EVEN = Problem(17, 32, (16, 16), (16, 16), (8, 24), 8)
INTERLEAVED = Problem(24, 32, (48, 20), (24, 12, 12, 20), (4, 0, 2, 3), 4, (4, 1))
# The weight whose columns interleave has no bias, and the one beside it has.
BARE = Problem(24, 32, (20, 48), (20, 24, 12, 12), (3, 4, 0, 2), 4, (1, 4))
EMPTY = Problem(0, 16, (16, 8), (16, 8), (2, 3), 2)
PROBLEMS = {"separate": SEPARATE, "fused": FUSED, "tiny": TINY, "wide_rank": WIDE_RANK, "even": EVEN, "empty": EMPTY,
            "interleaved": INTERLEAVED, "bare": BARE}  # fmt: skip


class Data:
    """Random operands of a problem. ``strided`` pads every row, so that row strides differ from widths."""

    def __init__(self, problem: Problem, dtype: torch.dtype, factor_dtype: torch.dtype | None = None, strided=False):
        self.problem, self.dtype, self.strided = problem, dtype, strided
        factor_dtype = factor_dtype or dtype
        s = problem
        self.x = self.matrix(s.M, s.K)
        self.W = [self.matrix(n, s.K, s.K**-0.5) for n in s.outputs]
        self.bias = [self.matrix(1, n)[0] if j != 1 else None for j, n in enumerate(s.outputs)]
        self.A = [self.matrix(r, s.K, s.K**-0.5, factor_dtype) for r in s.ranks]
        self.B = [self.matrix(n, r, 1.0, factor_dtype) for n, r in zip(s.widths, s.ranks, strict=True)]
        self.dy: list[Tensor | None] = [self.matrix(s.M, n) for n in s.outputs]
        self.P = torch.randn(s.probes, s.K, device=DEVICE).sign().to(factor_dtype) if s.probes else None
        self.scale = SCALES[: len(s.ranks)]
        self.seed = torch.randint(2**62, (), device=DEVICE)

    def matrix(self, rows: int, columns: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        whole = scale * torch.randn(rows, columns + (3 if self.strided else 0), device=DEVICE)
        return whole.to(dtype or self.dtype)[:, :columns]

    @property
    def layout(self) -> Layout:
        return group_layout(self.W, self.B, self.problem.blocks)

    @property
    def runs(self) -> Any:
        return triton_backend.runs_of(self.layout)

    @property
    def places(self) -> list[tuple[int, int]]:
        return list(zip(self.layout.outputs, self.layout.columns, strict=True))

    def slices(self) -> list[Tensor | None]:
        """dy of every projection."""
        return [
            None if self.dy[j] is None else self.layout.columns_of(self.dy[j], i)
            for i, j in enumerate(self.layout.outputs)
        ]

    def parts(self) -> list[Tensor | None]:
        """dy of every projection as the kernels take it beside ``runs``: its first column, and as many as it has."""
        return [
            None if self.dy[j] is None else self.dy[j].narrow(1, c, n)
            for j, c, n in zip(self.layout.outputs, self.layout.columns, self.layout.widths, strict=True)
        ]


def wide(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().double().cpu()


def expected_h(data: Data, p: float = 0.0) -> Tensor:
    """h in float64."""
    x, seed = wide(data.x), data.seed.cpu()
    parts = [(reference.dropout(x, seed, i, p) if p else x) @ wide(a.to(data.dtype)).T for i, a in enumerate(data.A)]
    if data.P is not None:
        parts.append(x @ wide(data.P).T)
    return torch.cat(parts, dim=1)


def expected_dh(data: Data) -> Tensor:
    dh = torch.zeros(data.problem.M, data.layout.rank, dtype=torch.float64)
    for part, b, o, s in zip(data.slices(), data.B, data.layout.offsets, data.scale, strict=True):
        if part is not None:
            dh[:, o : o + b.shape[1]] = s * (wide(part) @ wide(b.to(data.dtype)))
    return dh


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative distance; NaN anywhere, or a wrong shape, is infinitely far."""
    if tuple(found.shape) != tuple(wanted.shape) or not torch.isfinite(found).all():
        return float("inf")
    distance = (wide(found) - wanted).norm()
    return 0.0 if distance == 0 else float(distance / wanted.norm().clamp_min(1e-30))


def assert_close(found: Tensor, wanted: Tensor, dtype: torch.dtype, name: str = "") -> None:
    off = error(found, wanted)
    assert off <= TOLERANCE[dtype], f"{name}: relative error {off:.2e} > {TOLERANCE[dtype]:.0e}"


def assert_replayed(step, leaves):
    """A CUDA graph of ``step`` leaves the gradients of an eager one, bit for bit."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(4):
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
