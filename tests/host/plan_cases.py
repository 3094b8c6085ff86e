"""Calls of the Triton backend over the null GPU for the checks of plans: every pair of choices occurs in some case."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.ops.backends import BACKENDS
from fastlora.ops.backends.planned import PlannedBackend
from fastlora.ops.layout import SCHEDULED, Dropout, GroupLayout, LoraCall, Need, Rows, segment_tiles

LAYOUTS = {  # rows of each weight, rows of each projection, blocks of each weight
    "separate": ((768, 768, 768), (768, 768, 768), ()),
    "fused": ((1152,), (384, 384, 384), ()),
    "interleaved": ((1152,), (384, 384, 384), (6,)),
    "gqa": ((512, 128, 128), (512, 128, 128), ()),
    "one": ((256,), (256,), ()),
}
RANKS = {"even": (8, 8, 8), "uneven": (8, 16, 4), "odd": (1, 3, 5)}
PROBES = 8


class Case(NamedTuple):
    """One choice of each axis. rows 9000 takes tiles with TMA, columns 1056 the library's matmul."""

    dtype: torch.dtype
    factors: torch.dtype
    layout: str
    ranks: str
    adapters: int  # 0: one that has every row
    p: float
    probes: str
    moments: bool
    rows: int
    columns: int
    memory: str
    bias: str
    dy: str
    need: str

    def __str__(self) -> str:
        return "-".join(str(value).removeprefix("torch.") for value in self)


AXES = Case(
    dtype=(torch.bfloat16, torch.float32, torch.float16),
    factors=(torch.float32, torch.bfloat16),
    layout=tuple(LAYOUTS),
    ranks=tuple(RANKS),
    adapters=(0, 3),
    p=(0.0, 0.1),
    probes=("none", "rows", "columns"),
    moments=(False, True),
    rows=(512, 0, 9000),
    columns=(768, 1056),
    memory=("dense", "rows apart", "off by one", "deep"),
    bias=("all", "none", "first"),
    dy=("all", "shared", "first missing"),
    need=("all", "no dx", "B alone"),
)


def pairs() -> list[Case]:
    """Few cases in which every two values of two axes meet, greedily: the same list every time."""
    axes = [list(values) for values in AXES]
    places = list(itertools.combinations(range(len(axes)), 2))
    missing = {(i, j, a, b) for i, j in places for a in range(len(axes[i])) for b in range(len(axes[j]))}
    cases = []
    while missing:
        i, j, a, b = min(missing)
        chosen = {i: a, j: b}
        for k in range(len(axes)):
            if k not in chosen:
                gains = [sum(_pair(k, v, m, n) in missing for m, n in chosen.items()) for v in range(len(axes[k]))]
                chosen[k] = gains.index(max(gains))
        missing -= {(i, j, chosen[i], chosen[j]) for i, j in places}
        cases.append(Case(*(axes[k][chosen[k]] for k in range(len(axes)))))
    return cases


def _pair(i: int, a: int, j: int, b: int) -> tuple[int, int, int, int]:
    return (i, j, a, b) if i < j else (j, i, b, a)


