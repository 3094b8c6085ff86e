"""RankLayout: packing of adapter factors, against sums in plain Python."""

from __future__ import annotations

import pickle
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlora.ops.native import RankLayout

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


@given(arguments(), st.data())
def test_changes_pack_only_the_adapter_that_changed(given_arguments, data):
    ranks, out_features, in_features = given_arguments
    projections = len(out_features)
    new = data.draw(st.lists(st.integers(0, 300), min_size=projections, max_size=projections))
    layout = RankLayout(ranks, out_features, in_features)
    added = layout.add_adapter(new)
    assert added == RankLayout([*ranks, new], out_features, in_features)
    assert layout.shared_with(added) == len(ranks) and added.num_adapters == len(ranks) + 1
    assert layout.shared_with(RankLayout(ranks, out_features, in_features)) == 0
    if not ranks:
        return
    adapter = data.draw(st.integers(0, len(ranks) - 1))
    removed = layout.delete_adapter(adapter)
    kept = [old for index, old in enumerate(ranks) if index != adapter]
    again = RankLayout(kept, out_features, in_features)
    assert removed == again and layout.shared_with(removed) == len(ranks) - 1
    assert (removed.rank_offsets, removed.a_offsets) == (again.rank_offsets, again.a_offsets)
    assert removed.b_offsets == again.b_offsets and removed.total_rank == again.total_rank
    assert layout.shared_with(layout.with_ranks(adapter, new)) == len(ranks) - 1
    assert layout.shared_with(layout) == len(ranks)
    assert layout == RankLayout(ranks, out_features, in_features)


@given(arguments(), st.data())
def test_offsets_width_and_work_of_an_adapter(given_arguments, data):
    ranks, out_features, in_features = given_arguments
    layout = RankLayout(ranks, out_features, in_features)
    count = len(ranks)
    rows = data.draw(st.lists(st.integers(0, 10**6), min_size=count, max_size=count))
    probes = data.draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))
    for g, of_adapter in enumerate(ranks):
        assert layout.adapter_offsets(g) == prefix(of_adapter)
    assert layout.width() == max(map(sum, ranks), default=0)
    assert layout.width(probes) == max((sum(r) + k for r, k in zip(ranks, probes, strict=True)), default=0)
    pairs = [zip(of_adapter, out_features, strict=True) for of_adapter in ranks]
    expected = sum(m * r * (in_features + n) for m, pair in zip(rows, pairs, strict=True) for r, n in pair)
    assert layout.operations(rows) == expected
    assert layout.factor_bytes(2) == 2 * (layout.a_numel + layout.b_numel)


@given(arguments(), st.data())
def test_the_adapters_of_a_batch(given_arguments, data):
    layout = RankLayout(*given_arguments)
    known = range(layout.num_adapters)
    chosen = data.draw(st.lists(st.sampled_from(known), max_size=6)) if known else []
    batch = layout.select(chosen)
    assert batch == RankLayout([layout.ranks[g] for g in chosen], *given_arguments[1:])
    assert batch.shared_with(layout) == len(set(chosen))
    assert batch.column_starts() == [start for g in chosen for start in layout.adapter_offsets(g)]


def test_operations_ignore_the_ranks_of_other_adapters():
    alone = RankLayout([[8]], [32], 16).operations([100])
    for rank in (1, 64, 1024):
        assert RankLayout([[8], [rank]], [32], 16).operations([100, 0]) == alone


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), max_size=8), st.integers(1, 50))
def test_tiles_cover_every_row_of_an_adapter_with_rank_once(adapters, block):
    ranges, begin = [], 0
    for _, rows in adapters:
        ranges.append((begin, begin + rows))
        begin += rows
    layout = RankLayout([[rank] for rank, _ in adapters], [5], 7)
    expected = [
        (g, first, min(block, end - first))
        for g, (first_row, end) in enumerate(ranges)
        if adapters[g][0]
        for first in range(first_row, end, block)
    ]
    assert layout.tiles(ranges, block) == expected


def test_memory_grows_by_what_an_adapter_needs():
    ranks = [[8] * 7] * 64
    layout = RankLayout(ranks, [64] * 7, 64)
    assert layout.nbytes >= 64 * 7 * 4 * 8  # ranks and three offsets a projection
    assert layout.nbytes <= 64 * (7 * 4 * 8 + 400) + 1000
    assert layout.delete_adapter(3).nbytes < layout.nbytes


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
@pytest.mark.parametrize("method, arguments", [("with_ranks", [[2]]), ("delete_adapter", []), ("adapter_offsets", [])])
def test_an_unknown_adapter(adapter, method, arguments):
    with pytest.raises(ValueError, match=f"adapter is {adapter}, but the layout has 1 adapters"):
        getattr(RankLayout([[4]], [8], 16), method)(adapter, *arguments)


@pytest.mark.parametrize(
    "method, arguments, message",
    [
        ("add_adapter", [[4, 4]], r"ranks\[1\] has 2 entries, but out_features has 1"),
        ("add_adapter", [[-4]], r"ranks\[1\]\[0\] is -4; accepted: 0 or more"),
        ("add_adapter", [[2**62]], "ranks is too large"),
        ("with_ranks", [0, [2**60]], "ranks is too large"),
        ("select", [[0, 1]], "adapter is 1, but the layout has 1 adapters"),
        ("width", [[1, 2]], "probes has 2 entries, but the layout has 1 adapters"),
        ("width", [[-1]], r"probes\[0\] is -1"),
        ("width", [[2**63 - 1]], "probes is too large"),
        ("tiles", [[], 16], "ranges has 0 entries, but the layout has 1 adapters"),
        ("tiles", [[(3, 2)], 16], r"ranges\[0\] is 3 to 2"),
        ("tiles", [[(0, 2)], 0], "block is 0"),
        ("operations", [[-1]], r"rows\[0\] is -1"),
        ("operations", [[2**60]], "rows is too large"),
        ("factor_bytes", [0], "item_size is 0"),
        ("factor_bytes", [2**62], "ranks is too large"),
    ],
)
def test_bad_arguments_of_methods_are_named(method, arguments, message):
    layout = RankLayout([[4]], [8], 16)
    with pytest.raises(ValueError, match=message):
        getattr(layout, method)(*arguments)
    assert layout == RankLayout([[4]], [8], 16)


def test_with_ranks_checks_the_ranks():
    with pytest.raises(ValueError, match=r"ranks\[0\]\[0\] is -2"):
        RankLayout([[4]], [8], 16).with_ranks(0, [-2])


def test_ranks_must_be_integers():
    with pytest.raises(TypeError):
        RankLayout([[4.5]], [8], 16)
