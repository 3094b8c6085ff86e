"""An adapter on a layer: factors by slice, initialisation, and the operand lists kept between calls."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops import native
from ..ops.layout import column_starts

if TYPE_CHECKING:
    from .linear import Linear


WHOLE = "weight"  # name of the one slice of a matrix that is not split


class Factors(nn.Module):
    """A or B of one adapter: one parameter a slice, ``None`` where the rank is 0."""

    def __init__(self, tensors: Mapping[str, Tensor | None]):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor))

    def extra_repr(self) -> str:
        return ", ".join(f"{n}: {'rank 0' if p is None else tuple(p.shape)}" for n, p in self._parameters.items())


@dataclass(frozen=True)
class AdapterSpec:
    """What a layer knows of an adapter besides its tensors: scaling by slice, dropout, initialisation."""

    scale: Mapping[str, float]
    dropout: float
    init: bool | str
    dtype: torch.dtype

    def with_scale(self, scale: Mapping[str, float]) -> AdapterSpec:
        return replace(self, scale=dict(scale))


def new_factors(
    slices: Mapping[str, int], ranks: Mapping[str, int], in_features: int, spec: AdapterSpec, device: torch.device
) -> tuple[Factors, Factors]:
    """Fresh (A, B): A Kaiming uniform (``"gaussian"``: normal / r), B zero; ``init=False`` draws B like A.

    slices: name -> N; ranks: name -> r; A [r, K], B [N, r].
    """
    A: dict[str, Tensor | None] = {}
    B: dict[str, Tensor | None] = {}
    for name, out_features in slices.items():
        rank = ranks[name]
        if rank == 0:
            A[name] = B[name] = None
            continue
        a = torch.empty(rank, in_features, device=device, dtype=spec.dtype)
        b = torch.zeros(out_features, rank, device=device, dtype=spec.dtype)
        if spec.init == "gaussian":
            nn.init.normal_(a, std=1 / rank)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        if spec.init is False:
            nn.init.kaiming_uniform_(b, a=math.sqrt(5))
        A[name], B[name] = a, b
    return Factors(A), Factors(B)


class Operands(NamedTuple):
    """Factors and scales by adapter, then projection, and each adapter's prefix sums of ranks one after another."""

    A: list[Tensor]
    B: list[Tensor]
    scale: list[float]
    starts: list[int]


class _Entry(NamedTuple):
    """One adapter on the layers, and what it was made from: another entry is made when that is another."""

    made_from: tuple
    places: list[tuple[dict, dict, str, Linear]]  # of every projection: the parameters of A and B, the slice, its layer
    scale: list[float]
    ranks: list[int]


class OperandCache:
    """Where the factors of every adapter lie; a change to one adapter packs that one alone.

    ``layout`` is the ``RankLayout`` of the layers, its adapters those of ``names``; None without the native library.
    """

    def __init__(self, layers: Sequence[Linear]):
        self.layers, self.names = tuple(layers), []
        self._entries: dict[str, _Entry] = {}
        self._changes: list[int] = []
        self._batch: tuple[tuple[str, ...], list[float], list[int]] | None = None
        widths = [rows for layer in layers for rows in layer.slices.values()]
        self.layout = None if native.RankLayout is None else native.RankLayout([], widths, layers[0].in_features)

    def operands(self, names: tuple[str, ...]) -> Operands:
        """Those of a batch with the adapters ``names``; one that no layer has, has rank 0."""
        changes = [layer.changes for layer in self.layers]
        if changes != self._changes:
            self._update(changes)
        if self._batch is None or self._batch[0] != names:
            self._batch = self._lay_out(names)
        A, B = [], []
        for name in names:
            entry = self._entries[name]
            for (parameters_A, parameters_B, place, layer), rank in zip(entry.places, entry.ranks, strict=True):
                a, b = parameters_A.get(place), parameters_B.get(place)
                if a is None or b is None:
                    a = layer.weight.new_empty((0, layer.in_features))
                    b = layer.weight.new_empty((layer.slices[place], 0))
                if a.shape[0] != rank or b.shape[1] != rank:
                    raise ValueError(
                        f"adapter {name!r}: A is {tuple(a.shape)} and B {tuple(b.shape)}, but its rank was {rank}; "
                        "change ranks with fastlora.set_ranks"
                    )
                A.append(a)
                B.append(b)
        return Operands(A, B, self._batch[1], self._batch[2])

    def _lay_out(self, names: tuple[str, ...]) -> tuple[tuple[str, ...], list[float], list[int]]:
        for name in names:
            if name not in self._entries:
                self._put(name)
        scale = [s for name in names for s in self._entries[name].scale]
        if self.layout is None:
            ranks = [rank for name in names for rank in self._entries[name].ranks]
            return names, scale, column_starts(ranks, sum(len(layer.slices) for layer in self.layers))
        places = {name: at for at, name in enumerate(self.names)}
        return names, scale, self.layout.select([places[name] for name in names]).column_starts()

    def _update(self, changes: list[int]) -> None:
        """Take in what was added, removed or given other ranks since the last look."""
        self._batch = None
        for name in list(self.names):
            if not any(name in layer.adapter_specs for layer in self.layers):
                self._drop(name)
            elif any(a is not b for a, b in zip(self._entries[name].made_from, self._sources(name), strict=True)):
                self._put(name)
        self._changes = changes

    def _sources(self, name: str) -> tuple[Any, ...]:
        found: list[Any] = []
        for layer in self.layers:
            has = name in layer.adapter_specs
            found += [layer.lora_A[name], layer.lora_B[name], layer.adapter_specs[name]] if has else [None, None, None]
        return tuple(found)

    def _put(self, name: str) -> None:
        entry = self._entry(name)
        if self.layout is not None:
            if name in self._entries:
                self.layout = self.layout.with_ranks(self.names.index(name), entry.ranks)
            else:
                self.layout = self.layout.add_adapter(entry.ranks)
        if name not in self._entries:
            self.names.append(name)
        self._entries[name] = entry

    def _drop(self, name: str) -> None:
        if self.layout is not None:
            self.layout = self.layout.delete_adapter(self.names.index(name))
        self.names.remove(name)
        del self._entries[name]

    def _entry(self, name: str) -> _Entry:
        places, scale, ranks = [], [], []
        for layer in self.layers:
            spec = layer.adapter_specs.get(name)
            A = layer.lora_A[name]._parameters if spec else {}
            B = layer.lora_B[name]._parameters if spec else {}
            for place in layer.slices:
                a = A.get(place)
                places.append((A, B, place, layer))
                scale.append(spec.scale[place] if spec else 1.0)
                ranks.append(0 if a is None else a.shape[0])
        return _Entry(self._sources(name), places, scale, ranks)


def operand_cache(layers: Sequence[Linear]) -> OperandCache:
    """The packing of layers that run together, made at their first call."""
    key = tuple(map(id, layers))  # of layers that the packing keeps alive
    kept = layers[0].operand_caches
    if key not in kept:
        kept[key] = OperandCache(layers)
    return kept[key]
