"""The formulas once more, each time in a process that is held to another instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from native_help import needs_library

from fastlora import native

pytestmark = needs_library

# From the least to the most; a processor runs all up to its own choice.
SETS = ["portable", "avx2", "avx512", "avx512_bf16"]


@pytest.mark.skipif("FASTLORA_CPU_ISA" in os.environ, reason="runs inside the subprocess of this very test")
@pytest.mark.parametrize("isa", SETS[:-1])
def test_formulas_with(isa):
    if SETS.index(isa) >= SETS.index(native.isa()):
        pytest.skip(f"this processor's choice is {native.isa()}")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__).parent)]
    environment = {**os.environ, "FASTLORA_CPU_ISA": isa}
    done = subprocess.run([*command, "-m", "every_isa"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.every_isa
@pytest.mark.skipif("FASTLORA_CPU_ISA" not in os.environ, reason="needs FASTLORA_CPU_ISA")
def test_isa_is_the_requested_one():
    assert native.isa() == os.environ["FASTLORA_CPU_ISA"]
