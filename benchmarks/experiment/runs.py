"""The file of runs: one line a method and seed, written whole or not at all, never mixed with other settings."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .settings import Settings

NAME = "runs.jsonl"


def read(path: Path) -> list[dict[str, Any]]:
    """Results of all runs; none where there is no file. ``ValueError`` where two were made with other settings."""
    if not path.exists():
        return []
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for result in found:
        if result["settings"] != found[0]["settings"]:
            one, other = (f"{r['method']} seed {r['seed']}" for r in (result, found[0]))
            raise ValueError(f"{path}: {one} and {other} were made with different settings; keep them apart")
    return found


def by_method(results: list[dict[str, Any]], methods: Iterable[str]) -> dict[str, dict[int, dict[str, Any]]]:
    """Results by method and seed in order, of methods that have any."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for method in methods:
        seeds = {result["seed"]: result for result in results if result["method"] == method}
        if seeds:
            found[method] = dict(sorted(seeds.items()))
    return found


def check(results: list[dict[str, Any]], settings: Settings, path: Path) -> None:
    """``ValueError`` if results were made with other settings."""
    ours = asdict(settings)
    for result in results:
        if result["settings"] != ours:
            differ = {k: (v, ours.get(k)) for k, v in result["settings"].items() if v != ours.get(k)}
            raise ValueError(f"{path} was made with other settings (there, here): {differ}; give another --out")


def add(path: Path, result: Mapping[str, Any]) -> None:
    """Add a run, in place of one of the same method and seed. A process that ends leaves the old or the new file."""
    key, line = (result["method"], result["seed"]), json.dumps(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent):
        others = [json.dumps(other) for other in read(path) if (other["method"], other["seed"]) != key]
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
