"""``python -m device.sweep --write``: times every tile of ``tiling.py``, its neighbours and the strategies.

The fastest of each verb and shape goes into ``kernels/tiling.py``, which then decides by them. All candidates are
compiled first, on every core: one after the other that takes minutes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fastlora.kernels import (
    expand_backward,
    gradstat,
    linear,
    linear_backward,
    shrink,
    shrink_linear,
    shrink_linear_backward,
    wgrad,
)
from fastlora.kernels.tiling import Measurement, TileConfig, committed
from harness import result_files

from .cases import CASES, PROBES, TINY, Case
from .measure import CACHE_BYTES, DRY_RUN, captured, device_of, time_calls

STRATEGIES = ("fused", "library", "augmented", "separate")
# Verb -> the name under which ``choose_strategy`` knows its strategies.
DIRECTIONS = {"linear": "forward", "linear_backward": "backward"} | {
    verb: verb for verb in ("shrink_linear", "shrink_linear_backward", "expand_backward")
}
# The most promising first, should the time run out.
VERBS = ("linear", "linear_backward", "shrink_linear", "shrink_linear_backward", "expand_backward", "wgrad", "shrink",
         "shrink_backward", "gradstat", "gradstat_diagonal")  # fmt: skip
TILING = Path(__file__).parents[2] / "kernels" / "tiling.py"


# A graph of fewer kernels would time its own launch.
CALLS = 20
# Relative error, in the norm, that rounding sums to bf16 explains; a wrong tile misses by far more.
ROUNDING = 4 * 2.0**-8


class Operands:
    """Tensors of one case, one weight where it is fused; factors fp32, as adapters are by default."""

    def __init__(self, case: Case, device: str):
        def make(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.randn(*size, device=device).to(dtype)

        self.x = make(case.rows, case.width)
        outputs = [case.total] if case.fused else case.outputs
        self.W = [make(n, case.width) for n in outputs]
        self.bias = [make(n) for n in outputs]
        self.A = [make(case.rank, case.width, dtype=torch.float32) for _ in case.outputs]
        self.P = make(PROBES, case.width, dtype=torch.float32)
        self.B = [make(n, case.rank, dtype=torch.float32) for n in case.outputs]
        self.dy = [make(case.rows, n) for n in outputs]
        self.parts = list(self.dy[0].split(case.outputs, 1)) if case.fused else self.dy
        self.offsets = [case.rank * i for i in range(3)]
        self.ranks, self.scales, self.rank = [case.rank] * 3, [2.0] * 3, 3 * case.rank
        self.h, self.dh = make(case.rows, self.rank + PROBES), make(case.rows, self.rank)
        columns = [sum(case.outputs[:i]) for i in range(3)]
        self.places = [(0, column) for column in columns] if case.fused else [(i, 0) for i in range(3)]
        self.runs = torch.tensor([0, case.rows], device=device)


def calls(o: Operands, verb: str, tile: TileConfig | None, strategy: str) -> Callable[[], object]:
    """The call that exercises a verb with a tile."""
    if verb == "shrink":
        return lambda: shrink.shrink(o.x, [*o.A, o.P], 1, tiles=tile)
    if verb == "shrink_backward":
        return lambda: shrink.shrink_backward(o.parts, o.B, o.offsets, o.scales, o.rank, tile)
    if verb == "linear":
        return lambda: linear.linear(
            o.x, o.W, o.bias, o.h, o.B, o.places, o.offsets, o.scales, False, strategy, tile
        )  # fmt: skip
    if verb == "linear_backward":
        return lambda: linear_backward.linear_backward(o.dy, o.W, o.dh, o.A, o.offsets, strategy=strategy, tiles=tile)
    if verb == "wgrad":
        return lambda: wgrad.wgrad(o.x, o.dh, o.parts, o.h, o.offsets, o.ranks, o.scales, PROBES, tiles=tile)
    if verb == "shrink_linear":
        return lambda: shrink_linear.shrink_linear(
            o.x, o.W, o.bias, o.A, o.P, o.B, o.places, o.offsets, o.scales, strategy=strategy, tiles=tile
        )  # fmt: skip
    if verb == "expand_backward":
        return lambda: one_pass(o, None, strategy, tile)
    if verb == "shrink_linear_backward":
        return lambda: whole_backward(o, strategy, tile)
    if verb == "gradstat_diagonal":
        return lambda: with_diagonal(o, tile)
    return lambda: gradstat.gradstat(o.x, o.parts, o.runs, tile)


def one_pass(
    o: Operands, dh: torch.Tensor | None, strategy: str | None = None, tile: TileConfig | None = None
) -> tuple:
    """dh, dA, dB and Q."""
    rest = (o.offsets, o.scales, o.rank, PROBES, dh)
    return expand_backward.expand_backward(o.x, o.parts, o.h, o.B, *rest, strategy=strategy, tiles=tile)


def whole_backward(o: Operands, strategy: str, tile: TileConfig | None) -> tuple:
    """dx, dh, dA, dB and Q as the backend has them: what dh beside dx saves is in the kernels after it."""
    both = shrink_linear_backward.shrink_linear_backward(
        o.parts, o.W, o.B, o.A, o.places, o.offsets, o.scales, strategy, tile
    )  # fmt: skip
    dx, dh = both or (None, None)
    dh, *rest = one_pass(o, dh)
    return linear_backward.linear_backward(o.dy, o.W, dh, o.A, o.offsets) if dx is None else dx, dh, *rest


def with_diagonal(o: Operands, tile: TileConfig | None) -> tuple:
    """The exact statistic's sums, and its squares by entry."""
    diagonal = torch.zeros(sum(part.shape[1] for part in o.parts), o.x.shape[1], device=o.x.device)
    return gradstat.gradstat(o.x, o.parts, o.runs, tile, diagonal), diagonal


