"""``fastlora inspect``: the ranks of an adapter's files, as a table, a map and a picture."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from .._utils.installed import blame_extra
from .._utils.reporting import aligned_lines
from ..peft_io.folder import AdapterFolder, read_folder
from ..peft_io.matrices import factor_pairs


class Row(NamedTuple):
    """One matrix of an adapter; ``part`` is a slice of a split q/k/v, or empty."""

    path: str
    part: str
    rank: int
    scale: float
    out_features: int
    in_features: int

    @property
    def params(self) -> int:
        return self.rank * (self.out_features + self.in_features)

    @property
    def key(self) -> str:
        return f"{self.path}[{self.part}]" if self.part else self.path

    @property
    def place(self) -> tuple[int, str]:
        """Depth (the first number of the path, -1 without) and what the matrix is called there."""
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", self.path)
        rest = self.path[number.end() :] if number else self.path
        return int(number[1]) if number else -1, (f"{rest}[{self.part}]" if self.part else rest)


def rows(folder: AdapterFolder) -> list[Row]:
    """Every matrix of the adapter, from the first layer to the last."""
    found: list[Row] = []
    for path, (A, B) in factor_pairs(folder).items():
        scale = folder.fields.scale(path)
        parts = folder.side.split.get(path) if folder.side else None
        if parts is None:
            found.append(Row(path, "", A.shape[0], scale, B.shape[0], A.shape[1]))
            continue
        found += [Row(path, p.name, p.rank, scale * p.scale_ratio, p.rows, A.shape[1]) for p in parts]
    return sorted(found, key=lambda row: (row.place[0], row.path))


def describe(path: str | Path) -> str:
    """Table of ranks, scales and parameters, then the rank map: depth by matrix. Raises as ``load`` does."""
    found = rows(read_folder(path))
    table = [("matrix", "rank", "scale", "N", "K", "parameters")]
    table += [
        (row.key, str(row.rank), f"{row.scale:g}", str(row.out_features), str(row.in_features), f"{row.params:,}")
        for row in found
    ]
    ranks, params = sum(row.rank for row in found), sum(row.params for row in found)
    total = f"{len(found)} matrices, rank {ranks} in all, {params:,} parameters"
    return "\n".join([*aligned_lines(table), total, "", *aligned_lines(rank_map(found))])


def rank_map(found: list[Row]) -> list[tuple[str, ...]]:
    """Header of matrices, then a row for each depth; empty where there is no adapter."""
    columns = list(dict.fromkeys(row.place[1] for row in found))
    ranks: dict[int, dict[str, int]] = {}
    for row in found:
        depth, name = row.place
        ranks.setdefault(depth, {})[name] = row.rank
    lines = [("-" if n < 0 else str(n), *(str(ranks[n].get(name, "")) for name in columns)) for n in sorted(ranks)]
    return [("depth", *columns), *lines]


def draw(path: str | Path, picture: Path) -> None:
    """The rank map as a picture; ``ImportError`` without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        blame_extra(error, "--plot", "demo", "matplotlib")
        raise
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    header, *lines = rank_map(rows(read_folder(path)))
    grid: list[list[Any]] = [[float(cell) if cell else float("nan") for cell in line[1:]] for line in lines]
    figure, axis = plt.subplots(figsize=(1.5 + 0.9 * len(header), 1.2 + 0.3 * len(lines)), constrained_layout=True)
    shown = axis.imshow(grid, aspect="auto", vmin=0)
    axis.set_xticks(range(len(header) - 1), header[1:], rotation=30, ha="right")
    axis.set_yticks(range(len(lines)), [line[0] for line in lines])
    axis.set_ylabel("depth")
    for y, line in enumerate(lines):
        for x, cell in enumerate(line[1:]):
            light = cell and shown.norm(float(cell)) < 0.6
            axis.text(x, y, cell, ha="center", va="center", color="white" if light else "black")
    figure.colorbar(shown, label="rank")
    figure.savefig(picture, dpi=144)
    plt.close(figure)
