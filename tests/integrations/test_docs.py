"""The guide for trainers runs as it stands."""

from __future__ import annotations

import pathlib
import re

import pytest

GUIDE = pathlib.Path(__file__).parents[2] / "docs" / "your_trainer.md"


def test_every_block_runs(tmp_path, monkeypatch):
    for library in ("transformers", "accelerate", "lightning", "timm"):
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    scope = {"__name__": "guide"}
    text = GUIDE.read_text()
    for match in re.finditer(r"```python\n(.*?)```", text, re.DOTALL):
        line = text[: match.start(1)].count("\n")
        exec(compile("\n" * line + match[1], str(GUIDE), "exec"), scope)
    assert {"trainer", "accelerator", "Classifier", "scheduler", "whole", "compiled"} <= scope.keys()
