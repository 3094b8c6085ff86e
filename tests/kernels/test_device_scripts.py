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
CASES = {"deit_base_qkv", "roberta_base_qkv", "llama3_8b_qkv"}
VARIANTS = set(
    "frozen frozen_fused peft_bf16 peft_default peft_compiled torch fastlora fastlora_probe fastlora_exact50".split()
)
KEYS = "case variant pass mode median_ms p10_ms p90_ms gbps tflops roofline peak_mib".split()


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
    assert list(result) == ["device", "driver", "versions", "commit", "ceilings", "rows", "missing"]
    assert result["missing"] == []
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
    assert all(re.search(rf"\| {case} \| {variant} \|", table) for case, variant, _ in timed)
    assert (tmp_path / "device_cpu.png").read_bytes().startswith(b"\x89PNG")


def test_the_names_are_the_agreed_ones():
    code = (
        "from device.cases import BUILDERS, CASES; from device.models import model_cases;"
        "print(*CASES); print(*BUILDERS); print(*model_cases(False))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    cases, variants, models = (set(line.split()) for line in done.stdout.splitlines())
    assert cases == CASES and variants == VARIANTS | {"gradstat", "wgrad_library"}
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
    verbs = {"linear", "expand", "forward", "linear_backward", "backward", "wgrad", "shrink", "gradstat"}
    assert {verb for verb, _ in filled.MEASURED} == verbs
    (only,) = filled.MEASURED["linear", "half"]
    # The tile measured at one size is what any size gets; with two, the nearer decides.
    far = only._replace(M=64, choice=only.choice._replace(rows=16))
    filled.MEASURED["linear", "half"] = (only, far)
    import torch

    assert filled.choose_tiles("linear", 30000, 2304, 768, 8, torch.bfloat16) == only.choice
    assert filled.choose_tiles("linear", 100, 2304, 768, 8, torch.bfloat16) == far.choice
    assert filled.choose_tiles("linear", 100, 2304, 768, 8, torch.float32).rows == 64
    assert filled.choose_strategy("forward", 100, 2304, 768, 8, torch.float16) in ("fused", "library", "augmented")
    assert {verb for verb, _, entry in filled.committed() if "cpu" in entry.reason} == verbs - {"forward", "backward"}


def test_the_sweep_compiles_its_candidates_ahead(tmp_path):
    run("device.sweep", tmp_path, "--compile-only", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert list(tmp_path.rglob("*.cubin"))