def wanted(o: Operands, verb: str) -> list[torch.Tensor]:
    """What a verb is to compute, in fp32."""
    x, h, dh, parts = o.x.float(), o.h.float(), o.dh.float(), [g.float() for g in o.parts]
    each = list(zip(o.offsets, o.scales, o.B, parts, strict=True))
    rank = o.ranks[0]
    if verb == "shrink_linear":
        h = x @ torch.cat([*o.A, o.P]).T
    if verb in ("expand_backward", "shrink_linear_backward"):
        dh = torch.cat([s * g @ b for _, s, b, g in each], 1)
    if verb == "shrink":
        return [x @ torch.cat([*o.A, o.P]).T]
    if verb == "shrink_backward":
        return [torch.cat([s * g @ b for _, s, b, g in each], 1)]
    if verb in ("linear", "shrink_linear"):
        update = torch.cat([s * h[:, i : i + rank] @ b.T for i, s, b, _ in each], 1)
        y = x @ torch.cat(o.W).float().T + torch.cat(o.bias).float() + update
        return [y] if verb == "linear" else [y, h]
    if not verb.startswith("gradstat"):
        dx = torch.cat(parts, 1) @ torch.cat(o.W).float() + dh @ torch.cat(o.A)
        dB = torch.cat([s * g.T @ h[:, i : i + rank] for i, s, _, g in each])
        factors = [dh.T @ x, dB, torch.cat([g.T @ h[:, o.rank :] for g in parts])]
        before = {"linear_backward": [dx], "wgrad": [], "expand_backward": [dh], "shrink_linear_backward": [dx, dh]}
        return before[verb] + (factors if verb != "linear_backward" else [])
    gradients = [part.T @ x for part in parts]
    sums = torch.stack([n for G in gradients for n in (G.square().sum(), G.abs().sum())])
    return [sums] if verb == "gradstat" else [sums, torch.cat(gradients).square()]


