"""Many adapters in one batch: against one adapter, the usual Python loop and separate runs; segments; the penalty."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

import fastlora
from fastlora.ops import native, reference
from fastlora.ops.layout import build_segments

from .harness.interleave import Times, paired, rows, spread
from .harness.many import Loop, Mixed, Separate, by_row, check, draw_factors, expected
from .harness.shapes import SHAPES, Problem, Shape, Target

RANKS = (4, 8, 16, 32)
MEAN = 15  # of RANKS
# In this order the rows of a Zipf batch of 32 adapters have a mean rank of 15.1.
ZIPF_RANKS = (16, 8, 32, 4)
TOKENS, ADAPTERS = 100_000, 64
MATRICES, LAYERS = 72, 12


def _problem(fused: bool) -> Problem:
    torch.manual_seed(0)
    return Problem(replace(SHAPES["S1"], name="S1", rank=MEAN, fused=fused, rounds=21), torch.float32)


def zipf(rows: int, adapters: int) -> torch.Tensor:
    """Adapter of every row; adapter g has a share proportional to 1 / (g + 1)."""
    generator = torch.Generator().manual_seed(2)
    return torch.multinomial(1.0 / torch.arange(1, adapters + 1), rows, replacement=True, generator=generator)


def even(rows: int, adapters: int) -> torch.Tensor:
    """Equal shares, rows in no order."""
    generator = torch.Generator().manual_seed(2)
    return (torch.arange(rows) % adapters)[torch.randperm(rows, generator=generator)]


def cases(shape: Shape) -> dict[str, tuple[tuple[int, ...], torch.Tensor, list[Target]]]:
    """Ranks, ids and targets of every batch that is compared with one adapter of the mean rank."""
    one, part = Target("mixed", "ratio_to_one", 1.10), Target("mixed", "part_to_loop", 0.60)
    return {
        "sample": (RANKS, torch.arange(shape.batch) % 4, [one, part]),
        "token": (RANKS, even(shape.rows, 4), [one, part]),
        "zipf32": (ZIPF_RANKS * 8, zipf(shape.rows, 32), [Target("mixed", "ratio_to_one", 1.25)]),
    }


def _parts(times: Times) -> list[dict[str, Any]]:
    """Rows of times, and what the adapters add to the frozen layers: by the loop's, both within a round."""
    found = rows(times)
    bare = times["bare"]
    own = {
        name: {i: t - bare[i] for i, t in each.items() if i in bare} for name, each in times.items() if name != "bare"
    }
    shares = paired(own, "loop") if "loop" in own else {}
    for row in found:
        row["ratio_to_one"] = row.pop("ratio_to_fastlora")
        if row["variant"] in own:
            row["part_ms"] = spread([1e3 * t for t in own[row["variant"]].values()])
        if row["variant"] in shares:
            row["part_to_loop"] = shares[row["variant"]]
    return found


def _result(problem: Problem, case: str, ranks, ids, targets=()) -> dict[str, Any]:
    shape = problem.shape
    each = by_row(problem, ids)
    mean = float(torch.tensor(ranks, dtype=torch.float64)[each].mean())
    model = f"{shape.model} {'fused' if shape.fused else 'separate'}, {case}"
    return {"kind": "adapters", "case": case, "model": model,
            "rows_of_x": shape.rows, "width": shape.width, "outputs": shape.outputs, "fused": shape.fused,
            "adapters": len(ranks), "present": len(each.unique()), "mean_rank": mean,
            "targets": [asdict(target) for target in targets]}  # fmt: skip


@pytest.mark.benchmark(group="adapters", timer=time.thread_time)
@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
@pytest.mark.parametrize("case", ["sample", "token", "zipf32"])
def test_mixed_batch(case, fused, interleaved, record):
    """One batch of several adapters against one adapter of the mean rank, and against the usual loop."""
    problem = _problem(fused)
    ranks, ids, targets = cases(problem.shape)[case]
    factors, single = draw_factors(problem, ranks), draw_factors(problem, (MEAN,))
    built = [Mixed(problem, [], None, "bare"), Mixed(problem, single, None, "fastlora"),
             Mixed(problem, factors, ids), Loop(problem, factors, ids),
             Mixed(problem, single, None, "control")]  # fmt: skip
    several, alone = expected(problem, factors, ids), expected(problem, single, None)
    errors = {v.name: check(v, several if len(v.factors) > 1 else alone) for v in built if v.factors}
    found = interleaved(built, problem.shape.rounds, 1, summarise=_parts)
    if found:
        record({**_result(problem, case, ranks, ids, targets), "errors": errors, "rows": found})


