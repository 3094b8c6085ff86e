"""What a type checker sees of the package in a user's script, where mypy is installed."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

import fastlora

ROOT = pathlib.Path(fastlora.__file__).parent.parent
SCRIPT = """\
import torch
from torch import nn

import fastlora

model = fastlora.inject(nn.Sequential(nn.Linear(8, 8)), fastlora.LoraConfig(r=2, target_modules=["0"]))
reveal_type(model)
reveal_type(fastlora.summary(model).rows[0].rank)
reveal_type(fastlora.track(model).scores())
reveal_type(fastlora.load(model, "folder"))
fastlora.inject(model, fastlora.LoraConfig(rank=2))
fastlora.allocate({"a": 1.0}, "x")
fastlora.summary(model).row
fastlora.save(model, 3)
fastlora.track(model, "exact")
"""


def test_types_in_a_script(tmp_path):
    """Returns have their types, and five mistakes are found, under ``mypy --strict``."""
    pytest.importorskip("mypy")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "script.py"]
    environment = {**os.environ, "MYPYPATH": str(ROOT), "MYPY_CACHE_DIR": str(tmp_path / "cache")}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    lines = run.stdout.splitlines()
    for number, shown in ((7, "Sequential"), (8, "int"), (9, "Scores"), (10, "Sequential")):
        said = [line for line in lines if line.startswith(f"script.py:{number}: note: Revealed type is")]
        assert len(said) == 1 and shown in said[0], run.stdout + run.stderr
    wrong = {int(line.split(":")[1]) for line in lines if ": error:" in line}
    assert wrong == {11, 12, 13, 14, 15}, run.stdout
