"""Files of runs: one a method and seed, written whole or not at all, never mixed with other settings."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .settings import Settings


def path_of(folder: Path, method: str, seed: int) -> Path:
    return folder / f"{method}-{seed}.json"


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def read(path: Path, settings: Settings | None = None) -> dict[str, Any]:
    """A run's result; ``ValueError`` if it was made with other settings."""
    result = json.loads(path.read_text(encoding="utf-8"))
    if settings is not None and result["settings"] != asdict(settings):
        ours = asdict(settings)
        differ = {k: (v, ours.get(k)) for k, v in result["settings"].items() if v != ours.get(k)}
        raise ValueError(f"{path} was made with other settings (there, here): {differ}; give another --out")
    return result


def read_all(folder: Path, methods: Iterable[str]) -> dict[str, dict[int, dict[str, Any]]]:
    """Results by method and seed, of methods that have any; ``ValueError`` where settings differ between files."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    first: tuple[Path, Any] | None = None
    for method in methods:
        for path in sorted(folder.glob(f"{method}-*.json")):
            suffix = path.stem.removeprefix(f"{method}-")
            if not suffix.isdigit():
                continue
            result = read(path)
            first = first or (path, result["settings"])
            if result["settings"] != first[1]:
                raise ValueError(f"{path} and {first[0]} were made with different settings; keep them apart")
            found.setdefault(method, {})[int(suffix)] = result
    return found


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
