"""The scripts of ``benchmarks/device.sh`` on the CPU, on tiny shapes: rows, JSON, Markdown, plot, tiling.py filled."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
from support.executed_lines import lines_of

for name in ("triton", "peft", "timm", "transformers", "matplotlib"):
    pytest.importorskip(name)
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks.device import table  # noqa: E402
from benchmarks.host.build import unavailable  # noqa: E402

VARIANTS = set(
    "frozen frozen_fused peft_bf16 peft_default peft_compiled torch fastlora fastlora_probe fastlora_exact50".split()
)
WHOLE = {"frozen", "fastlora", "fastlora_probe", "peft_bf16", "peft_default", "peft_compiled"}
MODELS = ("deit_base_step", "llama_8_layers_step")
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
    *(("peak memory over PEFT bf16", case, "0.75") for case in (*CASE_NAMES, *MODELS)),
]
KEYS = "case variant pass mode median_ms p10_ms p90_ms host_us gbps tflops roofline peak_mib".split()


# A run, its options and environment. What torch.compile makes of the null GPU's models nobody knows.
RUNS = {
    "cpu": ("device.run --dry-run --repeats 2 --cases deit_base_qkv llama3_8b_qkv deit_base_step llama_8_layers_step "
            "--variants frozen fastlora fastlora_probe peft_bf16 fastlora_exact50 gradstat", {}),
    "null": ("device.run --dry-run null --repeats 2", {}),
    "nothing": ("device.run --dry-run --seconds -1", {}),
    "plot": ("device.plot {folder}/device_cpu.json", {}),
    "swept": ("device.sweep --dry-run --write {folder}/tiling.py", {"TRITON_INTERPRET": "1"}),
    "swept_null": ("device.sweep --dry-run null --write {folder}/tiling.py", {}),
    "compiled": ("device.sweep --dry-run --compile-only", {}),
}  # fmt: skip


class Done(NamedTuple):
    """What came of a run: its folder, exit status, output, and the lines of ``benchmarks/device`` that ran."""

    folder: Path
    status: int
    output: str
    lines: dict[str, list[int]]


def start(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    """A Python command in a folder, which has the kernels' cache too unless the environment says otherwise."""
    found = [str(ROOT), str(ROOT / "benchmarks"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment = {**inherited, "TRITON_CACHE_DIR": str(folder), **environment}
    environment |= {"PYTHONPATH": os.pathsep.join(found), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", *command]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)


@functools.cache
def done(name: str) -> Done:
    """A run of ``RUNS``, or the script of that name in ``tests/support``; once, whoever asks."""
    folder = Path(tempfile.mkdtemp(prefix="device_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if name in ("null", "swept_null", "device_faults") and unavailable() is not None:
        pytest.skip(unavailable())
    arguments, environment = RUNS.get(name, (name, {}))
    if "null" in name:
        environment = {"TRITON_CACHE_DIR": str(done("compiled").folder)}
    if name == "plot":
        shutil.copy(done("cpu").folder / "device_cpu.json", folder)
    shutil.copy(ROOT / "kernels" / "tiling.py", folder)
    module, *options = arguments.format(folder=folder).split()
    options += [] if name in ("plot", "device_faults") else ["--output", str(folder)]
    tracer, lines = ROOT / "tests" / "support" / "executed_lines.py", folder / "lines.json"
    found = start(folder, str(tracer), str(lines), str(ROOT / "benchmarks" / "device"), module, *options, **environment)
    assert lines.exists(), found.stderr[-4000:]
    return Done(folder, found.returncode, found.stdout + found.stderr, json.loads(lines.read_text()))


def right(name: str) -> Done:
    found = done(name)
    assert found.status == 0, found.output[-6000:]
    return found


def test_rows_json_table_and_plot():
    folder, _, shown, _ = right("cpu")
    cases = ["deit_base_qkv", "llama3_8b_qkv", "deit_base_step", "llama_8_layers_step"]
    variants = ["frozen", "fastlora", "fastlora_probe", "peft_bf16"]
    result = json.loads((folder / "device_cpu.json").read_text())
    assert list(result) == ["device", "driver", "versions", "commit", "rows"]
    assert all(list(row) == KEYS and row["mode"] == "eager" for row in result["rows"])
    timed = {(row["case"], row["variant"], row["pass"]) for row in result["rows"]}
    for case in cases[:2]:
        assert {(case, variant, p) for variant in variants for p in ("forward", "backward", "both")} <= timed
        assert {(case, "fastlora_exact50", "both"), (case, "gradstat", "forward")} <= timed
    assert {(case, variant, "both") for case in cases[2:] for variant in variants} <= timed
    assert all(0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"] for row in result["rows"])
    table = (folder / "device_cpu.md").read_text()
    assert table in shown and table.count("\n| ") > len(result["rows"])
    assert "Measured ceilings: " in table and "missing" not in table
    assert all(f"| {name} | {case} | {limit} | - | open: not measured |" in table for name, case, limit in TARGETS)
    assert all(re.search(rf"\| {case} \| {variant} \|", table) for case, variant, _ in timed)
    assert (folder / "device_cpu.png").read_bytes().startswith(b"\x89PNG")
    assert (right("plot").folder / "device_cpu.png").read_bytes().startswith(b"\x89PNG")


def test_every_row_under_real_launches():
    """On the null GPU everything runs but the kernels: eager and as a graph, which no capture forbids; no verdicts."""
    folder, _, shown, _ = right("null")
    rows = json.loads((folder / "device_null_gpu.json").read_text())["rows"]
    timed = {(row["case"], row["variant"], row["pass"], row["mode"]) for row in rows}
    once = {"fastlora_exact50": ("both",), "gradstat": ("forward",), "wgrad_library": ("forward",)}
    expected = {
        (case, variant, passes, mode)
        for mode in ("eager", "graph")
        for case, variants in [*((c, VARIANTS | {*once}) for c in CASE_NAMES), *((c, WHOLE) for c in MODELS)]
        for variant in variants - {"peft_compiled"}
        for passes in (("both",) if case in MODELS else once.get(variant, ("forward", "backward", "both")))
    }
    assert timed == expected
    missing = re.findall(r"^- missing: (\w+) (\w+)", shown, re.M)
    assert set(missing) == {(case, "peft_compiled") for case in (*CASE_NAMES, *MODELS)}, shown[-6000:]
    assert all(f"| {name} | {case} | {limit} | - | open: not measured |" in shown for name, case, limit in TARGETS)


def test_a_run_out_of_time_says_so():
    found = done("nothing")
    assert found.status == 1 and "nothing was measured" in found.output
    assert found.output.count(": out of time") == 3 * len(VARIANTS | {"gradstat", "wgrad_library"}) + 2 * len(WHOLE)


def test_every_line_runs_without_a_gpu():
    """Of ``benchmarks/device``, in the runs above and where something fails on purpose."""
    ran: dict[str, set[int]] = {}
    for name in (*RUNS, "device_faults"):
        for file, lines in (done(name) if name == "nothing" else right(name)).lines.items():
            ran.setdefault(file, set()).update(lines)
    left = {
        f"{file.name}:{line}"
        for file in (ROOT / "benchmarks" / "device").glob("*.py")
        for line in lines_of(file) - ran.get(file.name, set())
    }
    assert left == set()


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


@pytest.mark.parametrize(("name", "device"), [("swept", "cpu"), ("swept_null", "null GPU")])
def test_the_sweep_fills_the_table(name, device):
    folder = right(name).folder
    rows = json.loads((folder / "sweep.json").read_text())
    assert not [row for row in rows if "error" in row]
    specification = importlib.util.spec_from_file_location("filled_tiling", folder / "tiling.py")
    filled = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = filled
    specification.loader.exec_module(filled)
    verbs = {"linear", "expand", "forward", "linear_backward", "backward", "wgrad", "shrink", "shrink_backward"}
    verbs |= {"gradstat", "gradstat_diagonal"}
    verbs |= {"shrink_linear", "shrink_linear_backward", "expand_backward"}
    assert {verb for verb, _ in filled.MEASURED} == verbs
    (only,) = filled.MEASURED["linear", "half"]
    import torch

    cpu, size = torch.device("cpu"), only[:4]
    assert filled.choose_tiles("linear", *size, torch.bfloat16, cpu) == only.choice
    assert filled.choose_tiles("linear", *size, torch.float32, cpu).rows == 64
    for direction in ("forward", "backward", "shrink_linear", "shrink_linear_backward", "expand_backward"):
        *tile, strategy = filled.MEASURED[direction, "half"]
        assert filled.choose_strategy(direction, *strategy[:4], torch.float16, cpu) == strategy.choice
        for only in tile:
            assert filled.choose_tiles(direction, *only[:4], torch.float16, cpu) == only.choice
    assert {verb for verb, _, entry in filled.committed() if device in entry.reason} == verbs - {"forward", "backward"}


def test_the_sweep_compiles_its_candidates_ahead():
    assert list(right("compiled").folder.rglob("*.cubin"))


FAKE_PYTHON = """#!/bin/sh
echo "$@" >> "$FAKE/calls"
case "$FASTLORA_BUILD $*" in "1 "*"pip install"*) exit "${FULL_BUILD:-0}" ;; esac
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


def test_a_build_that_fails_is_said_and_what_compiles_is_kept(tmp_path):
    done, ran = call_script(tmp_path, FULL_BUILD="1")
    assert done.returncode == 0 and ran == ["build", "build", "test", "headline"]
    assert "THE FULL BUILD FAILED" in done.stdout
    assert "native.reason()" in (tmp_path / "calls").read_text()


def test_the_script_refuses_unknown_steps_and_keeps_its_limit(tmp_path):
    done, ran = call_script(tmp_path, STEPS="build,tests")
    assert (
        done.returncode == 2 and not ran and "'tests' is none of build, sweep, test, sanitize, headline" in done.stderr
    )
    done, ran = call_script(tmp_path, LIMIT="0")
    assert done.returncode == 1 and not ran and done.stdout.count("out of time, left out: ") >= 4


def test_the_scripts_dry_run_asks_for_no_gpu(tmp_path):
    done, ran = call_script(tmp_path, DRY_RUN="1")
    assert done.returncode == 0 and ran == ["bench", "sweep", "bench", "sweep"], done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.count("--dry-run null") for call in calls] == [0, 0, 1, 1]


@pytest.mark.parametrize("code", [0, 1, 3])
def test_memcheck_succeeds_by_exit_code_0_alone(tmp_path, code):
    checker = tmp_path / "compute-sanitizer"
    checker.write_text(f'#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $@" >> "$FAKE/checks"\nexit {code}\n')
    checker.chmod(0o755)
    done, _ = call_script(tmp_path, STEPS="sanitize", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == (code != 0) and f"memcheck: exit {code}" in done.stdout
    checks = (tmp_path / "checks").read_text().splitlines()
    assert [line.split()[:3] for line in checks] == [["1", "--tool", tool] for tool in ("memcheck", "racecheck")]


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
