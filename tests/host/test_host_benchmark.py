"""``python -m benchmarks.host``: its rows, its verdicts, and that it refuses to time what is not meant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("peft")
from benchmarks.host.build import unavailable  # noqa: E402
from benchmarks.host.verdict import TARGETS, verdicts  # noqa: E402

ROOT = Path(__file__).parents[2]


def _run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTLORA_CPU_ENGINE")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.host", *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900)


def _spread(median: float) -> dict[str, float]:
    return {"median": median, "p25": median, "p75": median}


def test_verdicts_compare_the_median_with_the_limit():
    rows = [
        {"case": "linear", "variant": "fastlora", "us": _spread(70.0), "over_peft": _spread(0.8)},
        {"case": "tracker", "variant": "probes_step", "us": _spread(150.1)},
        {"case": "tiny", "variant": "fastlora", "over_frozen": _spread(1.7), "over_peft": _spread(0.4)},
    ]
    found = {(v.case, v.target.base): v.met for v in verdicts(rows)}
    assert found == {("linear", "peft"): True, ("tracker", None): False, ("tiny", "frozen"): False,
                     ("tiny", "peft"): True}  # fmt: skip


def test_every_target_names_cases_and_variants_that_exist():
    code = (
        "import json; from benchmarks.host.cases import CASES; from benchmarks.host.__main__ import NAMES;"
        "print(json.dumps([list(CASES), list(NAMES)]))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cases, names = json.loads(done.stdout)
    for target in TARGETS:
        assert set(target.cases) <= set(cases) and {target.variant, target.base or "frozen"} <= set(names), target


def test_the_command_measures_and_judges(tmp_path):
    if unavailable() is not None:
        pytest.skip(unavailable())
    done = _run("--rounds", "2", "--case", "linear", "tiny", "--json", str(tmp_path / "host.json"))
    assert done.returncode == 0, done.stderr[-4000:]
    text = (tmp_path / "host.json").read_text()
    found = json.loads(text)
    assert found["environment"]["rounds"] == 2 and {"cpu", "torch", "triton", "source"} <= set(found["environment"])
    rows = {(row["case"], row["variant"]): row for row in found["rows"]}
    assert {v for c, v in rows if c == "linear"} == {"frozen", "peft", "fastlora"}
    assert sum(line.strip().startswith('{"case"') for line in text.splitlines()) == len(rows), "not one row a line"
    ours, theirs = rows["linear", "fastlora"], rows["linear", "peft"]
    assert ours["counts"]["launches"] >= 4 and ours["counts"]["fallbacks"] == 0
    assert (theirs["counts"]["launches"], theirs["counts"]["gemms"]) == (0, 8)
    assert rows["tiny", "fastlora"]["us"]["rounds"] == 2
    assert ours["us"]["median"] > 0 and ours["us"]["rounds"] == 10 and rows["tiny", "fastlora"]["counts"] is None
    judged = {(t["cases"][0], t["base"]): t for t in found["targets"]}
    assert set(judged) == {("linear", "peft"), ("tiny", "frozen"), ("tiny", "peft")}
    for (case, base), target in judged.items():
        measured = rows[case, "fastlora"][f"over_{base}"]["median"]
        assert target["median"] == measured and target["met"] == (measured <= target["limit"])
    assert "## Targets" in done.stdout and "one adapted Linear" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--rounds", "0"), "--rounds: expected a positive"), (("--case", "x"), "invalid choice")],
)
def test_bad_arguments_are_named(arguments, message):
    done = _run(*arguments)
    assert done.returncode == 2 and message in done.stderr
