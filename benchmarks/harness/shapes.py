"""The shapes and dtypes of the layer benchmarks, and the numbers that every variant of one shape shares."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

ALPHA = 16.0


@dataclass(frozen=True)
class Shape:
    """Query, key and value projections of one attention block, fused in one matrix or separate."""

    name: str
    model: str
    batch: int
    tokens: int
    width: int
    outputs: tuple[int, int, int]
    rank: int
    fused: bool
    calls: int = 1  # calls of the layer within one timed round
    rounds: int = 31
    emulated_rounds: int = 5  # for a dtype whose matmul this CPU emulates

    @property
    def rows(self) -> int:
        return self.batch * self.tokens


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("S1", "DeiT-Base qkv", 8, 197, 768, (768, 768, 768), 8, fused=True),
        Shape("S2", "RoBERTa-Base q, k, v", 32, 64, 768, (768, 768, 768), 8, fused=False),
        Shape("S3", "grouped-query q, k, v", 4, 128, 2048, (2048, 512, 512), 16, fused=False),
        Shape("S4", "tiny qkv", 1, 64, 384, (384, 384, 384), 4, True, calls=20, rounds=61, emulated_rounds=21),
    )
}


# Sized for a GPU, where ``benchmarks/device.sh`` measures them in bf16. Here in fp32 and few rounds, and the large ones
# only when asked for.
ANCHORS = {
    shape.name: shape
    for shape in (
        Shape("A1", "DeiT-Base qkv, 25,216 tokens", 128, 197, 768, (768, 768, 768), 8, fused=True, rounds=5),
        Shape("A2", "RoBERTa-Base q, k, v, 4,096 tokens", 64, 64, 768, (768, 768, 768), 8, fused=False, rounds=7),
        Shape("A3", "Llama-3-8B q, k, v, 8,192 tokens", 8, 1024, 4096, (4096, 1024, 1024), 16, False, rounds=3),
    )
}
CPU_LIMIT = 5e10  # operations of one forward and backward


def too_large(shape: Shape) -> bool:
    """Whether a CPU takes seconds for one call."""
    return 4 * shape.rows * shape.width * sum(shape.outputs) > CPU_LIMIT


@dataclass(frozen=True)
class Target:
    """At most ``limit`` of what ``measure`` divides by; in percent for the cost of statistics."""

    variant: str
    measure: str
    limit: float


# Of PEFT's time, on the CPU that the targets were set on: fastlora, and the frozen layer on that CPU's fastest matmul.
# What another CPU's matmul allows is not in these numbers: there the quotient of the two, over the frozen layer, binds.
_SET = {
    ("S1", "fp32"): (0.42, 0.38), ("S1", "bf16"): (0.52, 0.42),
    ("S2", "fp32"): (0.42, 0.37), ("S2", "bf16"): (0.54, 0.45),
    ("S3", "fp32"): (0.45, 0.40), ("S3", "bf16"): (0.70, 0.59),
    ("S4", "fp32"): (0.45, 0.37), ("S4", "bf16"): (0.50, 0.39),
}  # fmt: skip
_PYTHON = 0.60  # of PEFT, S1 to S3 in fp32


def targets(shape: str, dtype: str) -> list[Target]:
    """Everything that is asked of a shape and dtype."""
    limit, floor = _SET[shape, dtype]
    found = [Target("fastlora", "ratio_to_peft", limit), Target("fastlora", "ratio_to_frozen", round(limit / floor, 2))]
    if shape != "S4":
        if dtype == "fp32":
            found.append(Target("python", "ratio_to_peft", _PYTHON))
            found.append(Target("python", "ratio_to_frozen", round(_PYTHON / floor, 2)))
        found.append(Target("act_var_step", "ratio_to_fastlora", 1.01))
    return found


# A whole training step: q, k, v replaced, every frozen linear on the fastest matmul, statistics at their default.
MODEL_TARGETS = [
    Target("fastlora", "ratio_to_peft", 0.87),
    Target("model_accelerated", "ratio_to_peft", 0.60),
    Target("model_probes", "ratio_to_fastlora", 1.01),
]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def bf16_matmul() -> str | None:
    """The instruction set that multiplies bf16 in hardware on this CPU, or None."""
    if torch.cpu._is_amx_tile_supported():
        return "amx"
    return "avx512_bf16" if torch.cpu._is_avx512_bf16_supported() else None


@dataclass(frozen=True)
class Projection:
    """One A, B pair as a variant holds it, and the columns of the concatenated output that it adds to."""

    A: Tensor
    B: Tensor
    scale: float
    columns: slice


@dataclass
class Problem:
    """Input, frozen weights, non-zero adapters and output gradient of a shape, in one dtype."""

    shape: Shape
    dtype: torch.dtype
    seed: int = 0
    x: Tensor = field(init=False)
    weight: Tensor = field(init=False)
    bias: Tensor = field(init=False)
    dy: Tensor = field(init=False)

    def __post_init__(self) -> None:
        s, self.generator = self.shape, torch.Generator().manual_seed(self.seed)
        total = sum(s.outputs)
        self.x = self._normal(s.batch, s.tokens, s.width)
        self.weight = self._normal(total, s.width, std=s.width**-0.5)
        self.bias = self._normal(total, std=0.1)
        self.dy = self._normal(s.batch, s.tokens, total)

    def _normal(self, *size: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=self.generator) * std).to(self.dtype)

    @property
    def scale(self) -> float:
        return ALPHA / self.shape.rank

    def factors(self, out_features: int) -> tuple[Tensor, Tensor]:
        """A fresh (A [r, K], B [N, r]) with B far from zero."""
        rank, width = self.shape.rank, self.shape.width
        return self._normal(rank, width, std=width**-0.5), self._normal(out_features, rank, std=0.1)

    def split(self, tensor: Tensor, dim: int = 0) -> list[Tensor]:
        """A tensor over all outputs as the layers take it: whole if fused, one contiguous part each if separate."""
        if self.shape.fused:
            return [tensor]
        return [part.contiguous() for part in tensor.split(list(self.shape.outputs), dim)]

    @cached_property
    def base(self) -> tuple[Tensor, Tensor]:
        """``x W^T + bias`` and ``dy W`` in float64, rows flattened."""
        weight = self.weight.double()
        y = torch.addmm(self.bias.double(), self.flat(self.x), weight.t())
        return y, self.flat(self.dy) @ weight

    @staticmethod
    def flat(tensor: Tensor) -> Tensor:
        return tensor.detach().reshape(-1, tensor.shape[-1]).double()

    def expected(self, projections: list[Projection]) -> dict[str, Tensor]:
        """Output and gradients in float64 of the layer with these adapters: y, dx, and dA[i], dB[i]."""
        (y, dx), x, dy = self.base, self.flat(self.x), self.flat(self.dy)
        y, dx, gradients = y.clone(), dx.clone(), {}
        for i, p in enumerate(projections):
            A, B, mine = p.A.detach().double(), p.B.detach().double(), dy[:, p.columns]
            h, dh = x @ A.t(), p.scale * mine @ B
            y[:, p.columns] += p.scale * h @ B.t()
            dx += dh @ A
            gradients |= {f"dA[{i}]": dh.t() @ x, f"dB[{i}]": p.scale * mine.t() @ h}
        return {"y": y, "dx": dx, **gradients}