@pytest.mark.benchmark(group="adapters", timer=time.thread_time)
@pytest.mark.parametrize("spread_of_ids", ["even", "zipf"])
@pytest.mark.parametrize("adapters", [1, 4, 16, 64])
def test_together_and_apart(adapters, spread_of_ids, interleaved, record):
    """All adapters in one batch against a run of each on its own rows: separate q, k, v, one id a token."""
    problem = _problem(False)
    ranks = [MEAN] if adapters == 1 else (list(ZIPF_RANKS) * 16)[:adapters]
    ids = {"even": even, "zipf": zipf}[spread_of_ids](problem.shape.rows, adapters)
    factors = draw_factors(problem, ranks)
    built = [Mixed(problem, [], None, "bare"), Mixed(problem, factors, ids, "fastlora"),
             Separate(problem, factors, ids)]  # fmt: skip
    exact = expected(problem, factors, ids)
    errors = {v.name: check(v, exact) for v in built if v.factors}
    found = interleaved(built, 11, 1, summarise=_parts)
    if found:
        case = f"{adapters} {spread_of_ids}"
        record({**_result(problem, case, ranks, ids), "kind": "apart", "errors": errors, "rows": found})


@pytest.mark.skipif(not native.available(), reason="the native library is not there")
@pytest.mark.benchmark(group="segments", timer=time.thread_time, disable_gc=True)
@pytest.mark.parametrize("spread_of_ids", ["even", "zipf", "runs"])
def test_segments(spread_of_ids, benchmark, record):
    """100,000 tokens by 64 adapters, equal to the reference before they are timed."""
    ids = {"even": even, "zipf": zipf}.get(spread_of_ids, even)(TOKENS, ADAPTERS)
    ids = ids.sort().values if spread_of_ids == "runs" else ids
    order, ranges = build_segments(ids, ADAPTERS)
    assert all(map(torch.equal, (order, ranges), reference.build_segments(ids, ADAPTERS)))
    benchmark.pedantic(build_segments, args=(ids, ADAPTERS), rounds=101, warmup_rounds=5)
    if not benchmark.disabled:
        times = [1e3 * t for t in benchmark.stats.stats.data]
        record({"kind": "segments", "ids": spread_of_ids, "tokens": TOKENS, "adapters": ADAPTERS, "ms": spread(times),
                "bytes": order.nbytes + ranges.nbytes, "limit_ms": 2.0})  # fmt: skip


def _encoder(layers: int):
    """Encoder layers of RoBERTa-base with random weights, every linear adapted at rank 8."""
    from transformers import RobertaConfig
    from transformers.models.roberta.modeling_roberta import RobertaEncoder

    config = RobertaConfig(num_hidden_layers=layers, attn_implementation="sdpa", hidden_dropout_prob=0.0,
                           attention_probs_dropout_prob=0.0)  # fmt: skip
    targets = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
    return fastlora.inject(RobertaEncoder(config), fastlora.LoraConfig(r=8, target_modules=targets))


class _Block:
    """Forward and backward of one block of the model, a twelfth of a step without embeddings, head and optimiser."""

    name, every, tracker = "fastlora", 1, None

    def __init__(self):
        torch.manual_seed(0)
        self.model, self.x = _encoder(1), torch.randn(32, 64, 768, requires_grad=True)

    def forget(self) -> None:
        """Gradients are dropped outside of the time."""
        self.model.zero_grad()
        self.x.grad = None

    def call(self) -> None:
        self.model(self.x)[0].sum().backward()


class _Penalty:
    """``tracker.apply_penalty`` on the whole encoder: by the native operator, or by the formula."""

    every, tracker = 1, None

    def __init__(self, name: str, backend: str):
        torch.manual_seed(0)
        self.name, model = name, _encoder(LAYERS)
        self.factors = [p for p in model.parameters() if p.requires_grad]
        for factor in self.factors:
            factor.data.normal_(std=0.1)
            factor.grad = torch.zeros_like(factor)
        self.penalised = fastlora.track(model)
        self.penalised.importance = torch.linspace(0.1, 1.0, MATRICES)
        for layer in self.penalised.layers.values():
            layer.backend = backend
        self.how = fastlora.explain(model).penalty["default"][0]

    def forget(self) -> None:
        """Sums of repeated calls do not matter to the time."""

    def call(self) -> None:
        self.penalised.apply_penalty(1e-4)


def _share(times: Times) -> list[dict[str, Any]]:
    """Rows of times, and percent of a step of twelve blocks, within a round."""
    found = rows(times)
    for row in found:
        row["percent"] = {k: 100 * v / LAYERS if k != "rounds" else v for k, v in row["ratio_to_fastlora"].items()}
    return found


@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None or not native.available(),
    reason="transformers or the native library is not there",
)
@pytest.mark.benchmark(group="penalty", timer=time.thread_time)
def test_penalty(interleaved, record):
    """72 matrices of RoBERTa-base against twelve times the forward and backward of one of its blocks."""
    block, native_, formula = _Block(), _Penalty("penalty", "auto"), _Penalty("penalty_formula", "reference")
    assert (native_.how, formula.how, len(native_.factors)) == ("native", "formula", 2 * MATRICES)
    for penalty in (native_, formula):
        penalty.call()
    for a, b in zip(native_.factors, formula.factors, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-9)
    found = interleaved([block, native_, formula], 11, 1, summarise=_share)
    if found:
        record({"kind": "penalty", "matrices": MATRICES, "rows_of_x": 32 * 64, "rows": found, "limit_percent": 0.3})
