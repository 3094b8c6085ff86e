"""Batches of many adapters, and their loop over adapters in float64."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

ops = torch.ops.fastlora
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RANKS = [1, 2, 3, 5, 8, 16, 17, 64, 128]
DISTRIBUTIONS = ["distinct", "uniform", "identical", "zipf", "skewed", "base"]


def segments(ids: torch.Tensor, adapters: int, direct: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Order and ranges of a batch; ``direct`` leaves the order empty: rows must be grouped already."""
    key = torch.where(ids < 0, adapters, ids)
    _, order = torch.sort(key, stable=True)
    counts = torch.bincount(key, minlength=adapters + 1)[:adapters]
    ends = counts.cumsum(0)
    ranges = torch.stack([ends - counts, ends], 1)
    if direct:
        firsts = [(ids == g).nonzero()[0, 0] if counts[g] else torch.tensor(0) for g in range(adapters)]
        begin = torch.stack([*firsts, torch.tensor(0)])[:adapters]
        return order[:0], torch.stack([begin, begin + counts], 1)
    ranges[counts == 0] = 0
    return order, ranges


def draw_ids(distribution: str, rows: int, adapters: int) -> torch.Tensor:
    """Adapter of every row, in no particular order; a tenth of the rows of mixed batches is base only."""
    if distribution == "base":
        return torch.full((rows,), -1)
    if distribution == "identical":
        return torch.full((rows,), adapters - 1)
    if distribution == "distinct":
        return torch.randperm(max(rows, adapters))[:rows] % adapters
    weights = {
        "uniform": torch.ones(adapters),
        "zipf": 1.0 / torch.arange(1, adapters + 1),
        "skewed": torch.tensor([50.0 * adapters] + [1.0] * (adapters - 1)),
    }[distribution]
    ids = torch.multinomial(weights, rows, replacement=True) if rows else torch.zeros(0, dtype=torch.int64)
    return torch.where(torch.rand(rows) < 0.1, -1, ids)


def strided(rows: int, columns: int, dtype: torch.dtype, layout: str = "contiguous") -> torch.Tensor:
    """Random values; a slice is surrounded by NaN."""
    if layout == "slice":
        out = torch.full((rows, columns + 5), torch.nan, dtype=dtype)[:, 2 : 2 + columns]
        return out.copy_(torch.randn(rows, columns))
    if layout == "transposed":
        return torch.randn(columns, rows).to(dtype).t()
    return torch.randn(rows, columns).to(dtype)


@dataclass
class Batch:
    """Operands of one call; lists of factors are adapter-major."""

    x: torch.Tensor
    y: list[torch.Tensor]
    dy: list[torch.Tensor]
    dx: torch.Tensor
    A: list[torch.Tensor]
    B: list[torch.Tensor]
    P: list[torch.Tensor]
    ids: torch.Tensor
    order: torch.Tensor
    ranges: torch.Tensor
    outputs: list[int]
    columns: list[int]
    scales: list[float]
    starts: list[int]  # of each adapter: the first columns of its projections in h, and the end
    probes: list[int] = field(default_factory=list)

    @property
    def projections(self) -> int:
        return len(self.outputs)

    @property
    def width(self) -> int:
        return max((self.rank(g) + self.probes[g] for g in range(self.adapters)), default=0)

    @property
    def adapters(self) -> int:
        return self.ranges.shape[0]

    def factors(self, g: int) -> tuple[list[torch.Tensor], list[torch.Tensor], list[float]]:
        mine = slice(g * self.projections, (g + 1) * self.projections)
        return self.A[mine], self.B[mine], self.scales[mine]

    def rank(self, g: int) -> int:
        return sum(a.shape[0] for a in self.factors(g)[0])

    def where(self):
        return self.order, self.ranges, self.outputs, self.columns, self.scales, self.starts

    def forward(self, moments: bool = True, op=None):
        op = op or ops.lora_grouped_forward_
        return op(self.y, self.x, self.A, self.P, self.B, *self.where(), moments)

    def backward(self, h, need=(True, True), dx=True, op=None, probes=None):
        op = op or ops.lora_grouped_backward_
        probes = self.probes if probes is None else probes
        return op(self.dx if dx else None, self.dy, self.x, h, self.A, self.B, *self.where(), probes, *need)


