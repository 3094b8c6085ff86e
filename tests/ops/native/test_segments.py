"""Segments of a mixed batch: the sort by adapter and its tiles of rows, against loops in plain Python."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastlora.ops import native, reference

NATIVE = os.environ.get("FASTLORA_BUILD") != "0"
ops = torch.ops.fastlora if native.available() else None
SOURCES = ["native", "reference"] if NATIVE else ["reference"]
pytestmark = pytest.mark.parametrize("source", SOURCES)
DISTRIBUTIONS = ["distinct", "uniform", "identical", "zipf", "skewed", "runs", "none"]


def build(source: str, ids: torch.Tensor, adapters: int):
    return (reference if source == "reference" else ops).build_segments(ids, adapters)


def tile(source: str, ranges: torch.Tensor, rows: int, block: int):
    return (reference if source == "reference" else ops).segment_tiles(ranges, rows, block)


def make_ids(distribution: str, rows: int, adapters: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if distribution == "distinct":
        return torch.arange(rows) % (adapters + 1) - 1
    if distribution == "identical":
        return torch.full((rows,), adapters - 1)
    if distribution == "none":
        return torch.full((rows,), -1)
    if distribution == "uniform":
        return torch.randint(-1, adapters, (rows,), generator=generator)
    weights = 1.0 / torch.arange(1, adapters + 1) if distribution == "zipf" else torch.full((adapters,), 0.01)
    weights[0] = max(float(weights[0]), 1.0)
    ids = torch.multinomial(weights.double(), max(rows, 1), replacement=True, generator=generator)[:rows]
    return ids.sort().values if distribution == "runs" else ids


def expected(ids: list[int], adapters: int):
    """Order, ranges and whether each adapter's rows are one run, row by row."""
    rows_of = [[m for m, id in enumerate(ids) if id == g] for g in range(adapters)]
    order = [m for rows in rows_of for m in rows] + [m for m, id in enumerate(ids) if id == -1]
    if all(rows == list(range(rows[0], rows[-1] + 1)) for rows in rows_of if rows):
        return [], [[rows[0], rows[-1] + 1] if rows else [0, 0] for rows in rows_of]
    ranges, begin = [], 0
    for rows in rows_of:
        ranges.append([begin, begin + len(rows)] if rows else [0, 0])
        begin += len(rows)
    return order, ranges


def expected_tiles(ranges: list[list[int]], rows: int, block: int) -> list[list[int]]:
    tiles = [[g, first] for g, (begin, end) in enumerate(ranges) for first in range(begin, end, block)]
    return tiles + [[-1, 0]] * (-(-rows // block) + len(ranges) - len(tiles))


def check(source: str, ids: list[int], adapters: int, block: int) -> None:
    given_ids = torch.tensor(ids, dtype=torch.int64)
    order, ranges = build(source, given_ids, adapters)
    assert order.dtype == ranges.dtype == torch.int64 and tuple(ranges.shape) == (adapters, 2)
    assert (order.tolist(), ranges.tolist()) == expected(ids, adapters)
    assert given_ids.tolist() == ids
    tiles = tile(source, ranges, len(ids), block)
    assert tiles.dtype == torch.int64 and tuple(tiles.shape) == (-(-len(ids) // block) + adapters, 2)
    assert tiles.tolist() == expected_tiles(ranges.tolist(), len(ids), block)


@given(st.data())
def test_any_layout_equals_the_plain_loop(source, data):
    adapters = data.draw(st.integers(0, 9))
    ids = data.draw(st.lists(st.integers(-1, adapters - 1), max_size=80))
    if data.draw(st.booleans()):
        ids.sort(reverse=data.draw(st.booleans()))
    check(source, ids, adapters, data.draw(st.integers(1, 90)))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("adapters", [1, 8, 32, 128])
def test_distributions(source, distribution, adapters):
    for rows in (0, 1, 2, 3, 16, 17, 64, 133):
        check(source, make_ids(distribution, rows, adapters).tolist(), adapters, 16)


def test_a_large_batch(source):
    check(source, make_ids("uniform", 100_000, 64).tolist(), 64, 64)


def test_rows_that_are_runs_already_keep_their_order(source):
    order, ranges = build(source, torch.tensor([-1, 2, 2, -1, 0, 0, 0, -1]), 4)
    assert order.tolist() == [] and ranges.tolist() == [[4, 7], [0, 0], [1, 3], [0, 0]]
    order, ranges = build(source, torch.tensor([2, 0, 2]), 3)
    assert order.tolist() == [1, 0, 2] and ranges.tolist() == [[0, 1], [0, 0], [1, 3]]


def test_strided_ids(source):
    wide = torch.tensor([[1, 9], [0, 9], [1, 9], [-1, 9]])
    order, ranges = build(source, wide[:, 0], 2)
    assert order.tolist() == [1, 0, 2, 3] and ranges.tolist() == [[0, 1], [1, 3]]
    turned = ranges.t().contiguous().t()
    assert tile(source, turned, 4, 1).tolist() == tile(source, ranges, 4, 1).tolist()


@pytest.mark.parametrize(
    "ids, adapters, message",
    [
        ([0, 1, 5, 7], 5, r"ids\[2\] is 5; accepted: 0 to 4 \(an adapter\) and -1 \(base only\)"),
        ([0, -2], 5, r"ids\[1\] is -2"),
        ([-1, -1, 0], 0, r"ids\[2\] is 0"),
        ([2**62], 5, r"ids\[0\] is 4611686018427387904"),
    ],
)
def test_an_unknown_id_is_named_with_its_position(source, ids, adapters, message):
    with pytest.raises(RuntimeError, match=message):
        build(source, torch.tensor(ids), adapters)


@pytest.mark.parametrize("ids", [torch.zeros(3, dtype=torch.int32), torch.zeros(3), torch.zeros(2, 2).long()])
def test_ids_must_be_an_int64_vector(source, ids):
    with pytest.raises(RuntimeError, match="ids"):
        build(source, ids, 2)


def test_a_huge_block_is_one_tile_an_adapter(source):
    ranges = torch.tensor([[0, 3], [3, 5]])
    assert tile(source, ranges, 5, 2**62).tolist() == [[0, 0], [1, 3], [-1, 0]]


@pytest.mark.parametrize(
    "ranges, rows, block, message",
    [
        ([[0, 3]], 2, 1, r"ranges\[0\] is 0 to 3"),
        ([[2, 1]], 5, 1, r"ranges\[0\] is 2 to 1"),
        ([[-1, 1]], 5, 1, r"ranges\[0\] is -1 to 1"),
        ([[0, 4], [0, 4]], 5, 1, r"ranges\[1\] is 0 to 4"),
        ([[0, 1]], -1, 1, "rows is -1"),
        ([[0, 1]], 1, 0, "block is 0"),
        ([0, 1], 1, 1, "ranges has 1 dimensions"),
    ],
)
def test_bad_tiles_are_named(source, ranges, rows, block, message):
    with pytest.raises(RuntimeError, match=message):
        tile(source, torch.tensor(ranges), rows, block)


def test_fake_tensors_have_the_shapes(source):
    if source == "reference":
        pytest.skip("the reference is plain torch")
    torch.library.opcheck(ops.build_segments.default, (torch.tensor([1, 0, 1, -1]), 2))
    torch.library.opcheck(ops.build_segments.default, (torch.tensor([0, 0, 1, -1]), 2))
    torch.library.opcheck(ops.segment_tiles.default, (torch.tensor([[0, 3], [3, 5]]), 7, 2))
