"""Peak memory: of a step with statistics of a frozen weight, and of a start from its gradient."""

from __future__ import annotations

import importlib.util

import pytest

from .harness import lora_ga, memory

# What has to run for the check; the other rows are for the report.
CHECKED = ("naive", "fastlora", "exact")


@pytest.mark.skipif(memory.supported() is not None, reason=str(memory.supported()))
@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed: nothing to compare with")
@pytest.mark.benchmark(group="memory")
def test_peak_memory(benchmark, record):
    """Exact statistics add less than one [N, K] buffer to a step, the naive way at least one."""
    names = [name for name in memory.VARIANTS if name in CHECKED or not benchmark.disabled]
    found = {name: memory.measured(name) for name in names if name != "fastlora"}
    found["fastlora"] = benchmark.pedantic(memory.measured, ("fastlora",), rounds=1)
    extra = {name: found[name]["peak"] - found["fastlora"]["peak"] for name in ("exact", "naive")}
    assert extra["exact"] < memory.GRADIENT_BYTES <= extra["naive"], extra
    if not benchmark.disabled:
        s = memory.SHAPE
        rows = [{"variant": name, **found[name]} for name in memory.VARIANTS]
        record({"kind": "memory", "model": s.model, "rows_of_x": s.rows, "width": s.width, "outputs": s.outputs,
                "rank": s.rank, "gradient": memory.GRADIENT_BYTES, "rows": rows})  # fmt: skip


@pytest.mark.skipif(memory.supported() is not None, reason=str(memory.supported()))
@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed: nothing to compare with")
@pytest.mark.benchmark(group="memory")
def test_peak_memory_of_lora_ga(benchmark, record):
    """LoRA-GA adds less than the gradients of the weights, which PEFT's keeps all at once."""
    found = {"peft": lora_ga.measured("peft")}
    found["fastlora"] = benchmark.pedantic(lora_ga.measured, ("fastlora",), rounds=1)
    assert found["fastlora"] < lora_ga.GRADIENTS_BYTES <= found["peft"], found
    if not benchmark.disabled:
        record({"kind": "lora_ga", "model": f"{lora_ga.DEPTH} matrices {lora_ga.WIDTH} x {lora_ga.WIDTH}",
                "rank": lora_ga.RANK, "gradients": lora_ga.GRADIENTS_BYTES,
                "rows": [{"variant": n, "label": t, "peak": found[n]} for n, t in lora_ga.LABELS.items()]})  # fmt: skip
