"""``fastlora bench``: from a checkout it runs the benchmarks and shows results as they come, else it says why not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fastlora.cli import __main__ as cli
from fastlora.cli import bench

ROW = {"variant": "fastlora", "ms": {"median": 1.5}, "ratio_to_peft": {"median": 0.8}}
RESULT = {"kind": "layer", "shape": "S4", "dtype": "fp32", "gate": "passed", "rows": [ROW]}
WRONG = {"kind": "layer", "shape": "S1", "gate": "failed", "reason": "dB[0] is off"}


def test_an_installed_package_says_where_the_benchmarks_are(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "site-packages" / "fastlora" / "bench.py"))
    assert cli.main(["bench", "--out", str(tmp_path / "out")]) == cli.UNUSABLE
    assert "not installed with the package: run the command from a checkout" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_pytest_is_needed(monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(bench.MissingBenchmarks, match="needs pytest: pip install 'fastlora-kernels"):
        bench.checkout()


def test_the_command_is_that_of_the_benchmarks(tmp_path):
    words = bench.command(Path("root"), tmp_path, True, None, None)
    assert "--benchmark-only" in words and f"--fastlora-rounds={bench.SHORT_ROUNDS}" in words
    assert words[-2:] == ["-k", bench.SHORT]
    words = bench.command(Path("root"), tmp_path, False, 7, "S2")
    assert "--fastlora-rounds=7" in words and words[-2:] == ["-k", "S2"]
    assert "-k" not in bench.command(Path("root"), tmp_path, False, None, None)


def test_rows_of_a_result():
    assert list(bench.table_rows({"labels": {"fastlora": "ours"}, "result": RESULT})) == [
        ("layer S4 fp32", "ours", "1.500", "0.80")
    ]
    assert list(bench.table_rows({"labels": {}, "result": WRONG})) == [("layer S1", "WRONG: dB[0] is off", "", "")]


def pretend(monkeypatch, status):
    """A job in place of pytest that reports one result and ends with a status."""
    line = json.dumps({"labels": {}, "result": RESULT if status == 0 else WRONG})

    def command(root, out, short, rounds, chosen):
        code = f"import os, sys; open(os.environ['FASTLORA_BENCH_STREAM'], 'a').write({line + chr(10)!r}); "
        code += f"open({str(out / 'bench.md')!r}, 'w').write('# the report'); sys.exit({status})"
        return [sys.executable, "-c", code]

    monkeypatch.setattr(bench, "command", command)


@pytest.mark.parametrize("status", [0, 1])
def test_results_are_shown_and_a_wrong_number_fails(status, monkeypatch, tmp_path, capsys):
    pretend(monkeypatch, status)
    assert cli.main(["bench", "--short", "--out", str(tmp_path / "out")]) == status
    shown = capsys.readouterr()
    if status == 0:
        assert "layer S4 fp32  fastlora  1.500  0.80" in shown.err and "# the report" in shown.out
    else:
        assert "WRONG: dB[0] is off" in shown.err and "no time of theirs is given" in shown.err
        assert "# the report" not in shown.out