class Example:
    """The operands of one case: ``forward`` and ``backward`` run them through a backend."""

    def __init__(self, case: Case, device: torch.device):
        self.case, self.device = case, device
        weights, widths, blocks = LAYOUTS[case.layout]
        ranks = [tuple(r * (g + 1) for r in RANKS[case.ranks][: len(widths)]) for g in range(max(case.adapters, 1))]
        empty = self._empty
        W = tuple(empty(n, case.columns) for n in weights)
        bias = tuple(
            empty(n) if case.bias == "all" or (case.bias == "first" and j == 0) else None for j, n in enumerate(weights)
        )
        A = tuple(empty(r, case.columns, dtype=case.factors) for own in ranks for r in own)
        B = tuple(empty(n, r, dtype=case.factors) for own in ranks for n, r in zip(widths, own, strict=True))
        P, probes, width = self._probes(ranks, len(widths))
        self.call = LoraCall(
            self._matrix(case.columns), W, bias, A, B, P, probes, [0.5 + 0.25 * i for i in range(len(A))],
            GroupLayout(W, B, (), blocks), self._rows(), self._drop(), "auto", case.moments,
        )  # fmt: skip
        self.h, self.dy = empty(case.rows, width), self._dy(weights)
        self.need = Need(
            case.need == "all", case.need != "B alone", True, case.need != "B alone" and any(probes), False, False
        )

    def forward(self, backend: Any) -> tuple:
        return backend.forward(self.call)

    def backward(self, backend: Any) -> tuple:
        # As autograd does it: the call is put together anew.
        return backend.backward(self.call._replace(P=(), moments=False), self.h, self.dy, self.need)

    def again(self) -> Example:
        """The same layer with another batch: other tensors, weights and factors apart."""
        other = Example(self.case, self.device)
        kept = {name: getattr(self.call, name) for name in ("W", "bias", "A", "B", "layout", "scale")}
        other.call = other.call._replace(**kept)
        return other

    def _empty(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(*size, dtype=dtype or self.case.dtype, device=self.device)

    def _matrix(self, columns: int, deep: bool = True) -> Tensor:
        rows = self.case.rows
        if self.case.memory == "rows apart":
            return self._empty(rows, columns + 24)[:, :columns]
        if self.case.memory == "off by one":
            return self._empty(rows * columns + 1)[1:].view(rows, columns)
        return self._empty(2, rows // 2, columns) if self.case.memory == "deep" and deep else self._empty(rows, columns)

    def _probes(self, ranks: list[tuple[int, ...]], projections: int) -> tuple[list[Tensor], list[int], int]:
        """P, the probe columns by adapter and the columns of h."""
        case, widest = self.case, max(map(sum, ranks))
        if case.probes == "none":
            return [], [], widest
        if case.probes == "columns" and not case.adapters:
            P = torch.zeros(projections, PROBES, dtype=torch.int64, device=self.device)
            return [P], [PROBES], widest + projections * PROBES
        return [self._empty(PROBES, case.columns) for _ in ranks], [PROBES] * len(ranks), widest + PROBES

    def _rows(self) -> Rows | None:
        rows, adapters, zeros = self.case.rows, self.case.adapters, torch.zeros
        if not adapters:
            return None
        ids, order = (zeros(rows, dtype=torch.int64, device=self.device) for _ in range(2))
        ranges = zeros(adapters, 2, dtype=torch.int64, device=self.device)
        tiles = torch.cat([segment_tiles(ranges, rows, block) for block in SCHEDULED])
        return Rows(ids, order, ranges, tiles)

    def _drop(self) -> Dropout | None:
        case = self.case
        if not case.p:
            return None
        key = torch.zeros((case.rows, 2) if case.adapters else (), dtype=torch.int64, device=self.device)
        return Dropout(key, [case.p, 0.0, case.p][: case.adapters or 1], range(1, 2 * len(LAYOUTS[case.layout][1]), 2))

    def _dy(self, weights: Sequence[int]) -> list[Tensor | None]:
        dy: list[Tensor | None] = [self._matrix(n, deep=False) for n in weights]
        if self.case.dy == "shared" and len(set(weights)) == 1:
            dy = dy[:1] * len(dy)
        if self.case.dy == "first missing" and len(dy) > 1:
            dy[0] = None
        return dy


class Direction(NamedTuple):
    """What a ``PlannedBackend`` hands to its plans; ``fresh()`` gives the inputs of another batch."""

    key: tuple
    inputs: list[Tensor]
    compute: Callable[[list[Tensor]], Sequence[Tensor | None]]
    fresh: Callable[[], list[Tensor]]


class _Handed(Exception):
    pass


class _Taker:
    def run(self, key: tuple, inputs: list[Tensor], compute: Callable) -> None:
        raise _Handed(key, inputs, compute)


def directions(case: Case, device: torch.device) -> dict[str, Direction]:
    """The backend's forward and backward for a case."""
    example, backend = Example(case, device), PlannedBackend(BACKENDS["triton"])
    backend.plans = _Taker()

    def handed(some: Example, name: str) -> tuple:
        try:
            getattr(some, name)(backend)
        except _Handed as found:
            return found.args
        raise AssertionError("the plans were not asked")

    return {
        name: Direction(*handed(example, name), lambda name=name: handed(example.again(), name)[1])
        for name in ("forward", "backward")
    }
