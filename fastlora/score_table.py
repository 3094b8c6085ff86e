"""Scores by projection and by depth: where in a model importance lies."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from .scores import finite_floats

# A block's path ends at its number; stages hold blocks ("layers.0.blocks.1").
_BLOCK = re.compile(r"((?:.*?\.)?\d+(?:\.blocks\.\d+)?)\.(.+)")


@dataclass(frozen=True)
class Breakdown:
    """Mean score of each projection and of each block, and every score by (block, projection); prints as a table."""

    by_projection: Mapping[str, float]
    by_depth: Mapping[str, float]
    cells: Mapping[tuple[str, str], float]

    def __str__(self) -> str:
        head = ["block", *self.by_projection, "mean"]
        rows = []
        for block, mean in self.by_depth.items():
            values = [self.cells.get((block, projection)) for projection in self.by_projection]
            rows.append([block, *("" if v is None else f"{v:.3g}" for v in values), f"{mean:.3g}"])
        overall = math.fsum(self.cells.values()) / len(self.cells)
        rows.append(["mean", *(f"{v:.3g}" for v in self.by_projection.values()), f"{overall:.3g}"])
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        lines = ["  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
                 for row in [head, *rows]]  # fmt: skip
        return "\n".join(line.rstrip() for line in [lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def breakdown(scores: Mapping[str, float]) -> Breakdown:
    """Means of scores by projection (``attn.qkv[q]``) and by block (``blocks.0``), in the order of the scores.

    A key's block is its path up to the first number (and on to ``blocks.<n>`` inside a stage), its projection the rest;
    a key without a number is a projection of the block "". Raises ``ValueError`` for no scores or values that are not
    finite.
    """
    values = finite_floats(scores, "scores")
    if not values:
        raise ValueError("scores must not be empty")
    cells: dict[tuple[str, str], float] = {}
    for key, value in values.items():
        found = _BLOCK.fullmatch(key)
        cells[found.groups() if found else ("", key)] = value
    return Breakdown(_means(cells, 1), _means(cells, 0), cells)


def _means(cells: Mapping[tuple[str, str], float], position: int) -> dict[str, float]:
    grouped: dict[str, list[float]] = {}
    for cell, value in cells.items():
        grouped.setdefault(cell[position], []).append(value)
    return {name: math.fsum(values) / len(values) for name, values in grouped.items()}
