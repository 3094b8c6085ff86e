"""The formulas once more, each time in a process that is held to another instruction set."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.native_help import needs_library

from fastlora.ops import native

pytestmark = needs_library

# From the least to the most; a processor runs all up to its own choice. The emulated one is avx512_bf16 with its one
# new instruction written out, so that a processor with avx512 alone tests everything but the instruction.
SETS = ["portable", "avx2", "avx512", "avx512_bf16_emulated", "avx512_bf16"]


def runnable() -> list[str]:
    own = native.isa() if native.available() else "portable"
    below = SETS[: SETS.index(own)]
    return [*below, "avx512_bf16_emulated"] if own == "avx512" else below


@pytest.mark.skipif("FASTLORA_CPU_ISA" in os.environ, reason="runs inside the subprocess of this very test")
@pytest.mark.parametrize("isa", SETS[:-1])
def test_formulas_with(isa):
    if isa not in runnable():
        pytest.skip(f"this processor's choice is {native.isa()}")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__).parent)]
    environment = {**os.environ, "FASTLORA_CPU_ISA": isa}
    done = subprocess.run([*command, "-m", "every_isa"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def functions_with(instruction: str) -> list[str]:
    """Names of the functions of the library that contain an instruction."""
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(native.LIBRARY)], capture_output=True, text=True, check=True
    )
    found, name = set(), ""
    for line in listing.stdout.splitlines():
        if line.endswith(">:"):
            name = line
        elif instruction in line:
            found.add(name)
    return sorted(found)


@pytest.mark.skipif(
    shutil.which("objdump") is None or platform.machine().lower() not in ("x86_64", "amd64"),
    reason="needs objdump on an x86 processor",
)
def test_the_product_of_bf16_pairs_is_in_its_own_kernels_only():
    found = functions_with("vdpbf16ps")
    assert found and all("11avx512_bf16" in name for name in found)


@pytest.mark.every_isa
@pytest.mark.skipif("FASTLORA_CPU_ISA" not in os.environ, reason="needs FASTLORA_CPU_ISA")
def test_isa_is_the_requested_one():
    assert native.isa() == os.environ["FASTLORA_CPU_ISA"]