def computed(verb: str, found: object) -> list[torch.Tensor]:
    """A verb's results as ``wanted`` has them."""
    if verb in ("linear", "shrink_linear"):
        return [torch.cat(found[0], 1), *([found[1]] if verb == "shrink_linear" else [])]
    if verb in ("wgrad", "expand_backward", "shrink_linear_backward"):
        return [part if isinstance(part, torch.Tensor) else torch.cat(list(part)) for part in found]
    if verb == "gradstat_diagonal":
        return [found[0].flatten(), found[1]]
    return [found.flatten() if verb == "gradstat" else found]


def fault(verb: str, found: object, right: list[torch.Tensor]) -> str | None:
    """Why a candidate's results are wrong, or None."""
    for got, want in zip(computed(verb, found), right, strict=True):
        error = float((got.float() - want).norm() / want.norm())
        if not error <= ROUNDING:
            return f"wrong by {error:.2g} of the result"
    return None


def neighbours(tile: TileConfig) -> Iterator[TileConfig]:
    """The tile, and those with another depth, number of stages, warps or rows."""
    yield tile
    yield tile._replace(depth=tile.depth // 2 if tile.depth > 32 else tile.depth * 2)
    yield tile._replace(stages=tile.stages - 1 if tile.stages > 1 else 2)
    yield tile._replace(warps=12 - tile.warps if tile.warps in (4, 8) else 4)
    if tile.rows >= 64:
        yield tile._replace(rows=tile.rows // 2)


def candidates(verb: str) -> list[tuple[str, TileConfig | None]]:
    """(strategy, tile) pairs worth timing for a verb."""
    tiles = [t for v, kind, entry in committed() if v == verb and kind == "half" for t in neighbours(entry.tile)]
    if verb in ("linear", "linear_backward"):
        tiles += [t._replace(tma=not t.tma) for t in tiles]
    found: list[tuple[str, TileConfig | None]] = [("fused", t) for t in dict.fromkeys(tiles)]
    if verb in ("linear", "linear_backward"):
        expands = [entry.tile for v, kind, entry in committed() if v == "expand" and kind == "half"]
        found += [("library", t) for e in expands for t in neighbours(e)] + [("augmented", None)]
    elif verb in DIRECTIONS:
        found.append(("separate", None))
    return found


def sizes(verb: str, case: Case, strategy: bool = False) -> tuple[int, int, int, int]:
    """M, N, K, R as the kernels give them to ``choose_tiles``, or to ``choose_strategy``."""
    M, N, K, R = case.rows, case.total, case.width, 3 * case.rank
    of_strategy = {
        "linear": (M, N, K, R),
        "shrink_linear": (M, N, K, case.rank + PROBES),
        "shrink_linear_backward": (M, N, K, case.rank),
    }
    if strategy and verb in of_strategy:
        return of_strategy[verb]
    return {
        "linear": (M, N, K, case.rank),
        "linear_backward": (M, N, K, R),
        "shrink_linear": (M, N, K, R + PROBES),
        "shrink_linear_backward": (M, N, K, R),
        "expand_backward": (M, N, 0, R + PROBES),
        "wgrad": (M, N, 0, R),
        "shrink": (M, 0, K, R + PROBES),
        "shrink_backward": (M, 0, max(case.outputs), R),
        "gradstat": (0, N, K, 0),
        "gradstat_diagonal": (0, N, K, 0),
    }[verb]


def fastest(rows: list[dict[str, Any]], device: str) -> dict[tuple[str, str], list[Measurement]]:
    """What ``tiling.MEASURED`` should hold: the best tile of each verb and case, and the best strategy."""
    found: dict[tuple[str, str], list[Measurement]] = {}

    def keep(verb: str, row: dict[str, Any], choice: TileConfig | str) -> None:
        size = sizes(row["verb"], CASES[row["case"]], isinstance(choice, str))
        found.setdefault((verb, "half"), []).append(Measurement(*size, choice, round(row["median_ms"], 4), device))

    for verb, name in dict.fromkeys((r["verb"], r["case"]) for r in rows):
        timed = [r for r in rows if (r["verb"], r["case"]) == (verb, name) and "median_ms" in r]
        best = {s: min(some, key=lambda r: r["median_ms"]) for s in STRATEGIES if (some := _of(timed, s))}
        if "fused" in best:
            keep(verb, best["fused"], best["fused"]["tile"])
        if "library" in best:
            keep("expand", best["library"], best["library"]["tile"])
        if verb in DIRECTIONS and best:
            winner = min(best.values(), key=lambda r: r["median_ms"])
            keep(DIRECTIONS[verb], winner, winner["strategy"])
    return found


def _of(rows: list[dict[str, Any]], strategy: str) -> list[dict[str, Any]]:
    return [r for r in rows if r["strategy"] == strategy]


def source(found: dict[tuple[str, str], list[Measurement]]) -> str:
    """``MEASURED`` as Python."""
    lines = ["MEASURED: dict[tuple[str, str], tuple[Measurement, ...]] = {"]
    for key, measured in found.items():
        lines += [f'    ("{key[0]}", "{key[1]}"): (']
        for m in measured:
            choice = f'"{m.choice}"' if isinstance(m.choice, str) else f"TileConfig{tuple(m.choice)}"
            size = ", ".join(map(str, m[:4]))
            lines.append(f'        Measurement({size}, {choice}, {m.milliseconds}, "{m.device}"),')
        lines.append("    ),")
    return "\n".join([*lines, "}"]) + "\n"


def fill(file: Path, found: dict[tuple[str, str], list[Measurement]]) -> None:
    """Put the measurements between the marks of ``tiling.py``."""
    before, begin, rest = file.read_text().partition("# begin measured\n")
    _, end, after = rest.partition("# end measured\n")
    if not (begin and end):
        raise SystemExit(f"{file}: has no lines '# begin measured' and '# end measured'")
    file.write_text(before + begin + source(found) + end + after)


class Job(NamedTuple):
    """A verb of a case with one way to compute it."""

    verb: str
    case: Case
    strategy: str
    tile: TileConfig | None

    def call(self, operands: Operands) -> Callable[[], object]:
        """What is timed."""
        return calls(operands, self.verb, self.tile, self.strategy)


def jobs(cases: dict[str, Case], dry: bool) -> list[list[Job]]:
    """All candidates by verb and case; for a dry run the first of each strategy."""
    found = []
    for verb in VERBS:
        for case in cases.values():
            some = [Job(verb, case, strategy, tile) for strategy, tile in candidates(verb)]
            firsts = {job.strategy: job for job in reversed(some)}
            found.append([firsts[s] for s in STRATEGIES if s in firsts] if dry else some)
    return found


def compile_one(job: Job, capability: tuple[int, int]) -> str | None:
    """Put a job's kernels into Triton's cache, without a GPU; why that failed, or None."""
    from fastlora.kernels import compile_report, primitives
    from triton.runtime import driver

    driver.set_active(compile_report.Offline(capability))
    primitives.launcher = lambda kernel, grid, *arguments, **options: kernel.warmup(*arguments, grid=grid, **options)
    try:
        job.call(Operands(job.case, "meta"))()
    except Exception as problem:  # it will be timed all the same, and fail there by name
        return f"{job.verb} {tuple(job.tile or ())}: {type(problem).__name__}: {problem}"[:200]
    return None


def compile_ahead(listed: list[list[Job]], capability: tuple[int, int], seconds: float | None = None) -> list[str]:
    """Compile the jobs on all cores, for so many seconds at most; what went wrong, which is printed too."""
    some = [job for several in listed for job in several]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")) as pool:
        tasks = [pool.submit(compile_one, job, capability) for job in some]
        done, late = wait(tasks, seconds)
        pool.shutdown(wait=True, cancel_futures=True)
    problems = [problem for task in tasks if task in done and (problem := task.result())]
    problems += [f"{len(late)} of {len(some)} candidates: compiled as they are timed"] if late else []
    print(*problems, sep="\n")
    return problems


def measure(device: str, listed: list[list[Job]], seconds: float) -> list[dict[str, Any]]:
    """Time the jobs until the time is up."""
    rows, limit = [], time.monotonic() + seconds
    for several in listed:
        case, verb = several[0].case, several[0].verb
        # So many sets that none is found in the cache.
        sets = 1 if device == "cpu" else min(8, 1 + CACHE_BYTES // (2 * case.rows * (case.width + case.total)))
        operands = [Operands(case, device) for _ in range(sets)]
        right = wanted(operands[0], verb)
        for job in several:
            if time.monotonic() > limit:
                return rows
            calls_of = [job.call(some) for some in operands]
            many = CALLS if device == "cuda" else 1

            def call(calls_of=calls_of, many=many) -> None:
                for i in range(many):
                    calls_of[i % len(calls_of)]()

            try:
                wrong = fault(verb, calls_of[0](), right)
                if wrong is not None:
                    raise ArithmeticError(wrong)
                repeats = 1 if device == "cpu" else 20
                times = time_calls(call if device == "cpu" else captured(call), many, device, repeats)
            except Exception as problem:  # a tile that does not fit is a result too
                times = {"error": f"{type(problem).__name__}: {problem}"[:200]}
            rows.append({"verb": job.verb, "case": job.case.name, "strategy": job.strategy, "tile": job.tile, **times})
    return rows


def mend_interpreter() -> None:
    """Before 3.7 Triton's interpreter refuses the one-element arrays of numpy 2.4 as indices; the tests mend that."""
    sys.path.insert(0, str(TILING.parents[1] / "tests"))
    from support import interpreter_fixes

    interpreter_fixes.apply()


def main() -> None:
    """Time the candidates, print the best, and with --write put them into tiling.py."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--output", type=Path, default=Path("."))
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--write", type=Path, nargs="?", const=TILING, help="the tiling.py that takes the measurements")
    parser.add_argument("--dry-run", nargs="?", const="cpu", choices=("cpu", "null"), help=f"few candidates, {DRY_RUN}")
    parser.add_argument("--compile-only", action="store_true", help="compile for sm_90, on a machine without a GPU")
    given = parser.parse_args()
    listed = jobs(dict([next(iter(TINY.items()))]) if given.dry_run else CASES, bool(given.dry_run))
    if given.compile_only:
        raise SystemExit(bool(compile_ahead(listed, (9, 0))))
    if given.dry_run == "cpu":
        mend_interpreter()
    # A dry run is done whole, however slow the machine.
    seconds = 1e6 if given.dry_run else given.seconds
    with device_of(given.dry_run) as device:
        began = time.monotonic()
        if device != "cpu":
            # What is timed first is compiled first; the rest of the time is for timing.
            compile_ahead(listed, torch.cuda.get_device_capability(), seconds / 2)
        rows = measure(device, listed, began + seconds - time.monotonic())
        gpu = "cpu" if device == "cpu" else torch.cuda.get_device_name()
    for verb, name in dict.fromkeys((r["verb"], r["case"]) for r in rows):
        timed = [r for r in rows if (r["verb"], r["case"]) == (verb, name) and "median_ms" in r]
        for r in sorted(timed, key=lambda r: r["median_ms"])[:3]:
            print(f"{verb:16s} {name:18s} {r['strategy']:10s} {r['median_ms']:.4f} ms  {tuple(r['tile'] or ())}")
    given.output.mkdir(parents=True, exist_ok=True)
    result_files.write(given.output / "sweep.json", rows)
    if given.write:
        fill(given.write, fastest(rows, gpu))


if __name__ == "__main__":
    main()
