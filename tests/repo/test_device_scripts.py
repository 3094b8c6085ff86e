"""The scripts of ``benchmarks/device.sh`` on the CPU, on tiny shapes: rows, JSON, Markdown, plot, tiling.py filled."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

for name in ("triton", "peft", "timm", "transformers", "matplotlib"):
    pytest.importorskip(name)
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks.device import table  # noqa: E402

VARIANTS = set(
    "frozen frozen_fused peft_bf16 peft_default peft_compiled torch fastlora fastlora_probe fastlora_exact50".split()
)
CASE_NAMES = ("deit_base_qkv", "roberta_base_qkv", "llama3_8b_qkv")
# Name, case, at most: the targets of the GPU backend.
TARGETS = [
    ("separate q, k, v over the frozen layers", "roberta_base_qkv", "1.00"),
    ("separate q, k, v over the frozen layers", "llama3_8b_qkv", "1.00"),
    ("one fused qkv over the frozen layer", "deit_base_qkv", "1.25"),
    ("over PEFT bf16", "deit_base_qkv", "0.50"),
    ("over PEFT bf16", "roberta_base_qkv", "0.42"),
    ("over PEFT bf16", "llama3_8b_qkv", "0.70"),
    *(("probes over the same without", case, "1.01") for case in CASE_NAMES),
    *(("exact gradstat over one weight-gradient matmul", case, "1.15") for case in CASE_NAMES),
    *(("gradstat's memory beyond x and dy, over one bf16 [N,K]", case, "1.00") for case in CASE_NAMES),
    *(("peak memory over PEFT bf16", case, "0.75") for case in (*CASE_NAMES, "deit_base_step", "llama_8_layers_step")),
]
KEYS = "case variant pass mode median_ms p10_ms p90_ms host_us gbps tflops roofline peak_mib".split()


def run(module: str, folder: Path, *options: str, **environment: str) -> str:
    found = [str(ROOT), str(ROOT / "benchmarks"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(found), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-W", "ignore", "-m", module, "--dry-run", "--output", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_rows_json_table_and_plot(tmp_path):
    cases = ["deit_base_qkv", "llama3_8b_qkv", "deit_base_step", "llama_8_layers_step"]
    variants = ["frozen", "fastlora", "fastlora_probe", "peft_bf16", "fastlora_exact50", "gradstat"]
    shown = run("device.run", tmp_path, "--repeats", "2", "--cases", *cases, "--variants", *variants)
    result = json.loads((tmp_path / "device_cpu.json").read_text())
    assert list(result) == ["device", "driver", "versions", "commit", "rows"]
    assert all(list(row) == KEYS and row["mode"] == "eager" for row in result["rows"])
    timed = {(row["case"], row["variant"], row["pass"]) for row in result["rows"]}
    for case in cases[:2]:
        for variant in variants[:4]:
            assert {(case, variant, p) for p in ("forward", "backward", "both")} <= timed
        assert {(case, "fastlora_exact50", "both"), (case, "gradstat", "forward")} <= timed
    assert {(case, variant, "both") for case in cases[2:] for variant in variants[:4]} <= timed
    assert all(0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"] for row in result["rows"])
    table = (tmp_path / "device_cpu.md").read_text()
    assert table in shown and table.count("\n| ") > len(result["rows"])
    assert "Measured ceilings: " in table and "missing" not in table
    assert all(f"| {name} | {case} | {limit} | - | open: not measured |" in table for name, case, limit in TARGETS)
    assert all(re.search(rf"\| {case} \| {variant} \|", table) for case, variant, _ in timed)
    assert (tmp_path / "device_cpu.png").read_bytes().startswith(b"\x89PNG")


def row(case: str, variant: str, median: float, peak: float, mode: str = "graph", passes: str = "both") -> dict:
    return {**dict.fromkeys(KEYS, 1.0), "case": case, "variant": variant, "pass": passes, "mode": mode,
            "median_ms": median, "peak_mib": peak}  # fmt: skip


def test_every_target_has_a_verdict():
    assert sorted((t.name, t.case, f"{t.limit:.2f}") for t in table.TARGETS) == sorted(TARGETS)
    rows, case = [], "roberta_base_qkv"
    for mode in ("eager", "graph"):
        slower = 1.0 if mode == "graph" else 9.0
        rows += [row(case, "frozen", 1.0, 0.0, mode), row(case, "fastlora", 1.0 * slower, 74.0, mode)]
        rows += [row(case, "peft_bf16", 2.3, 100.0, mode), row(case, "fastlora_probe", 1.02 * slower, 0.0, mode)]
        # x and dy are 24 MiB, [N,K] is 3.375 MiB in bf16.
        rows += [row(case, "gradstat", 1.1 * slower, 24.1, mode, "forward")]
        rows += [row(case, "wgrad_library", 1.0, 60.0, mode, "forward")]
    result = {"device": "NVIDIA H200", "driver": "1", "versions": {}, "rows": rows}
    shown = table.table(result, (4e12, 8e14), ["deit_base_qkv torch: out of time"])
    expected = {
        "separate q, k, v over the frozen layers": "1.00 | 1.000 | met",
        "over PEFT bf16": "0.42 | 0.435 | missed",
        "probes over the same without": "1.01 | 1.020 | missed",
        "exact gradstat over one weight-gradient matmul": "1.15 | 1.100 | met",
        "gradstat's memory beyond x and dy, over one bf16 [N,K]": "1.00 | 0.030 | met",
        "peak memory over PEFT bf16": "0.75 | 0.740 | met",
    }
    for name, rest in expected.items():
        assert f"| {name} | {case} | {rest} |" in shown
    assert shown.count("open: not measured") == len(TARGETS) - len(expected)
    assert "4000 GB/s, 800 TFLOP/s" in shown and "- missing: deit_base_qkv torch: out of time" in shown
    elsewhere = table.table({**result, "device": "NVIDIA H100"}, (4e12, 8e14), [])
    assert "| 1.00 | 1.000 | met, not on an H200 |" in elsewhere
    with_buffer = [row(case, "gradstat", 1.0, 28.0, "eager", "forward")]
    assert "| 1.00 | 1.185 | missed |" in table.table({**result, "rows": with_buffer}, (1.0, 1.0), [])


def test_the_names_are_the_agreed_ones():
    code = (
        "from device.cases import BUILDERS, CASES; from device.models import model_cases;"
        "print(*CASES); print(*BUILDERS); print(*model_cases(False))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    cases, variants, models = (set(line.split()) for line in done.stdout.splitlines())
    assert cases == set(CASE_NAMES) and variants == VARIANTS | {"gradstat", "wgrad_library"}
    assert models == {"deit_base_step", "llama_8_layers_step"}


def test_the_sweep_fills_the_table(tmp_path):
    target = tmp_path / "tiling.py"
    target.write_text((ROOT / "kernels" / "tiling.py").read_text())
    run("device.sweep", tmp_path, "--write", str(target), TRITON_INTERPRET="1", TRITON_CACHE_DIR=str(tmp_path))
    rows = json.loads((tmp_path / "sweep.json").read_text())
    assert not [row for row in rows if "error" in row]
    specification = importlib.util.spec_from_file_location("filled_tiling", target)
    filled = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = filled
    specification.loader.exec_module(filled)
    verbs = {"linear", "expand", "forward", "linear_backward", "backward", "wgrad", "shrink", "shrink_backward"}
    verbs |= {"gradstat"}
    assert {verb for verb, _ in filled.MEASURED} == verbs
    (only,) = filled.MEASURED["linear", "half"]
    import torch

    device, size = torch.device("cpu"), only[:4]
    assert filled.choose_tiles("linear", *size, torch.bfloat16, device) == only.choice
    assert filled.choose_tiles("linear", *size, torch.float32, device).rows == 64
    (strategy,) = filled.MEASURED["forward", "half"]
    assert filled.choose_strategy("forward", *strategy[:4], torch.float16, device) == strategy.choice
    assert {verb for verb, _, entry in filled.committed() if "cpu" in entry.reason} == verbs - {"forward", "backward"}


WRONG = """
import torch
from device import sweep
from device.cases import TINY
for name in ("deit_base_qkv", "roberta_base_qkv"):
    operands = sweep.Operands(TINY[name], "cpu")
    assert len(operands.W) == (1 if TINY[name].fused else 3)
    for verb in sweep.VERBS:
        right = sweep.wanted(operands, verb)
        off = [part.clone() for part in right]
        off[0].view(-1)[: off[0].numel() // 8 + 1] = 0
        shapes = {"linear": lambda parts: ([parts[0]], []), "wgrad": lambda parts: tuple([part] for part in parts)}
        as_found = shapes.get(verb, lambda parts: parts[0])
        assert sweep.fault(verb, as_found(right), right) is None
        assert "wrong by" in sweep.fault(verb, as_found(off), right)
        off[0].fill_(float("nan"))
        assert "wrong by nan" in sweep.fault(verb, as_found(off), right)
"""


def test_the_sweep_sees_a_wrong_result():
    paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    done = subprocess.run(
        [sys.executable, "-c", WRONG], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_sweep_compiles_its_candidates_ahead(tmp_path):
    run("device.sweep", tmp_path, "--compile-only", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert list(tmp_path.rglob("*.cubin"))


FAKE_PYTHON = """#!/bin/sh
echo "$@" >> "$FAKE/calls"
case "$*" in *tiling*) echo "$FAKE/installed_tiling.py" ;; esac
"""


def call_script(folder: Path, **environment: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """``device.sh`` with a Python that only writes down what it is asked for: (what came of it, which steps ran)."""
    fake = folder / "python"
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(fake), "FAKE": str(folder), **environment}
    script = [str(ROOT / "benchmarks" / "device.sh"), str(folder / "out")]
    done = subprocess.run(["bash", *script], capture_output=True, text=True, env=environment)
    calls = (folder / "calls").read_text() if (folder / "calls").exists() else ""
    marks = {
        "pip install": "build",
        "device.sweep": "sweep",
        "pytest -q --tb": "test",
        "device.run": "bench",
        "--name headline": "headline",
        "--name models": "models",
    }
    found = [[step for mark, step in marks.items() if mark in line] for line in calls.splitlines()]
    return done, [steps[-1] for steps in found if steps]


def test_the_script_runs_the_steps_that_are_asked_for(tmp_path):
    done, ran = call_script(tmp_path)
    assert done.returncode == 0 and ran == ["build", "test", "headline"], done.stdout + done.stderr
    assert re.findall(r"^== (\w+)", done.stdout, re.M) == ["build", "test", "headline"]
    (tmp_path / "calls").unlink()
    done, ran = call_script(tmp_path, STEPS="build,bench,sweep,models")
    assert done.returncode == 0 and ran == ["build", "bench", "sweep", "models"]


def test_the_script_refuses_unknown_steps_and_keeps_its_limit(tmp_path):
    done, ran = call_script(tmp_path, STEPS="build,tests")
    assert (
        done.returncode == 2 and not ran and "'tests' is none of build, sweep, test, sanitize, headline" in done.stderr
    )
    done, ran = call_script(tmp_path, LIMIT="0")
    assert done.returncode == 1 and not ran and done.stdout.count("out of time, left out: ") >= 4


def test_calls_of_the_documented_steps_fit_nine_minutes():
    text = (ROOT / "benchmarks" / "device.sh").read_text()
    bodies = dict(re.findall(r"^step_(\w+)\(\) \{\n(.*?)^\}", text, re.M | re.S))
    seconds = {step: sum(map(int, re.findall(r"within (\d+)", body))) for step, body in bodies.items()}
    seconds["sanitize"] *= 2  # memcheck and racecheck
    seconds |= dict.fromkeys(("headline", "bench", "models"), 0)
    assert (
        set(seconds) == {"build", "sweep", "test", "sanitize", "headline", "bench", "models"}
        and "limit=${LIMIT:-540}" in text
    )
    readme = (ROOT / "benchmarks" / "results" / "README.md").read_text()
    documented = [steps.split(",") for steps in re.findall(r"STEPS=(\S+) benchmarks/device.sh", readme)]
    assert len(documented) == 4 and {step for steps in documented for step in steps} == set(seconds)
    # What is left is the benchmarks', which stop by themselves: they need two minutes at least.
    timed = {"headline", "bench", "models"}
    assert all(sum(seconds[s] for s in steps) <= 540 - 120 * bool(timed & set(steps)) for steps in documented)
