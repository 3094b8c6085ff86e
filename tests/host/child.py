"""Runs checks in a process that the null GPU takes for itself, and says what became of each."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Sequence


def run(checks: Sequence[Callable]) -> None:
    """Prints a JSON object: the name of each check, and None or what failed. Each gets a null GPU of its own."""
    import torch
    from triton.runtime import driver

    from benchmarks.host.null_gpu import null_gpu

    outside = torch.cuda.get_device_capability, driver._active
    found = {}
    for check in checks:
        try:
            with null_gpu() as gpu:
                check(gpu)
            assert (torch.cuda.get_device_capability, driver._active) == outside, "something was not put back"
            found[check.__name__] = None
        except Exception:
            found[check.__name__] = traceback.format_exc()
    json.dump(found, sys.stdout)
