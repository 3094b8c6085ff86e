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


SAYS = """
import logging
from fastlora.ops.backends import plan
logging.basicConfig(level=logging.WARNING)
print(plan.launcher())
"""


def _says(code: str = SAYS, **environment: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "FASTLORA_TRITON_LAUNCHER"} | environment
    return subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)


def test_the_launcher_is_a_choice():
    assert _says(FASTLORA_TRITON_LAUNCHER="triton").stdout.strip() == "('triton', 'FASTLORA_TRITON_LAUNCHER says so')"


def test_an_unknown_launcher_is_refused():
    refused = "ValueError: FASTLORA_TRITON_LAUNCHER: expected one of ('native', 'triton'), got 'cuda'"
    assert refused in _says(FASTLORA_TRITON_LAUNCHER="cuda").stderr


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("plan.DRIVER = 'libnotthere.so.1'", "libnotthere.so.1 cannot be loaded"),
        ("plan.Cache = None", "fastlora._plan was not built"),
        ("plan.dispatch_mode = None", "this torch does not show what is called"),
        ("plan.native._REASON = 'the native library was not built'", "the native library was not built"),
    ],
)
def test_what_is_missing_is_a_reason(change, reason):
    found = _says(SAYS.replace("print", f"{change}\nprint"))
    assert found.stdout.startswith("('triton', ") and reason in found.stdout, found


def test_a_reason_is_logged_once():
    code = "from fastlora.ops.backends import plan\nfor _ in range(3): plan._say('no driver')\nprint(plan.said())"
    found = _says(code)
    assert (
        found.stderr.count("kernels are launched by Triton: no driver") == 1 and found.stdout.strip() == "['no driver']"
    )


def test_a_plan_is_checked_as_it_is_written():
    from fastlora import _plan

    def builder():
        return _plan.Builder(inputs=1, constants=0)

    for call, words in (
        (lambda: _plan.Builder(0, 0), "inputs: expected 1 or more, got 0"),
        (lambda: _plan.Builder(1, -1), "constants: expected 0 or more, got -1"),
        (lambda: _plan.Cache(0), "capacity: expected 1 or more plans, got 0"),
        (lambda: builder().view(1, [2], [1], 0), "base: expected a slot that holds a tensor, got 1"),
        (lambda: builder().allocate("float128", [2], [1], False), "dtype: expected a type that plans know"),
        (lambda: builder().allocate("float32", [2], [1, 1], False), "strides: expected one for each size, got 2"),
        (lambda: builder().allocate("float32", [-2], [1], False), "sizes: expected 0 or more, got -2"),
        (lambda: builder().multiply(0, -1, 0, 5), "operand: expected a slot that holds a tensor, got 5"),
        (lambda: builder().call("aten::t", "", [("tensor", False, 3)], [True]), "arguments: expected a slot"),
        (lambda: builder().call("aten::t", "", [("scalar", False, 3)], [True]), "arguments: expected a kind"),
        (lambda: builder().launch("k", 0, [1], [1, 1, 1], 0, [], [], []), "grid: expected 3 numbers, got 1"),
        (lambda: builder().launch("k", 0, [1] * 3, [1] * 3, 0, [], [7], [(1, 0, 0)]), "holes: expected a position"),
        (lambda: builder().launch("k", 0, [1] * 3, [1] * 3, 0, [], [7], [(0, 4, 0)]), "holes: expected a slot"),
        (lambda: builder().finish([2]), "results: expected a slot that holds a tensor, got 2"),
        (lambda: builder().finish([]), "results: expected 1 or more, got 0"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    once = builder()
    slot = once.allocate("float32", [2], [1], False)
    once.release([slot])
    with pytest.raises(ValueError, match="slots: expected a slot that holds a tensor"):
        once.release([slot])
    with pytest.raises(ValueError, match="slots: expected tensors that the plan made, got 0"):
        once.release([0])
