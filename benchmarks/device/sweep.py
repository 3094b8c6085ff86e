"""``python -m device.sweep --output FOLDER``: times every tile of ``tiling.py``, its neighbours and the strategies.

The fastest of each line is what ``fastlora/kernels/tiling.py`` should hold for that verb and shape.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from fastlora.kernels import gradstat, linear, linear_backward, shrink, wgrad
from fastlora.kernels.tiling import TileConfig, committed

from .cases import CASES, PROBES, TINY, Case
from .measure import captured, time_calls

STRATEGIES = ("fused", "library", "augmented")


class Operands:
    """Tensors of one case; factors fp32, as adapters are by default."""

    def __init__(self, case: Case, device: str):
        def make(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.randn(*size, device=device).to(dtype)

        self.x = make(case.rows, case.width)
        self.W = [make(n, case.width) for n in case.outputs]
        self.bias = [make(n) for n in case.outputs]
        self.A = [make(case.rank, case.width, dtype=torch.float32) for _ in case.outputs]
        self.P = make(PROBES, case.width, dtype=torch.float32)
        self.B = [make(n, case.rank, dtype=torch.float32) for n in case.outputs]
        self.dy = [make(case.rows, n) for n in case.outputs]
        self.offsets = [case.rank * i for i in range(3)]
        self.ranks, self.scales, self.rank = [case.rank] * 3, [2.0] * 3, 3 * case.rank
        self.h, self.dh = make(case.rows, self.rank + PROBES), make(case.rows, self.rank)
        self.places = [(i, 0) for i in range(3)]
        self.runs = torch.tensor([0, case.rows], device=device)


def calls(o: Operands, verb: str, tile: TileConfig | None, strategy: str) -> Callable[[], object]:
    """The call that exercises a verb with a tile."""
    if verb == "shrink":
        return lambda: shrink.shrink(o.x, [*o.A, o.P], 1, tiles=tile)
    if verb == "shrink dy":
        return lambda: shrink.shrink_backward(o.dy, o.B, o.offsets, o.scales, o.rank, tile)
    if verb == "linear":
        return lambda: linear.linear(
            o.x, o.W, o.bias, o.h, o.B, o.places, o.offsets, o.scales, False, strategy, tile
        )  # fmt: skip
    if verb == "linear_backward":
        return lambda: linear_backward.linear_backward(o.dy, o.W, o.dh, o.A, o.offsets, strategy=strategy, tiles=tile)
    if verb == "wgrad":
        return lambda: wgrad.wgrad(o.x, o.dh, o.dy, o.h, o.offsets, o.ranks, o.scales, PROBES, tiles=tile)
    return lambda: gradstat.gradstat(o.x, o.dy[0], o.runs, tile)


def neighbours(tile: TileConfig) -> Iterator[TileConfig]:
    """The tile, and those with another depth, number of stages, warps or rows."""
    yield tile
    yield tile._replace(depth=tile.depth // 2 if tile.depth > 32 else tile.depth * 2)
    yield tile._replace(stages=tile.stages - 1)
    yield tile._replace(warps=12 - tile.warps if tile.warps in (4, 8) else 4)
    if tile.rows >= 64:
        yield tile._replace(rows=tile.rows // 2)


def candidates(verb: str) -> list[tuple[str, TileConfig | None]]:
    """(strategy, tile) pairs worth timing for a verb."""
    name = verb.split()[0]
    tiles = [t for v, kind, entry in committed() if v == name and kind == "half" for t in neighbours(entry.tile)]
    found: list[tuple[str, TileConfig | None]] = [("fused", t) for t in dict.fromkeys(tiles)]
    if name.startswith("linear"):
        expands = [entry.tile for v, kind, entry in committed() if v == "expand" and kind == "half"]
        found += [("library", t) for e in expands for t in neighbours(e)] + [("augmented", None)]
    return found


def main() -> None:
    """Time all candidates, most promising verbs first, until the time is up."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--output", type=Path, default=Path("."))
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--dry-run", action="store_true", help="names the candidates; runs none")
    given = parser.parse_args()
    rows, limit = [], time.monotonic() + given.seconds
    for verb in ("linear", "linear_backward", "wgrad", "shrink", "shrink dy", "gradstat"):
        for case in (TINY if given.dry_run else CASES).values():
            operands = Operands(case, "cpu" if given.dry_run else "cuda")
            for strategy, tile in candidates(verb):
                call = calls(operands, verb, tile, strategy)
                if given.dry_run or time.monotonic() > limit:
                    continue
                try:
                    times = time_calls(captured(call), 1, "cuda", 20)
                except Exception as problem:  # a tile that does not fit is a result too
                    times = {"error": f"{type(problem).__name__}: {problem}"[:200]}
                rows.append({"verb": verb, "case": case.name, "strategy": strategy, "tile": tile, **times})
    for verb, name in dict.fromkeys((r["verb"], r["case"]) for r in rows):
        timed = [r for r in rows if (r["verb"], r["case"]) == (verb, name) and "median_ms" in r]
        for r in sorted(timed, key=lambda r: r["median_ms"])[:3]:
            print(f"{verb:16s} {name:18s} {r['strategy']:10s} {r['median_ms']:.4f} ms  {tuple(r['tile'] or ())}")
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "sweep.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
