"""Calls of the operators over the null GPU for the checks of plans: every pair of choices occurs in some case."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from fastlora._operator import DA, DB, DW, DX, DZ
from fastlora.grouped import column_starts
from fastlora.segments import build_segments
from torch import Tensor

from fastlora import _grouped_ops, _ops

LAYOUTS = {  # rows of each weight, rows of each projection
    "separate": ((768, 768, 768), (768, 768, 768)),
    "fused": ((1152,), (384, 384, 384)),
    "gqa": ((512, 128, 128), (512, 128, 128)),
    "one": ((256,), (256,)),
}
RANKS = {"even": (8, 8, 8), "uneven": (8, 16, 4), "odd": (1, 3, 5)}
PROBES = 8


class Case(NamedTuple):
    """One choice of each axis. rows 9000 takes tiles with TMA, columns 1056 the library's matmul."""

    dtype: torch.dtype
    factors: torch.dtype
    layout: str
    ranks: str
    adapters: int  # 0: the operator for one adapter
    p: float
    probes: str
    moments: bool
    rows: int
    columns: int
    memory: str
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
    memory=("dense", "rows apart", "off by one"),
    dy=("all", "shared", "first missing"),
    need=("all", "no dx", "base too", "B alone"),
)


def pairs() -> list[Case]:
    """Few cases in which every two values of two axes meet, greedily: the same list every time."""
    axes = [list(values) for values in AXES]
    places = list(itertools.combinations(range(len(axes)), 2))
    missing = {(i, j, a, b) for i, j in places for a in range(len(axes[i])) for b in range(len(axes[j]))}
    cases = []
    while missing:
        chosen: dict[int, int] = {}
        i, j, a, b = min(missing)
        chosen |= {i: a, j: b}
        for k in range(len(axes)):
            if k not in chosen:
                gains = [sum(_pair(k, v, m, n) in missing for m, n in chosen.items()) for v in range(len(axes[k]))]
                chosen[k] = gains.index(max(gains))
        missing -= {(i, j, chosen[i], chosen[j]) for i, j in places}
        cases.append(Case(*(axes[k][chosen[k]] for k in range(len(axes)))))
    return cases


def _pair(i: int, a: int, j: int, b: int) -> tuple[int, int, int, int]:
    return (i, j, a, b) if i < j else (j, i, b, a)


class Direction(NamedTuple):
    """What ``Plans.run`` takes; ``fresh()`` gives other inputs like these."""

    key: tuple
    inputs: list[Tensor]
    compute: Callable[[list[Tensor]], Sequence[Tensor | None]]
    fresh: Callable[[], list[Tensor]]


def matrix(case: Case, rows: int, columns: int, device: torch.device, memory: str | None = None) -> Tensor:
    memory = memory or case.memory
    if memory == "rows apart":
        return torch.empty(rows, columns + 24, dtype=case.dtype, device=device)[:, :columns]
    if memory == "off by one":
        return torch.empty(rows * columns + 1, dtype=case.dtype, device=device)[1:].view(rows, columns)
    return torch.empty(rows, columns, dtype=case.dtype, device=device)


def directions(case: Case, device: torch.device) -> dict[str, Direction]:
    """The operator's forward and backward for a case."""
    parts = _Grouped(case, device) if case.adapters else _Single(case, device)
    return {"forward": parts.forward(), "backward": parts.backward()}