def make(
    ids, adapters, depth, widths, ranks, dtype=torch.float32, adapter=None, fused=False, probes=(0,), layout="slice",
    direct=False,
) -> Batch:  # fmt: skip
    """``ranks[(g * n + i) % len(ranks)]`` is the rank of projection i of adapter g; ``probes`` repeats too."""
    rows, count, adapter = len(ids), len(widths), adapter or dtype
    rank = [ranks[at % len(ranks)] for at in range(adapters * count)]
    shapes = [sum(widths)] if fused else widths
    k = [probes[g % len(probes)] for g in range(adapters)]
    starts = [sum(rank[g * count : g * count + i]) for g in range(adapters) for i in range(count + 1)]
    order, ranges = segments(ids, adapters, direct)
    return Batch(
        x=strided(rows, depth, dtype, layout),
        y=[strided(rows, width, dtype, "contiguous" if layout == "transposed" else layout) for width in shapes],
        dy=[strided(rows, width, dtype, layout) for width in shapes],
        dx=strided(rows, depth, dtype, "contiguous" if layout == "transposed" else layout),
        A=[strided(r, depth, adapter, layout) for r in rank],
        B=[strided(widths[at % count], r, adapter, layout) for at, r in enumerate(rank)],
        P=[strided(p, depth, torch.float32, layout) for p in k] if any(k) else [],
        ids=ids, order=order, ranges=ranges,
        outputs=[0] * count if fused else list(range(count)),
        columns=[sum(widths[:i]) for i in range(count)] if fused else [0] * count,
        scales=[0.5 + 0.25 * (at % 7) for at in range(len(rank))],
        starts=starts, probes=k,
    )  # fmt: skip


def rounded(factor: torch.Tensor, batch: Batch) -> torch.Tensor:
    """A factor as the passes use it: in x's dtype."""
    return factor.to(batch.x.dtype).double()


def loop_forward(batch: Batch):
    """h and y after the update, in float64."""
    h = torch.zeros(len(batch.ids), batch.width, dtype=torch.float64)
    y = [t.double() for t in batch.y]
    for g in range(batch.adapters):
        rows = (batch.ids == g).nonzero()[:, 0]
        A, B, scales = batch.factors(g)
        stacked = torch.cat([rounded(t, batch) for t in [*A, *batch.P[g : g + 1]]])
        mine = batch.x.double().index_select(0, rows) @ stacked.t()
        h[rows, : mine.shape[1]] = mine
        offset = 0
        for j, column, b, s in zip(batch.outputs, batch.columns, B, scales, strict=True):
            part = s * mine[:, offset : offset + b.shape[1]] @ rounded(b, batch).t()
            y[j][:, column : column + b.shape[0]].index_add_(0, rows, part)
            offset += b.shape[1]
    return h, y


def loop_backward(batch: Batch, h: torch.Tensor, outputs=None):
    """dx, dA, dB and Q in float64."""
    dx, dA, dB, Q = batch.dx.double(), [], [], []
    for g in range(batch.adapters):
        rows = (batch.ids == g).nonzero()[:, 0]
        x, mine = batch.x.double()[rows], h.double()[rows]
        first, offset = batch.rank(g), 0
        places = zip(outputs or batch.outputs, batch.columns, *batch.factors(g), strict=True)
        for j, column, a, b, s in places:
            rank = b.shape[1]
            grad = (
                batch.dy[j].double()[rows, column : column + b.shape[0]] if j >= 0 else x.new_zeros(len(rows), len(b))
            )
            dh = s * grad @ rounded(b, batch)
            dx.index_add_(0, rows, dh @ rounded(a, batch))
            dA.append(dh.t() @ x)
            dB.append(s * grad.t() @ mine[:, offset : offset + rank])
            Q.append(grad.t() @ mine[:, first : first + batch.probes[g]])
            offset += rank
    return dx, dA, dB, Q


def close(actual: torch.Tensor, exact: torch.Tensor, terms: int, what: str) -> None:
    """fp32 sums of ``terms`` products, one rounding to the result's dtype."""
    assert actual.shape == exact.shape, what
    if exact.numel() == 0:
        return
    eps = torch.finfo(actual.dtype).eps
    allowed = (eps + (8 + terms**0.5) * torch.finfo(torch.float32).eps) * max(exact.abs().max().item(), 1.0)
    error = (actual.double() - exact).abs().max().item()
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"
