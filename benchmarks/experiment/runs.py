"""The file of runs: one line a run, written whole or not at all, never mixed with others' settings or splits."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAME = "runs.jsonl"
PILOT = "pilot.jsonl"  # of ten settings, none tuned, on dev: the spread that the plan was made from
_KEY = ("data", "phase", "setting", "rate", "penalty", "seed", "method")


def key(result: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a run is one of."""
    return tuple(result.get(name) for name in _KEY)


def read(path: Path) -> list[dict[str, Any]]:
    """Results of all runs; none where there is no file. ``ValueError`` where two were made with other settings."""
    if not path.exists():
        return []
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    first: dict[Any, dict[str, Any]] = {}
    for result in found:
        other = first.setdefault(result.get("data"), result)
        for name in ("settings", "splits"):
            if result.get(name) != other.get(name):
                one, two = (f"{r.get('setting') or r['method']} seed {r['seed']}" for r in (result, other))
                raise ValueError(f"{path}: {one} and {two} were made with different {name}; keep them apart")
    return found


def check(results: list[dict[str, Any]], data: str, settings: Mapping[str, Any], splits: Any, path: Path) -> None:
    """``ValueError`` if results on this data were made with other settings or splits."""
    for result in results:
        if result["data"] != data:
            continue
        for name, ours in (("settings", settings), ("splits", splits)):
            differ = {k: (v, ours.get(k)) for k, v in result[name].items() if v != ours.get(k)}
            if differ:
                raise ValueError(f"{path} was made with other {name} (there, here): {differ}; give another --out")


def by_method(results: list[dict[str, Any]], methods: Iterable[str]) -> dict[str, dict[int, dict[str, Any]]]:
    """Results of the pilot by method and seed in order, of methods that have any."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for method in methods:
        seeds = {result["seed"]: result for result in results if result["method"] == method}
        if seeds:
            found[method] = dict(sorted(seeds.items()))
    return found


def packed(predictions: Sequence[int]) -> str:
    """Zeros and ones in hexadecimal, after a leading one that keeps their number."""
    return f"{int('1' + ''.join(map(str, predictions)), 2):x}"


def unpacked(text: str) -> list[int]:
    return [int(digit) for digit in f"{int(text, 16):b}"[1:]]


def add(path: Path, result: Mapping[str, Any]) -> None:
    """Add a run, in place of one of the same key. A process that ends leaves the old or the new file."""
    line = json.dumps(result, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent):
        others = [json.dumps(other) for other in read(path) if key(other) != key(result)]
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text("".join(f"{each}\n" for each in (*others, line)), encoding="utf-8")
        partial.replace(path)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time: several may train into one folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def environment() -> dict[str, str]:
    """Hardware and versions that the numbers depend on."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    except OSError:
        pass
    versions = {name: importlib.metadata.version(name) for name in ("torch", "peft", "transformers")}
    return {"cpu": cpu, "python": platform.python_version(), **versions}
