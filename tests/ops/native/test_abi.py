"""The binary built on one torch loads on another: of torch it uses the stable C interface as of 2.11, nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from support.native_help import needs_library

from fastlora.ops import native

TARGET = "0x020b000000000000"  # 2.11, as setup.py builds it
HEADERS = ("torch/csrc/stable/c/shim.h", "torch/csrc/inductor/aoti_torch/c/shim.h")
ROOT = Path(torch.__file__).parent

pytestmark = [needs_library, pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")]


def symbols(path: Path, *options: str) -> set[str]:
    done = subprocess.run(["nm", "-D", *options, str(path)], capture_output=True, text=True, check=True)
    return {line.split()[-1].split("@")[0] for line in done.stdout.splitlines()}


@pytest.fixture(scope="module")
def of_torch() -> set[str]:
    """What the library takes from torch: undefined in it, defined there."""
    needed, defined = symbols(native.LIBRARY, "--undefined-only"), set()
    for path in (ROOT / "lib").glob("lib*.so"):
        if path.name.startswith(("libtorch", "libc10", "libaoti")):
            defined |= symbols(path, "--defined-only")
    return needed & defined


def declared(target: str) -> set[str]:
    """C functions that torch's headers offer to a binary made for a version."""
    source = "".join(f"#include <{name}>\n" for name in HEADERS)
    command = [shutil.which("g++"), "-E", "-P", "-x", "c++", "-std=c++17", f"-DTORCH_TARGET_VERSION={target}",
               f"-I{ROOT / 'include'}", f"-I{ROOT / 'include/torch/csrc/api/include'}", "-"]  # fmt: skip
    done = subprocess.run(command, input=source, capture_output=True, text=True, check=True)
    return set(re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", done.stdout))


def test_only_the_c_interface_is_used(of_torch):
    assert len(of_torch) > 10
    foreign = {name for name in of_torch if not re.fullmatch(r"(aoti_)?torch_\w+", name)}
    # Weak symbols of C++'s own library, which torch's libraries happen to hold too.
    assert not {name for name in foreign if not re.match(r"_Z(T[ISV])?N?K?[RO]?(St|S[a-z]|9__gnu_cxx)", name)}


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_every_function_is_there_in_the_oldest_torch(of_torch):
    used = {name for name in of_torch if re.match(r"(aoti_)?torch_", name)}
    assert used - declared(TARGET) == set()


def test_no_macro_of_a_later_torch_is_used():
    """The headers hide functions that are newer than the target, and no macros: those of this file came after 2.11."""
    header = ROOT / "include" / "torch" / "csrc" / "stable" / "macros.h"
    if not header.is_file():
        pytest.skip("this torch has none of them")
    macros = set(re.findall(r"#define (\w+)\(", header.read_text()))
    sources = [path for path in (Path(__file__).parents[3] / "csrc").rglob("*") if path.is_file()]
    assert macros and sources
    assert not {(path.name, name) for path in sources for name in macros if re.search(rf"\b{name}\b", path.read_text())}


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_headers_tell_versions_apart():
    """So that the test above can fail: what 2.11 brought is not offered to 2.10."""
    assert declared(TARGET) - declared("0x020a000000000000")
