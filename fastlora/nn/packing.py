"""The adapters of layers that run together, laid out once: what the grouped operator takes, kept between calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from ..grouped import column_starts

if TYPE_CHECKING:
    from .linear import Linear


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


class Packing:
    """The factors of every adapter of some layers; a change to one adapter packs that one alone."""

    def __init__(self, layers: Sequence[Linear]):
        self.layers = tuple(layers)
        self.entries: dict[str, _Entry] = {}
        self._changes: list[int] = []
        self._batch: tuple[tuple[str, ...], list[float], list[int]] | None = None

    def operands(self, names: tuple[str, ...]) -> Operands:
        """Those of a batch with the adapters ``names``; one that no layer has, has rank 0."""
        changes = [layer.changes for layer in self.layers]
        if changes != self._changes:
            self._update(changes)
        if self._batch is None or self._batch[0] != names:
            self._batch = self._lay_out(names)
        A, B = [], []
        for name in names:
            entry = self.entries[name]
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
            if name not in self.entries:
                self.entries[name] = self._entry(name)
        entries = [self.entries[name] for name in names]
        ranks = [rank for entry in entries for rank in entry.ranks]
        starts = column_starts(ranks, sum(len(layer.slices) for layer in self.layers))
        return names, [s for entry in entries for s in entry.scale], starts

    def _update(self, changes: list[int]) -> None:
        """Take in what was added, removed or given other ranks since the last look."""
        self._batch = None
        for name, entry in list(self.entries.items()):
            if not any(name in layer.adapter_specs for layer in self.layers):
                del self.entries[name]
            elif any(a is not b for a, b in zip(entry.made_from, self._sources(name), strict=True)):
                self.entries[name] = self._entry(name)
        self._changes = changes

    def _sources(self, name: str) -> tuple[Any, ...]:
        found: list[Any] = []
        for layer in self.layers:
            has = name in layer.adapter_specs
            found += [layer.lora_A[name], layer.lora_B[name], layer.adapter_specs[name]] if has else [None, None, None]
        return tuple(found)

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


def packing_of(layers: Sequence[Linear]) -> Packing:
    """The packing of layers that run together, made at their first call."""
    key = tuple(map(id, layers))  # of layers that the packing keeps alive
    kept = layers[0].packings
    if key not in kept:
        kept[key] = Packing(layers)
    return kept[key]
