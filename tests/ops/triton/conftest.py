"""Fixtures of the kernel cases: fresh random numbers, poisoned allocations, an interpreter that knows bf16."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

# What wants a GPU is left out without one, and everything where Triton is not installed.
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["cases_*.py"]
collect_ignore = ["cases_device.py"] if os.environ.get("FASTLORA_KERNEL_DEVICE", "cpu") == "cpu" else []

if os.environ.get("TRITON_INTERPRET") == "1":
    from support import interpreter_fixes

    interpreter_fixes.apply()
if os.environ.get("FASTLORA_KERNEL_COMPILE_ONLY") == "1":
    from support import compile_only

    compile_only.apply()
    pytest_runtest_call = compile_only.pytest_runtest_call


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    # FASTLORA_KERNEL_SEED=N draws other inputs.
    torch.manual_seed(int(os.environ.get("FASTLORA_KERNEL_SEED", "0")))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every uninitialised floating tensor starts as NaN."""
    real = torch.empty

    def empty(*size, **options):
        out = real(*size, **options)
        if out.is_floating_point():
            with torch.no_grad():  # torch 2.11's checkpoint makes a leaf so
                out.fill_(float("nan"))
        return out

    monkeypatch.setattr(torch, "empty", empty)
