"""Every kernel with every committed tile compiles for sm_90 without a GPU: no spills, shared memory, wgmma."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
# A child a group of verbs: importing torch and triton costs seconds.
VERBS = (
    "shrink shrink_moments grouped_shrink wgrad",
    "linear linear_moments expand",
    "linear_backward gradstat gradstat_diagonal covariance",
)

# A child, so that neither the stand-in driver nor an interpreter chosen elsewhere reaches other tests.
CHILD = """
import json, sys
from fastlora.kernels import compile_report
rows = compile_report.compile_all(verbs=tuple(sys.argv[1:]))
print(json.dumps([[row.verb, row.kernel, row.dtype, list(row.tile), row.faults()] for row in rows]))
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache of its own: a stale one would hide what the compiler says today."""
    return tmp_path_factory.mktemp("triton")


def test_no_verb_is_left_out():
    code = "from fastlora.kernels import tiling; print(*{verb for verb, _, _ in tiling.committed()})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {verb.removesuffix("_dropout") for verb in done.stdout.split()} == set(" ".join(VERBS).split())


@pytest.mark.parametrize("verbs", VERBS)
def test_every_committed_tile_compiles(verbs, cache):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    names = [name for verb in verbs.split() for name in (verb, f"{verb}_dropout")]
    command = [sys.executable, "-W", "ignore", "-c", CHILD, *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert {"bf16", "fp32", "tf32"} <= {row[2] for row in rows}
    assert not [row for row in rows if row[4]]


def test_importing_fastlora_does_not_import_triton():
    code = "import sys, fastlora; print('triton' in sys.modules, 'fastlora.kernels' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_the_folder_is_inert_under_its_bare_name():
    code = "import kernels; print(hasattr(kernels, '__version__'), [n for n in vars(kernels) if n[0] != '_'])"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "[]"]
