"""A layer seen as some of its rows, or transposed (Conv1D)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.matmul import UNPACKED
from .adapter import Slices
from .linear import Linear, forward_together, forward_traced


class LayerView:
    """A layer with another weight and bias; adapters, modes and statistics are the layer's own.

    With ``rows`` it is that part of the layer's output: weight [rows, K], and B and the statistics of these rows.
    """

    # The weight is a new tensor at every call: packing it would never pay.
    engine = UNPACKED

    def __init__(self, layer: Linear, weight: Tensor, bias: Tensor | None, rows: slice | None = None, count: float = 1):
        self.layer, self.weight, self.bias = layer, weight, bias
        self.parts = None if rows is None else _parts(layer, rows)
        self.slices, self.probes, self.dropout_salt = layer.slices, layer.probes, layer.dropout_salt
        if rows is not None:
            self.slices = Slices({name: part.stop - part.start for name, part in self.parts.items()})
            # Parts see other rows, and have other dropout.
            self.dropout_salt = (layer.dropout_salt + rows.start) & 0x7FFFFFFF
            self.probes = {name: PartOfProbe(probe, rows, self.parts, count) for name, probe in layer.probes.items()}
        self.out_features = sum(self.slices.values())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def pairs(self, adapter: str) -> list[tuple[Tensor, Tensor, float]]:
        """As ``Linear.pairs``, of the rows that are seen."""
        return self._mine(self.layer.pairs(adapter))

    def factor_pairs(self, adapter: str, A: Any, B: Any) -> list[tuple[Tensor, Tensor, float]]:
        """As ``Linear.factor_pairs``, of the rows that are seen."""
        return self._mine(self.layer.factor_pairs(adapter, A, B))

    def _mine(self, whole: list[tuple[Tensor, Tensor, float]]) -> list[tuple[Tensor, Tensor, float]]:
        if self.parts is None:
            return whole
        pairs = dict(zip(self.layer.slices, whole, strict=True))
        return [(pairs[name][0], pairs[name][1][part], pairs[name][2]) for name, part in self.parts.items()]

    def __call__(self, x: Tensor) -> Tensor:
        route = self.layer.entered()
        if self.layer.bypassed(route):
            return F.linear(x, self.weight, self.bias)
        if torch.compiler.is_compiling():
            return forward_traced(self, x, route)
        return forward_together((self,), x, route)[0]


def _parts(layer: Linear, rows: slice) -> dict[str, slice]:
    """The rows of each slice that lie in ``rows``, counted from the slice's first."""
    found = {}
    for name in layer.slices:
        mine = layer.slices.rows(name)
        start, stop = max(mine.start, rows.start), min(mine.stop, rows.stop)
        if start < stop:
            found[name] = slice(start - mine.start, stop - mine.start)
    return found


class PartOfProbe:
    """The statistics of some rows of a layer, added to the layer's own.

    The moments of a layer have one count of the rows of x: the part with the layer's first row brings it, and the
    others are weighed by ``count`` = (rows of x of that part) / (rows of x of this one).
    """

    def __init__(self, probe: Any, rows: slice, parts: dict[str, slice], count: float):
        self.probe, self.width = probe, rows.stop - rows.start
        self.taken = _Widened(probe.taken, rows, probe.width)
        self.Z = {name: probe.Z[name][part] for name, part in parts.items()} if probe.Z else {}
        self.V = None
        if probe.V is not None:
            first = rows.start == 0
            columns, number = probe.V[:, rows], probe.V[:, -1:]
            self.V = torch.cat([columns * count, number if first else number * 0.0], dim=1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.probe, name)

    def follow(self, weight: Tensor) -> None:
        """The leaves are the layer's own, whose parts are no leaves: autograd brings gradients to their dtype."""

    def operands(self, probes: list[PartOfProbe], x: Tensor, route: Any, samples: int | None = None) -> dict[str, Any]:
        return type(self.probe).operands(self, probes, x, route, samples)

    def tap(self, x: Tensor, y: Tensor, route: Any, name: str) -> Tensor:
        return type(self.probe).tap(self, x, y, route, name)


class _Widened:
    """Takes contributions of some rows of a layer, and adds them to the layer's with zeros for its other rows."""

    def __init__(self, taken: list, rows: slice, width: int):
        self.taken, self.beside = taken, (rows.start, width - rows.stop)

    def append(self, contribution: Any) -> None:
        self.taken.append(contribution._replace(dy=F.pad(contribution.dy, self.beside)))


class Conv1D(Linear):
    r"""transformers' ``Conv1D`` with a low-rank update; made by ``inject`` by a change of class.

    .. math:: y = x W + b + s\, x A^\top B^\top

    ``weight`` [K, N] and ``bias`` [N] stay as they are; A [r, K] and B [N, r] are those of a ``Linear``. Slices of a
    fused [q, k, v] are columns of the weight. Made with arguments, which are those of :class:`Linear`, it has a weight
    of that layout. Errors (``TypeError``, ``ValueError``) are as there.

    >>> from transformers.pytorch_utils import Conv1D
    >>> config = fastlora.LoraConfig(r=2, target_modules=["0"])
    >>> layer = fastlora.inject(nn.Sequential(Conv1D(6, 8)), config)[0]
    >>> layer.delta().shape, layer.as_matrix(layer.weight).shape
    (torch.Size([8, 6]), torch.Size([6, 8]))
    """

    def forward(self, x: Tensor) -> Tensor:
        return LayerView(self, self.weight.t(), self.bias)(x)

    def delta(self, adapter: str | None = None) -> Tensor:
        """``s (B A)^T`` of the whole weight [K, N]; ``adapter``: the active one unless named."""
        return super().delta(adapter).t()

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.t()
