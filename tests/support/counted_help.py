"""The native passes over many adapters on kernels that count their multiply-adds, in a library built for the tests."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
SOURCES = next((folder / "csrc" for folder in HERE.parents if (folder / "csrc").is_dir()), None)
HEADERS = Path(torch.__file__).parent

needs_counting = pytest.mark.skipif(
    shutil.which("g++") is None or SOURCES is None, reason="needs g++ and the sources of the native library"
)


@functools.cache
def _library() -> ctypes.CDLL:
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-Werror"]
    flags += ["-isystem", str(HEADERS / "include"), "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{SOURCES}"]
    flags += ["-DFASTLORA_ISA=portable", f"-L{HEADERS / 'lib'}", "-ltorch_cpu"]
    if sanitizers := os.environ.get("FASTLORA_SANITIZE"):
        flags += [f"-fsanitize={sanitizers}", "-fno-sanitize=vptr,null"]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "counted.so"
        sources = [HERE / "counted_kernels.cpp", *sorted((SOURCES / "cpu/isa").glob("*.cpp"))]
        subprocess.run(["g++", *map(str, sources), *flags, "-o", str(target)], check=True)
        torch.ops.load_library(str(target))
        return ctypes.CDLL(str(target))


def multiply_adds(name: str) -> Callable[..., int]:
    """The operator ``lora_grouped_{name}_``, which returns the multiply-adds that its kernels were asked for."""
    take = _library().take_multiply_adds
    take.restype = ctypes.c_int64
    run = getattr(torch.ops.fastlora_counted, f"lora_grouped_{name}_")

    def counted(*arguments) -> int:
        take()
        run(*arguments)
        return take()

    return counted
