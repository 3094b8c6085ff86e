"""The rows of a batch by adapter: built once for each number of rows, shared by every layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import native, reference
from .grouped import Rows


def build_segments(ids: Tensor, adapters: int) -> tuple[Tensor, Tensor]:
    """``(order, ranges)`` of rows sorted stably by id: see ``fastlora.reference.build_segments``."""
    if native.has_kernel("build_segments", ids.device):
        return torch.ops.fastlora.build_segments(ids, adapters)
    return reference.build_segments(ids, adapters)


class Batch:
    """The adapter of every sample or token of a batch, and its rows in a layer that sees them.

    ``ids`` int64 indexes ``names``, -1 meaning the frozen model alone: [S] (one a sample, dimension 0 of what a layer
    sees), or [S, T] or [M] (one a token). ``row_seeds``, of the same shape as ids [S], makes a row's dropout depend on
    its sample's seed, the layer and the place in the sample alone.
    """

    def __init__(self, names: Sequence[str], ids: Tensor, row_seeds: Tensor | None = None):
        self.names, self.ids, self.row_seeds = tuple(names), ids, row_seeds
        self._rows: dict[tuple[int, torch.device], Rows] = {}
        self._present: list[str] | None = None
        self._entries: dict[tuple[int, torch.device], Tensor] = {}

    def _times(self, x: Tensor) -> int:
        """Rows of a layer's input for each id."""
        rows, given = x.shape[:-1].numel(), self.ids.numel()
        if self.ids.dim() == 1 and x.dim() > 1 and x.shape[0] == given:
            return rows // max(given, 1)
        if rows == given:
            return 1
        raise ValueError(
            f"ids: {tuple(self.ids.shape)} given, but a layer sees an input of shape {tuple(x.shape)}; accepted: one a "
            f"sample ({x.shape[0]}, dimension 0) or one a token ({rows})"
        )

    def rows(self, x: Tensor) -> Rows:
        """The rows of ``x`` [*, K] by adapter."""
        times = self._times(x)
        if torch.compiler.is_compiling():
            return self._build(times, x.device)
        key = (times, x.device)
        if key not in self._rows:
            self._rows[key] = self._build(times, x.device)
        return self._rows[key]

    def _build(self, times: int, device: torch.device) -> Rows:
        ids = self.ids.reshape(-1).to(device, non_blocking=True)
        ids = ids.repeat_interleave(times) if times > 1 else ids
        return Rows(ids, *build_segments(ids, len(self.names)))

    def keys(self, x: Tensor, seed: Tensor, stream: int) -> Tensor:
        """Dropout keys of the rows of ``x``: from ``seed`` and the row, or from the row's own seed and the layer."""
        rows = x.shape[:-1].numel()
        if self.row_seeds is None:
            return reference.row_keys(seed, rows)
        times = self._times(x)
        seeds = self.row_seeds.reshape(-1).to(x.device, non_blocking=True).repeat_interleave(times)
        place = torch.arange(times, device=x.device).repeat(seeds.shape[0] // max(times, 1))
        return torch.stack([seeds, place + (stream << 32)], dim=1)

    def present(self) -> list[str]:
        """The adapters that have an id (reads them back from a device)."""
        if self._present is None:
            found = torch.bincount(self.ids.reshape(-1) + 1, minlength=len(self.names) + 1)[1:].tolist()
            self._present = [name for name, count in zip(self.names, found, strict=True) if count]
        return self._present

    def samples(self, name: str) -> int | Tensor:
        """How many ids are an adapter's: a tensor where they are on a device, so that nothing waits for it."""
        count = (self.ids == self.names.index(name)).sum()
        return int(count) if count.device.type == "cpu" and not torch.compiler.is_compiling() else count

    def select(self, name: str, x: Tensor) -> tuple[Tensor, bool]:
        """Where an adapter is in ``x`` [*, K]: entries of dimension 0, or (True) of its flattened rows.

        Reads ids back from a device, once for all layers.
        """
        flat = not (self.ids.dim() == 1 and x.dim() > 1 and x.shape[0] == self.ids.numel())
        key = (self.names.index(name), x.device)
        if torch.compiler.is_compiling():
            return self._entries_of(*key), flat
        if key not in self._entries:
            self._entries[key] = self._entries_of(*key)
        return self._entries[key], flat

    def _entries_of(self, index: int, device: torch.device) -> Tensor:
        return (self.ids.reshape(-1) == index).nonzero()[:, 0].to(device, non_blocking=True)
