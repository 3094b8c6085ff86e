"""The kernel cases in Triton's interpreter, which must be chosen before Triton is imported: hence a child process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent


# cases_device.py wants a GPU.
CASES = sorted(path.name for path in HERE.glob("cases_*.py") if path.name != "cases_device.py")


@pytest.mark.parametrize("cases", CASES)
def test_in_the_interpreter(cases, tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=short", "-p", "no:cacheprovider", "-o", "addopts="]
    command += ["-o", "python_files=cases_*.py", f"--confcutdir={HERE}", f"--rootdir={HERE.parents[2]}"]
    done = subprocess.run([*command, str(HERE / cases)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