class _Single:
    """The operator for one adapter."""

    def __init__(self, case: Case, device: torch.device):
        self.case, self.device = case, device
        self.weights, widths = LAYOUTS[case.layout]
        self.ranks = [RANKS[case.ranks][: len(widths)] for _ in range(max(case.adapters, 1))]
        self.widths = widths
        self.n = len(widths) * len(self.ranks)
        self.scale = [0.5 + 0.25 * i for i in range(self.n)]
        self.probes = 0 if case.probes == "none" else PROBES
        self.operator = _ops.LORA_LINEAR

    def weight_like(self) -> list[Tensor]:
        case, device = self.case, self.device
        W = [torch.empty(n, case.columns, dtype=case.dtype, device=device) for n in self.weights]
        bias = [torch.empty(n, dtype=case.dtype, device=device) for n in self.weights]
        A = [torch.empty(r, case.columns, dtype=case.factors, device=device) for own in self.ranks for r in own]
        B = [
            torch.empty(n, r, dtype=case.factors, device=device)
            for own in self.ranks
            for n, r in zip(self.widths, own, strict=True)
        ]
        return [*W, *bias, *A, *B]

    def cut(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], ...]:
        w, n = len(self.weights), self.n
        return tensors[:w], tensors[w : 2 * w], tensors[2 * w : 2 * w + n], tensors[2 * w + n :]

    def probe_rows(self) -> list[Tensor]:
        if not self.probes:
            return []
        if self.case.probes == "columns":
            return [torch.zeros(len(self.widths), PROBES, dtype=torch.int64, device=self.device)]
        return [torch.empty(PROBES, self.case.columns, dtype=self.case.dtype, device=self.device)]

    def rest(self) -> list[Tensor]:
        """Further inputs: the seed of dropout."""
        return [torch.zeros((), dtype=torch.int64, device=self.device)] if self.case.p else []

    def hidden(self) -> Tensor:
        width = sum(self.ranks[0]) + self.probes * (len(self.widths) if self.case.probes == "columns" else 1)
        return torch.empty(self.case.rows, width, dtype=self.case.dtype, device=self.device)

    def need(self) -> list[bool]:
        need = [True, True, True, bool(self.probes), False, False]
        need[DX] = self.case.need != "no dx"
        need[DA] = self.case.need != "B alone"
        need[DW] = need[DW + 1] = self.case.need == "base too"
        if self.case.need == "B alone":
            need[DX] = need[DZ] = False
        assert need[DB]
        return need

    def dy(self) -> list[Tensor]:
        made = [matrix(self.case, self.case.rows, n, self.device) for n in self.weights]
        if self.case.dy == "shared" and len(set(self.weights)) == 1:
            made = made[:1] * len(made)
        return made[1:] if self.case.dy == "first missing" and len(made) > 1 else made

    def forward(self) -> Direction:
        case = self.case
        moments = [None] if case.moments else []

        def inputs() -> list[Tensor]:
            x = matrix(case, case.rows, case.columns, self.device)
            return [x, *self.weight_like(), *self.probe_rows(), *self.rest()]

        def compute(given: Sequence[Tensor]) -> Sequence[Tensor | None]:
            x, *given = given
            seed = given.pop() if case.p else None
            P = given.pop() if self.probes else None
            W, bias, A, B = self.cut(given)
            return self.operator.forward(
                x, W, bias, A, B, [], moments, P, None, seed, self.scale, case.p, "triton", "auto"
            )

        return Direction((str(case), "forward"), inputs(), compute, inputs)

    def backward(self) -> Direction:
        case = self.case

        def inputs() -> list[Tensor]:
            x = matrix(case, case.rows, case.columns, self.device)
            return [*self.dy(), x, self.hidden(), *self.weight_like(), *self.rest()]

        made = inputs()
        live = len(self.dy())

        def compute(given: Sequence[Tensor]) -> Sequence[Tensor | None]:
            dy, x, h, *given = [*given[:live]], *given[live:]
            dy = [None] * (len(self.weights) - live) + dy
            seed = given.pop() if case.p else None
            W, _, A, B = self.cut(given)
            return self.operator.backward(
                dy, x, h, W, A, B, seed, self.scale, case.p, self.probes, self.need(), "triton", "auto"
            )

        return Direction((str(case), "backward"), made, compute, inputs)


class _Grouped(_Single):
    """The operator for rows of several adapters."""

    def __init__(self, case: Case, device: torch.device):
        super().__init__(case, device)
        self.operator = _grouped_ops.LORA_GROUPED
        self.ranks = [tuple(min(64, r * (g + 1)) for r in own) for g, own in enumerate(self.ranks)]
        flat = [r for own in self.ranks for r in own]
        self.starts = column_starts(flat, len(self.widths))
        self.each = [self.probes] * case.adapters
        self.p = [case.p, 0.0, case.p][: case.adapters]

    def probe_rows(self) -> list[Tensor]:
        case = self.case
        return [torch.empty(k, case.columns, dtype=case.dtype, device=self.device) for k in self.each if self.probes]

    def rest(self) -> list[Tensor]:
        ids = torch.zeros(self.case.rows, dtype=torch.int64, device=self.device)
        order, ranges = build_segments(ids, self.case.adapters)
        keys = torch.zeros(self.case.rows, 2, dtype=torch.int64, device=self.device)
        return [ids, order, ranges, *([keys] if self.case.p else [])]

    def hidden(self) -> Tensor:
        width = max(map(sum, self.ranks)) + self.probes
        return torch.empty(self.case.rows, width, dtype=self.case.dtype, device=self.device)

    def _rows(self, given: list[Tensor]) -> tuple[Any, ...]:
        keys = given.pop() if self.case.p else None
        ranges, order, ids = given.pop(), given.pop(), given.pop()
        return keys, ids, order, ranges, self.starts, self.scale, self.p

    def forward(self) -> Direction:
        plain, case = super().forward(), self.case

        def compute(given: Sequence[Tensor]) -> Sequence[Tensor | None]:
            x, *given = given
            rows = self._rows(given)
            P = [given.pop() for _ in self.each][::-1] if self.probes else []
            W, bias, A, B = self.cut(given)
            moments = [None] if case.moments else []
            return self.operator.forward(x, W, bias, A, B, [], moments, P, [], *rows, "triton", "auto")

        return plain._replace(compute=compute)

    def backward(self) -> Direction:
        plain, live = super().backward(), len(self.dy())

        def compute(given: Sequence[Tensor]) -> Sequence[Tensor | None]:
            dy, x, h, *given = [*given[:live]], *given[live:]
            dy = [None] * (len(self.weights) - live) + dy
            rows = self._rows(given)
            W, _, A, B = self.cut(given)
            return self.operator.backward(dy, x, h, W, A, B, *rows, self.each, self.need(), "triton", "auto")

        return plain._replace(compute=compute)
