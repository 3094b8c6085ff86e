"""Host time of a layer: ``benchmarks.host`` in a process of its own, whose null GPU comes before any backward."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .host.__main__ import ROUNDS

ROOT = Path(__file__).parent.parent


@pytest.mark.benchmark(group="host")
def test_host(benchmark, request, tmp_path):
    """Every case, its table and its verdicts; ``host.json`` lies beside the other results."""
    option = request.config.getoption
    rounds, folder = option("--fastlora-rounds") or ROUNDS, option("--fastlora-results") or tmp_path
    out = Path(folder).absolute() / "host.json"
    command = [sys.executable, "-m", "benchmarks.host", "--rounds", str(rounds), "--json", str(out)]
    benchmark.pedantic(subprocess.run, args=(command,), kwargs={"check": True, "cwd": ROOT}, rounds=1)
    found = json.loads(out.read_text())
    assert all(row["us"]["median"] > 0 for row in found["rows"]) and found["targets"]
