"""Peak memory of one step, for a process of its own: ``python -m benchmarks.harness.memory VARIANT``."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .peers import Variant, exact, function, naive, ours, peft
from .shapes import Problem, Shape

# Weights large against the tokens: a gradient that is materialised shows.
SHAPE = Shape("memory", "q, k, v of a 7B model", 1, 512, 4096, (4096, 1024, 1024), 16, fused=False)
GRADIENT_BYTES = 4 * SHAPE.outputs[0] * SHAPE.width  # the largest [N, K] in fp32

VARIANTS: dict[str, Callable[[Problem], Variant]] = {
    "peft": peft,
    "function": function,
    "naive": naive,
    "fastlora": ours,
    "python": lambda problem: ours(problem, "python", backend="eager"),
    "act_var": lambda problem: ours(problem, "act_var", ("grad_sq", "act_var")),
    "exact": exact,
}

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def supported() -> str | None:
    """Why a peak cannot be measured here, or None."""
    return None if _CLEAR.exists() and os.access(_CLEAR, os.W_OK) else "no /proc/self/clear_refs to reset the peak"


def _status(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def _step(variant: Variant) -> None:
    variant.forget()
    variant.call()
    if variant.tracker is not None:
        variant.tracker.step()


def rest(variant: Any) -> None:
    """Back to what lies between steps: parameters and input, no gradients."""
    for tensor in (variant.x, *variant.model.parameters()):
        tensor.grad = None
    variant.forget()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def resident_peak(call: Callable[[], None]) -> int:
    """Bytes of resident memory that a call adds at most, scratch of native code included."""
    _CLEAR.write_text("5")
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def peak(name: str) -> dict[str, int]:
    """Bytes of resident memory that one step adds at most, after two steps to warm up, and what autograd keeps."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    variant = VARIANTS[name](Problem(SHAPE, torch.float32))
    saved = variant.saved_bytes()
    for _ in range(2):
        _step(variant)
    rest(variant)
    return {"peak": resident_peak(lambda: _step(variant)), "saved": saved}


def measured(name: str) -> dict[str, int]:
    """``peak`` in a fresh process."""
    return in_child("benchmarks.harness.memory", name)


def in_child(module: str, *arguments: str, large: int = 2**20) -> Any:
    """What a module prints as JSON, run in a process whose allocator gives blocks of ``large`` bytes back at once."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "MALLOC_MMAP_THRESHOLD_": str(large), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{module} {' '.join(arguments)}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    from fastlora import testing

    testing.enable_torchvision()
    sys.stdout.write(json.dumps(peak(sys.argv[1])) + "\n")
