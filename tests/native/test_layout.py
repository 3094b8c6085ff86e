"""RankLayout: packing of adapter factors, against sums in plain Python."""

from __future__ import annotations

import pickle
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlora.native import RankLayout

if RankLayout is None:
    pytest.skip("the native layout module was not built", allow_module_level=True)


@st.composite
def arguments(draw):
    projections = draw(st.integers(1, 5))
    ranks = st.lists(st.integers(0, 300), min_size=projections, max_size=projections)
    widths = st.lists(st.integers(1, 10_000), min_size=projections, max_size=projections)
    return draw(st.lists(ranks, max_size=6)), draw(widths), draw(st.integers(1, 20_000))


def prefix(values):
    return [0, *accumulate(values)]


@given(arguments())
def test_offsets_are_prefix_sums_in_adapter_major_order(given_arguments):
    ranks, out_features, in_features = given_arguments
    layout = RankLayout(ranks, out_features, in_features)
    flat = [(rank, width) for of_adapter in ranks for rank, width in zip(of_adapter, out_features, strict=True)]
    assert layout.num_adapters == len(ranks) and layout.num_projections == len(out_features)
    assert layout.ranks == ranks and layout.out_features == out_features and layout.in_features == in_features
    assert layout.rank_offsets == prefix(rank for rank, _ in flat)
    assert layout.a_offsets == prefix(rank * in_features for rank, _ in flat)
    assert layout.b_offsets == prefix(rank * width for rank, width in flat)
    assert layout.column_offsets == prefix(out_features)
    assert layout.total_rank == layout.rank_offsets[-1]
    assert layout.a_numel == layout.a_offsets[-1] and layout.b_numel == layout.b_offsets[-1]


@given(arguments())
def test_pickle_equality_and_repr_round_trip(given_arguments):
    layout = RankLayout(*given_arguments)
    again = pickle.loads(pickle.dumps(layout))
    assert again == layout and hash(again) == hash(layout) and again.a_offsets == layout.a_offsets
    assert eval(repr(layout), {"RankLayout": RankLayout}) == layout
    ranks, out_features, in_features = given_arguments
    assert layout != RankLayout(ranks, out_features, in_features + 1)
    assert layout != "something else"


@given(arguments().filter(lambda it: it[0]), st.data())
def test_with_ranks_changes_one_adapter(given_arguments, data):
    ranks, out_features, in_features = given_arguments
    adapter = data.draw(st.integers(0, len(ranks) - 1))
    new = data.draw(st.lists(st.integers(0, 300), min_size=len(out_features), max_size=len(out_features)))
    layout = RankLayout(ranks, out_features, in_features)
    changed = layout.with_ranks(adapter, new)
    expected = [new if index == adapter else old for index, old in enumerate(ranks)]
    assert changed == RankLayout(expected, out_features, in_features)
    assert layout == RankLayout(ranks, out_features, in_features)


@pytest.mark.parametrize(
    "ranks, out_features, in_features, message",
    [
        ([[4, -1]], [8, 8], 16, r"ranks\[0\]\[1\] is -1; accepted: 0 or more"),
        ([[4, 4], [4]], [8, 8], 16, r"ranks\[1\] has 1 entries, but out_features has 2"),
        ([[4]], [0], 16, r"out_features\[0\] is 0; accepted: 1 or more"),
        ([[4]], [8], 0, "in_features is 0; accepted: 1 or more"),
        ([], [], 16, "out_features is empty"),
        ([[2**40]], [8], 2**40, "ranks is too large"),
        ([[2**40]], [2**40], 1, "ranks is too large"),
        ([[2**62], [2**62]], [1], 1, "ranks is too large"),
        ([], [2**62, 2**62], 1, "out_features is too large"),
    ],
)
def test_bad_arguments_are_named(ranks, out_features, in_features, message):
    with pytest.raises(ValueError, match=message):
        RankLayout(ranks, out_features, in_features)


@pytest.mark.parametrize("adapter", [-1, 1])
def test_with_ranks_of_an_unknown_adapter(adapter):
    with pytest.raises(ValueError, match=f"adapter is {adapter}, but the layout has 1 adapters"):
        RankLayout([[4]], [8], 16).with_ranks(adapter, [2])


def test_with_ranks_checks_the_ranks():
    with pytest.raises(ValueError, match=r"ranks\[0\]\[0\] is -2"):
        RankLayout([[4]], [8], 16).with_ranks(0, [-2])


def test_ranks_must_be_integers():
    with pytest.raises(TypeError):
        RankLayout([[4.5]], [8], 16)
