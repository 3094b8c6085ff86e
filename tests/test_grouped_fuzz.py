"""Generated layouts of many adapters against the float64 formula, and the work that the operator asks for."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from counted_help import multiply_adds, needs_counting
from hypothesis import given, settings
from hypothesis import strategies as st
from test_grouped_ops import make, run

from fastlora import native

RANKS = [1, 2, 3, 5, 8, 16, 17, 64, 128]
ADAPTERS = [1, 8, 32, 128]
DISTRIBUTIONS = ["distinct", "uniform", "identical", "zipf", "skewed"]


def draw_ids(distribution: str, rows: int, adapters: int, base: float, generator: torch.Generator) -> list[int]:
    """Ids in no particular order; a row is base only with probability ``base``, and adapters may get no row."""
    weights = {
        "uniform": torch.ones(adapters),
        "zipf": 1.0 / torch.arange(1, adapters + 1),
        "skewed": torch.tensor([50.0 * adapters] + [1.0] * (adapters - 1)),
    }
    if rows == 0:
        return []
    if distribution == "distinct":
        ids = torch.randperm(max(rows, adapters), generator=generator)[:rows] % adapters
    elif distribution == "identical":
        ids = torch.full((rows,), adapters - 1)
    else:
        ids = torch.multinomial(weights[distribution], rows, replacement=True, generator=generator)
    return torch.where(torch.rand(rows, generator=generator) < base, -1, ids).tolist()


@st.composite
def layouts(draw):
    """Operands of one call: adapters, their ranks by projection, rows, ids, uneven projections, probes."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    adapters = draw(st.sampled_from(ADAPTERS) | st.integers(1, 40))
    rows = draw(st.sampled_from([0, 1, 133]) | st.integers(0, 133))
    N = draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    # A rank of 128 is rare enough that forty adapters stay quick, and still comes up beside small ones.
    pool = draw(st.lists(st.sampled_from(RANKS), min_size=1, max_size=4))
    picks = torch.randint(len(pool), (adapters, len(N)), generator=generator)
    ranks = tuple(tuple(pool[i] for i in each) for each in picks.tolist())
    base = draw(st.sampled_from([0.0, 0.1, 1.0]))
    ids = draw_ids(draw(st.sampled_from(DISTRIBUTIONS)), rows, adapters, base, generator)
    probes = tuple(torch.randint(4, (adapters,), generator=generator).tolist())
    case = make(ids, K=draw(st.integers(1, 48)), N=tuple(N), ranks=ranks, probes=probes, seed=draw(st.integers(0, 999)))
    # Sums of up to 128 products keep the scale of the others.
    case["B"] = [b / max(b.shape[1], 1) ** 0.5 for b in case["B"]]
    return case


def magnitudes(case: dict) -> dict:
    """The same operands without signs: nothing cancels, so that their results are the sums of the terms' sizes."""

    def unsigned(value):
        if isinstance(value, torch.Tensor):
            return value.abs()
        return [unsigned(v) for v in value] if isinstance(value, list) else value

    return {name: unsigned(value) for name, value in case.items()}


def within_error(case: dict) -> None:
    """Four times the plain formula's own error in fp32, and four roundings of the terms, some of which cancel."""
    exact, terms = (run(operands, None, dtype=torch.float64) for operands in (case, magnitudes(case)))
    for a, e, size, p in zip(run(case, "auto"), exact, terms, run(case), strict=True):
        assert a.shape == e.shape
        if e.numel():
            allowed = 4 * (p - e).abs().max() + 4 * torch.finfo(torch.float32).eps * size
            assert ((a - e).abs() <= allowed).all(), ((a - e).abs().max(), e.abs().max())


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(layouts())
def test_generated_layouts(case):
    """Outputs, dx, and dA, dB and Q of every adapter that there is, with rows or without."""
    within_error(case)


@pytest.mark.parametrize("adapters", ADAPTERS)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_distribution_and_every_rank(distribution, adapters):
    """What generated layouts may miss: each distribution with each number of adapters and all ranks among them."""
    generator = torch.Generator().manual_seed(adapters)
    for rows in (1, 133):
        ids = draw_ids(distribution, rows, adapters, 0.1, generator)
        ranks = tuple((RANKS[g % 9], RANKS[(g + 4) % 9]) for g in range(adapters))
        case = make(ids, K=24, N=(10, 6), ranks=ranks, probes=())
        case["B"] = [b / b.shape[1] ** 0.5 for b in case["B"]]
        within_error(case)


@pytest.fixture
def counted(monkeypatch) -> Counter:
    """Multiply-adds of both native passes by name: every call that the backend makes goes to its counting twin too."""
    found, ops = Counter(), torch.ops.fastlora

    def count(name: str, run_it, twin) -> None:
        def call(first, *rest):
            copy = [t.clone() for t in first] if isinstance(first, list) else first.clone()
            found[name] += twin(copy, *rest)
            return run_it(first, *rest)

        monkeypatch.setattr(ops, f"lora_grouped_{name}_", SimpleNamespace(default=call))

    count("forward", ops.lora_grouped_forward_.default, multiply_adds("forward"))
    count("backward", ops.lora_grouped_backward_.default, multiply_adds("backward"))
    return found


@needs_counting
@pytest.mark.skipif(not native.available(), reason="the native library is not there")
@pytest.mark.parametrize("adapters", [2, 8, 32])
def test_work_is_own_rows_times_own_ranks(counted, adapters):
    """Neither the sum of all ranks nor the largest rank for every row: one adapter's rank grows, for its rows only."""
    K, N = 24, (10, 6)
    ids = [m % adapters if m % 7 else -1 for m in range(120)]
    for large in RANKS:
        ranks = tuple((large, 1) if g == 1 else (2, 3) for g in range(adapters))
        case = make(ids, K=K, N=N, ranks=ranks, probes=())
        counted.clear()
        run(case, "native")
        work = sum(ids.count(g) * sum(r * (K + n) for r, n in zip(own, N, strict=True)) for g, own in enumerate(ranks))
        assert counted == {"forward": work, "backward": 2 * work}
