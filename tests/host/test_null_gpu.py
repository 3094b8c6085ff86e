"""The null GPU builds, writes launches down byte for byte, has the limits that it was given, and leaves no trace."""

from __future__ import annotations

import ast
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
SCRIPTS = ("null_gpu_checks", "counts_checks", "capture_checks")


def _checks() -> list[tuple[str, str]]:
    """The names in CHECKS of each script, which cannot be imported here: it takes the process for itself."""
    found = []
    for script in SCRIPTS:
        for node in ast.parse(Path(__file__).with_name(f"{script}.py").read_text()).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "CHECKS":
                found += [(script, name.id) for name in node.value.elts]
    return found


@functools.cache
def _outcomes(script: str) -> dict[str, str | None]:
    """What a script says of each of its checks; a compiler is all that it asks of the machine."""
    from benchmarks.host.build import unavailable

    if unavailable() is not None:
        pytest.skip(unavailable())
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name(f"{script}.py"))]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(("script", "check"), _checks())
def test_null_gpu(script, check):
    outcome = _outcomes(script)[check]
    assert outcome is None, outcome
