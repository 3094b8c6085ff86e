"""Plans start what Triton's launcher starts, byte for byte, over the null GPU in a process of its own."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from plan_cases import pairs

pytest.importorskip("triton")
pytest.importorskip("fastlora._plan")
ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("plan_checks.py")


def _checks() -> list[str]:
    """The names in CHECKS of the script, which takes the process that runs it for itself."""
    found = next(
        node.value
        for node in ast.parse(SCRIPT.read_text()).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "CHECKS"
    )
    return [name.id for name in found.elts]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str | None]:
    """What the script says of each check; a compiler is all that it asks of the machine."""
    from benchmarks.host.build import unavailable

    if unavailable() is not None:
        pytest.skip(unavailable())
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTLORA_TRITON_LAUNCHER")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(SCRIPT)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("check", [*_checks(), *map(str, pairs())])
def test_plans(outcomes, check):
    assert outcomes[check] is None, outcomes[check]
