"""Builds the null GPU's two libraries with the system's compiler, once for each version of the sources and of torch."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

SOURCES = Path(__file__).parent / "native"
BUILD = Path(__file__).parents[2] / "build"
DRIVER = ("driver.cpp", "record.cpp", "cubin.cpp")
DEVICE = ("device.cpp", "operators.cpp", "pointwise.cpp", "library_ops.cpp", "fallback.cpp")
STANDARD = "-std=c++20"  # torch's headers ask for it
JOBS = 2  # a compiler over torch's headers takes 1 GB


class Built(NamedTuple):
    """Files of one build: a libcuda.so.1 and a torch device."""

    driver: Path
    device: Path


def unavailable() -> str | None:
    """Why the null GPU cannot be built here, or None."""
    if _compiler() is None:
        return "no C++ compiler: neither $CXX nor g++ nor c++ is there"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not _cuda_headers().joinpath("cuda.h").is_file():
        return f"this triton comes without cuda.h: {_cuda_headers()}"
    return None


def build() -> Built:
    """The libraries, compiled unless this version of them is there; ``RuntimeError`` with the compiler's words."""
    reason = unavailable()
    if reason is not None:
        raise RuntimeError(f"the null GPU cannot be built: {reason}")
    folder = BUILD / f"host-{_key()}"
    found = Built(folder / "libcuda.so.1", folder / "libnullgpu.so")
    if not (found.driver.is_file() and found.device.is_file()):
        BUILD.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as work:
            _compile(Path(work))
            _publish(Path(work) / "out", folder)
    return found


def _compile(work: Path) -> None:
    out = work / "out"
    out.mkdir()
    torch_root = Path(torch.__file__).parent
    headers = [torch_root / "include", torch_root / "include" / "torch" / "csrc" / "api" / "include"]
    units = [(name, [_cuda_headers()]) for name in DRIVER] + [(name, headers) for name in DEVICE]
    with ThreadPoolExecutor(JOBS) as pool:
        objects = dict(
            zip((name for name, _ in units), pool.map(lambda unit: _object(work, *unit), units), strict=True)
        )
    driver = out / "libcuda.so.1"
    _run("-shared", "-Wl,-soname,libcuda.so.1", *(objects[name] for name in DRIVER), "-o", driver, "-ldl")
    # Triton's build of its own launcher links by this name.
    (out / "libcuda.so").symlink_to(driver.name)
    libraries = torch_root / "lib"
    # torch's own libraries are in the process by the time that this one is loaded.
    linked = ("-L", libraries, "-ltorch_cpu", "-lc10", driver)
    _run("-shared", *(objects[name] for name in DEVICE), "-o", out / "libnullgpu.so", *linked)


def _object(work: Path, name: str, include: Sequence[Path]) -> Path:
    target = work / f"{name}.o"
    _run(STANDARD, "-O1", "-fPIC", *(f"-I{folder}" for folder in include), "-c", SOURCES / name, "-o", target)
    return target


def _run(*arguments: object) -> None:
    command = [_compiler(), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the null GPU does not compile: {' '.join(command)}\n{done.stderr[-4000:]}")


def _publish(out: Path, folder: Path) -> None:
    """In place as a whole, and whoever else built the same first keeps theirs."""
    try:
        out.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _key() -> str:
    digest = hashlib.sha256(f"{torch.__version__} {torch.__file__} {STANDARD}".encode())
    version = subprocess.run([_compiler(), "--version"], capture_output=True, check=True).stdout
    for data in (version, *(path.read_bytes() for path in sorted(SOURCES.iterdir()) if path.is_file())):
        digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest()[:16]


def _compiler() -> str | None:
    return next(
        (found for name in (os.environ.get("CXX"), "g++", "c++") if name and (found := shutil.which(name))), None
    )


def _cuda_headers() -> Path:
    found = importlib.util.find_spec("triton")
    return Path(found.origin).parent / "backends" / "nvidia" / "include"
