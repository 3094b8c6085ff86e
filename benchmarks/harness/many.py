"""One batch of many adapters, run by us and by others: what the benchmark of many adapters compares."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlora
from fastlora.ops import reference

from .peers import LABELS, Model
from .shapes import ALPHA, Problem

# Relative error in the Frobenius norm, as the gate of the layer benchmark has it for fp32.
TOLERANCE = 1e-5
LABELS |= {
    "bare": "frozen nn.Linear",
    "mixed": "fastlora, all adapters in one batch",
    "loop": "Python loop over index_select",
    "separate": "fastlora, each adapter alone on its rows, one after another",
}

Factors = list[list[tuple[Tensor, Tensor, float]]]  # (A [r, K], B [N, r], scale) by adapter and projection


def draw_factors(problem: Problem, ranks: Sequence[int]) -> Factors:
    """Every adapter's q, k, v factors, B far from zero."""
    generator, width = torch.Generator().manual_seed(1), problem.shape.width
    out: Factors = []
    for rank in ranks:
        own = []
        for n in problem.shape.outputs:
            A = torch.randn(rank, width, generator=generator) * width**-0.5
            own.append((A, torch.randn(n, rank, generator=generator) * 0.1, ALPHA / rank))
        out.append(own)
    return out


@dataclass
class Mixed:
    """``fastlora.use_adapters(model, ids)`` around one forward and backward: building the rows' order is in the time.

    ids int64 [S] (a sample each) or [M] (a token each), or None: one adapter without a context.
    """

    problem: Problem
    factors: Factors
    ids: Tensor | None
    name: str = "mixed"
    every: int = 1
    tracker: None = None
    model: nn.Module = field(init=False)
    x: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.x, self.dy = self.problem.x.clone().requires_grad_(), self.problem.split(self.problem.dy, dim=2)
        self.model = self._model()
        self.leaves = [self.x, *(t for own in self.pairs() for a, b in own for t in (a, b))]

    def _model(self) -> nn.Module:
        model = Model(self.problem)
        for g, own in enumerate(self.factors):
            config = fastlora.LoraConfig(r=len(own[0][0]), lora_alpha=ALPHA, target_modules="qkv", split_qkv=True)
            if g == 0:
                fastlora.inject(model, config)
            else:
                fastlora.add_adapter(model, f"a{g}", config)
        self.names = ["default", *(f"a{g}" for g in range(1, len(self.factors)))] if self.factors else []
        for name, own in zip(self.names, self.factors, strict=True):
            pairs = [pair for layer in model.attn.names for pair in getattr(model.attn, layer).pairs(name)]
            for (a, b, s), (A, B, scale) in zip(pairs, own, strict=True):
                a.data.copy_(A)
                b.data.copy_(B)
                assert s == scale
        return model

    def pairs(self) -> list[list[tuple[Tensor, Tensor]]]:
        """The parameters (A, B) by adapter and projection."""
        layers = [getattr(self.model.attn, name) for name in self.model.attn.names]
        return [[(a, b) for layer in layers for a, b, _ in layer.pairs(name)] for name in self.names]

    def forget(self) -> None:
        """Nothing is kept between calls."""

    def call(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None
        self.run()

    def run(self) -> list[Tensor]:
        """The outputs of one forward, after its backward."""
        with fastlora.use_adapters(self.model, self.ids) if self.ids is not None else nullcontext():
            y = self.model(self.x)
        torch.autograd.backward(y, self.dy)
        return y

    def gradients(self) -> dict[str, Tensor]:
        """Output and gradients of one call; gradients of an adapter without rows are zero."""
        for leaf in self.leaves:
            leaf.grad = None
        found = {"y": torch.cat([out.detach().flatten(0, -2) for out in self.run()], dim=-1), "dx": self.dx()}
        for g, own in enumerate(self.pairs()):
            for i, (a, b) in enumerate(own):
                found |= {f"dA[{g}][{i}]": _grad(a), f"dB[{g}][{i}]": _grad(b)}
        return found

    def dx(self) -> Tensor:
        return self.x.grad.flatten(0, -2)


def _grad(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


class _LoopAttention(nn.Module):
    """Each projection adds ``s B A x`` adapter by adapter to the rows that ``index_select`` takes out."""

    def __init__(self, problem: Problem, factors: Factors, rows: list[Tensor]):
        super().__init__()
        self.bases, self.rows, self.fused = Model(problem).attn, rows, problem.shape.fused
        self.scale = [own[0][2] for own in factors]
        self.A = nn.ParameterList([a.clone() for own in factors for a, _, _ in own])
        self.B = nn.ParameterList([b.clone() for own in factors for _, b, _ in own])

    def forward(self, x: Tensor) -> list[Tensor]:
        names, outputs = self.bases.names, []
        flat, count = x.flatten(0, -2), len(self.A) // max(len(self.rows), 1)
        for j, name in enumerate(names):
            base = getattr(self.bases, name)
            y, mine = F.linear(flat, base.weight, base.bias), range(count) if self.fused else (j,)
            for g, rows in enumerate(self.rows):
                if not rows.numel():
                    continue
                seen = flat.index_select(0, rows)
                updates = [seen @ self.A[g * count + i].t() @ self.B[g * count + i].t() for i in mine]
                update = updates[0] if len(updates) == 1 else torch.cat(updates, dim=1)
                y.index_add_(0, rows, update, alpha=self.scale[g])
            outputs.append(y.view(*x.shape[:-1], -1))
        return outputs


@dataclass
class Loop(Mixed):
    """The usual way in a few lines of torch. Which rows are whose it is told beforehand, outside of the time."""

    name: str = "loop"

    def _model(self) -> nn.Module:
        self.names = [str(g) for g in range(len(self.factors))]
        rows = rows_of(self.problem, self.ids, len(self.factors))
        return _LoopAttention(self.problem, self.factors, rows)

    def pairs(self) -> list[list[tuple[Tensor, Tensor]]]:
        both = list(zip(self.model.A, self.model.B, strict=True))
        count = len(both) // len(self.factors)
        return [both[g * count : (g + 1) * count] for g in range(len(self.factors))]

    def run(self) -> list[Tensor]:
        y = self.model(self.x)
        torch.autograd.backward(y, self.dy)
        return y


@dataclass
class Separate(Mixed):
    """Each adapter's rows, taken out beforehand, through the same layers, one adapter after another."""

    name: str = "separate"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.own = []
        for name, rows in zip(self.names, rows_of(self.problem, self.ids, len(self.names)), strict=True):
            if rows.numel():
                x = self.problem.x.flatten(0, -2)[rows].requires_grad_()
                self.own.append((name, rows, x, [dy.flatten(0, -2)[rows] for dy in self.dy]))
                self.leaves.append(x)

    def run(self) -> list[Tensor]:
        found = []
        for name, _, x, dy in self.own:
            with fastlora.use_adapters(self.model, name):
                y = self.model(x)
            torch.autograd.backward(y, dy)
            found.append(y)
        place = torch.cat([rows for _, rows, _, _ in self.own]).argsort()
        return [torch.cat([y[j] for y in found])[place] for j in range(len(self.dy))]

    def call(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None
        for name, _, x, dy in self.own:
            with fastlora.use_adapters(self.model, name):
                y = self.model(x)
            torch.autograd.backward(y, dy)

    def dx(self) -> Tensor:
        place = torch.cat([rows for _, rows, _, _ in self.own]).argsort()
        return torch.cat([x.grad for _, _, x, _ in self.own])[place]


def by_row(problem: Problem, ids: Tensor | None) -> Tensor:
    """The adapter of every row."""
    rows = problem.shape.rows
    if ids is None:
        return torch.zeros(rows, dtype=torch.int64)
    return ids.repeat_interleave(rows // ids.numel())


def rows_of(problem: Problem, ids: Tensor | None, adapters: int) -> list[Tensor]:
    """The rows of every adapter."""
    each = by_row(problem, ids)
    return [(each == g).nonzero()[:, 0] for g in range(adapters)]


def expected(problem: Problem, factors: Factors, ids: Tensor | None) -> dict[str, Tensor]:
    """Output and gradients in float64 by the formula of every row, named as ``Mixed.gradients`` names them."""
    x = problem.flat(problem.x).requires_grad_()
    weight, bias, dy = problem.weight.double(), problem.bias.double(), problem.flat(problem.dy)
    A, B = ([f[k].double().requires_grad_() for own in factors for f in own] for k in (0, 1))
    scale = [f[2] for own in factors for f in own]
    (y,) = reference.lora_grouped(x, [weight], [bias], A, B, scale, by_row(problem, ids))
    y.backward(dy)
    found, count = {"y": y.detach(), "dx": x.grad}, len(problem.shape.outputs)
    for at in range(len(A)):
        where = f"[{at // count}][{at % count}]"
        found |= {f"dA{where}": _grad(A[at]), f"dB{where}": _grad(B[at])}
    return found


def check(variant: Mixed, exact: dict[str, Tensor]) -> float:
    """The largest relative error against float64; ``AssertionError`` names what is wrong."""
    found, errors = variant.gradients(), {}
    for name, value in exact.items():
        size = float(value.norm())
        errors[name] = float((found[name].double() - value).norm()) / (size or 1.0)
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE}
    assert not wrong, f"{variant.name}: relative errors above {TOLERANCE}: {wrong}"
    return max(errors.values())
