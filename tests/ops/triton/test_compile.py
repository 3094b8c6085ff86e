"""Every kernel with every committed tile compiles for sm_90 without a GPU: no spills, shared memory, wgmma."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[3]
COMMITTED = ROOT / "benchmarks" / "results" / "triton_compile_sm90.md"
# What CI keeps of every run.
ARTEFACT = ROOT / "build" / "triton_compile_sm90.md"
# A child a group of verbs: importing torch and triton costs seconds.
VERBS = (
    "shrink shrink_backward grouped_shrink wgrad expand_backward",
    "shrink_linear linear linear_moments expand",
    "shrink_linear_backward linear_backward gradstat gradstat_diagonal covariance",
)

# A child, so that neither the stand-in driver nor an interpreter chosen elsewhere reaches other tests.
CHILD = """
import json, sys
from fastlora.kernels import compile_report
rows, device = compile_report.compile_all(operations=tuple(sys.argv[1:])), compile_report.device_of((9, 0))
found = [[row.operation, row.kernel, row.dtype, list(row.tile), row.faults(device)] for row in rows]
print(json.dumps([found, compile_report.table(rows).splitlines()]))
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache of its own: a stale one would hide what the compiler says today."""
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="module")
def tables():
    """The lines of every group's table, by group."""
    return {}


def test_no_verb_is_left_out():
    code = "from fastlora.kernels import tiling; print(*{verb for verb, _, _ in tiling.committed()})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {verb.removesuffix("_dropout") for verb in done.stdout.split()} == set(" ".join(VERBS).split())


@pytest.mark.parametrize("verbs", VERBS)
def test_every_committed_tile_compiles(verbs, cache, tables):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    names = [name for verb in verbs.split() for name in (verb, f"{verb}_dropout")]
    command = [sys.executable, "-W", "ignore", "-c", CHILD, *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    rows, tables[verbs] = json.loads(done.stdout.splitlines()[-1])
    assert {"bf16", "fp32", "tf32"} <= {row[2] for row in rows}
    assert not [row for row in rows if row[4]]


def test_the_table_is_written_and_the_committed_one_is_of_these_kernels(tables):
    if len(tables) < len(VERBS):
        pytest.skip("needs every group of verbs")
    head = tables[VERBS[0]][: tables[VERBS[0]].index("|---|---|---|---|---|---|---|---|---|---|---|") + 1]
    rows = list(dict.fromkeys(line for lines in tables.values() for line in lines[len(head) :]))
    ARTEFACT.parent.mkdir(exist_ok=True)
    ARTEFACT.write_text("\n".join([*head, *rows]) + "\n")
    committed = COMMITTED.read_text().splitlines()
    if committed[: len(head)] != head:
        pytest.skip("the committed table is another Triton's")
    stale = f"run `python -m fastlora.kernels.compile_report --output {COMMITTED.relative_to(ROOT)}`"
    assert set(committed[len(head) :]) == set(rows), stale


ROWS = """
import collections, torch
from fastlora.kernels import compile_report, primitives, shrink, linear, wgrad
from fastlora.kernels.tiling import TileConfig
from triton.runtime import driver
found = collections.defaultdict(set)
def launch(kernel, grid, *arguments, **options):
    found[kernel.fn.__name__].add(kernel.warmup(*arguments, grid=grid, **options).hash)
driver.set_active(compile_report.Offline())
primitives.launcher = launch
for M in (1, 100, 4096):
    operands = compile_report._Operands(torch.bfloat16, M=M, K=256)
    for verb in ("linear", "linear_backward", "wgrad"):
        for call in compile_report._cases(verb, TileConfig(16, 16, 16, 4, 2), operands).values():
            call()
print(*[f"{name} {len(found[name])}" for name in sorted(found) if name != "reduce_kernel"], sep=chr(10))
"""


def test_another_number_of_rows_compiles_nothing(cache):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ROWS], env=environment, capture_output=True, text=True, check=True
    )
    # wgrad's kernel is two: with tables of adapters and without.
    assert done.stdout.split() == ["linear_backward_kernel", "1", "linear_kernel", "1", "wgrad_kernel", "2"]


# Arguments of 1, odd and even strides, fp32 and bf16: a part of the cases that compiles in seconds.
LAUNCHED = "tiny-fp32 or one_row-fp32 or (fused and bf16) or test_gradstat or test_covariance or test_signs"


def test_what_the_cases_launch_compiles(tmp_path):
    """The types and specialisations of a real launch, which the interpreter does not check."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"FASTLORA_KERNEL_COMPILE_ONLY": "1", "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    files = [str(Path(__file__).parent / f"cases_{name}.py") for name in ("verbs", "grouped", "statistics")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=short", "-p", "no:cacheprovider", "-o", "addopts="]
    command += ["-o", "python_files=cases_*.py", f"--confcutdir={Path(__file__).parent}", f"--rootdir={ROOT}"]
    done = subprocess.run([*command, "-k", LAUNCHED, *files], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    compiled = {cubin.stem for cubin in tmp_path.rglob("*.cubin")}
    kernels = (ROOT / "kernels").glob("*.py")
    assert compiled == {name for file in kernels for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.M)}


def test_importing_fastlora_does_not_import_triton():
    code = "import sys, fastlora; print('triton' in sys.modules, 'fastlora.kernels' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_the_folder_is_inert_under_its_bare_name():
    code = "import kernels; print(hasattr(kernels, '__version__'), [n for n in vars(kernels) if n[0] != '_'])"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "[]"]
