"""Where the ranks of each adapter and projection lie in h, against sums in plain Python."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastlora.ops.layout import GroupLayout, column_starts, group_layout


@st.composite
def adapters(draw, at_least: int = 0):
    """The number of projections, and the ranks of each adapter's."""
    projections = draw(st.integers(1, 5))
    ranks = st.lists(st.integers(0, 300), min_size=projections, max_size=projections)
    return projections, draw(st.lists(ranks, min_size=at_least, max_size=6))


def starts_of(ranks: list[list[int]], projections: int) -> list[int]:
    return column_starts([rank for own in ranks for rank in own], projections)


def layouts(ranks: list[list[int]], projections: int) -> GroupLayout:
    W = [torch.empty(1, 7) for _ in range(projections)]
    B = [torch.empty(1, rank) for own in ranks for rank in own]
    return GroupLayout(W, B, starts_of(ranks, projections))


@given(adapters())
def test_starts_are_prefix_sums_adapter_by_adapter(given_adapters):
    projections, ranks = given_adapters
    assert starts_of(ranks, projections) == [start for own in ranks for start in (0, *accumulate(own))]


@given(adapters(), st.data())
def test_the_adapters_of_a_batch(given_adapters, data):
    """The starts of some adapters in some order, one or more times, are each adapter's own."""
    projections, ranks = given_adapters
    chosen = data.draw(st.lists(st.sampled_from(range(len(ranks))), max_size=6)) if ranks else []
    expected = [start for g in chosen for start in starts_of([ranks[g]], projections)]
    assert starts_of([ranks[g] for g in chosen], projections) == expected


@given(adapters())
def test_other_ranks_of_one_adapter_leave_the_starts_of_the_others(given_adapters):
    projections, ranks = given_adapters
    before, each = starts_of(ranks, projections), projections + 1
    for g in range(len(ranks)):
        after = starts_of([[r + 1 for r in own] if i == g else own for i, own in enumerate(ranks)], projections)
        changed = {i // each for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b}
        assert changed == {g}


@given(adapters(at_least=1), st.data())
def test_width_and_ranks_of_the_adapters(given_adapters, data):
    projections, ranks = given_adapters
    probes = data.draw(st.lists(st.integers(0, 9), min_size=len(ranks), max_size=len(ranks)))
    found = layouts(ranks, projections)
    assert found.ranks == tuple(map(tuple, ranks))
    assert found.width([]) == max(map(sum, ranks))
    assert found.width(probes) == max(sum(own) + k for own, k in zip(ranks, probes, strict=True))
    for g, own in enumerate(ranks):
        assert (found.of(g).ranks, found.of(g).offsets) == (tuple(own), (0, *accumulate(own))[:-1])


def test_probes_of_another_number_of_adapters():
    with pytest.raises(ValueError):
        layouts([[4]], 1).width([1, 2])


@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_columns_of_projections_that_interleave(runs, data):
    """The columns of each projection, counted block by block; together they are every column of every output once."""
    runs = [[*own, 1] for own in runs]
    blocks = data.draw(st.lists(st.integers(1, 5), min_size=len(runs), max_size=len(runs)))
    W = [torch.empty(n * sum(own), 7) for own, n in zip(runs, blocks, strict=True)]
    B = [torch.empty(n * run, 2) for own, n in zip(runs, blocks, strict=True) for run in own]
    found, i = group_layout(W, B, blocks), 0
    for j, (own, n) in enumerate(zip(runs, blocks, strict=True)):
        y, seen = torch.arange(n * sum(own)).unsqueeze(0), []
        for before, run in zip(accumulate([0, *own]), own, strict=False):
            wanted = [b * sum(own) + before + k for b in range(n) for k in range(run)]
            assert found.columns_of(y, i)[0].tolist() == wanted
            assert [c + k for _, c, count in found.runs_of(i) for k in range(count)] == wanted
            assert found.outputs[i] == j or run == 0
            seen, i = seen + wanted, i + 1
        assert sorted(seen) == y[0].tolist()


@pytest.mark.parametrize(
    "blocks, why",
    [
        ([5], r"blocks: expected a divisor of each of \[12\] rows, got \[5\]"),
        ([0], "blocks: expected a divisor of each"),
        ([2, 2], "blocks: expected a divisor of each"),
        ([4], r"blocks: expected divisors of the projections' rows \[6, 6\], got \[4\]"),
    ],
)
def test_blocks_that_are_none(blocks, why):
    with pytest.raises(ValueError, match=why):
        group_layout([torch.empty(12, 3)], [torch.empty(6, 1), torch.empty(6, 2)], blocks)
