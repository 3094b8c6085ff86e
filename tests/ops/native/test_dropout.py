"""The mask of dropout is Philox4x32-10 of (seed, projection, row, column), bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.native_help import DTYPES, LAYOUTS, check, make, needs_library

from fastlora.ops import reference

pytestmark = [needs_library, pytest.mark.every_isa]

ops = torch.ops.fastlora


def philox(counter: tuple, seed: int) -> list[np.ndarray]:
    """Philox4x32-10 on arrays of 32-bit words held in uint64."""
    mask = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = (np.asarray(word, dtype=np.uint64) for word in counter)
    key0, key1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        product0, product1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c2 = (product1 >> np.uint64(32)) ^ c1 ^ np.uint64(key0), (product0 >> np.uint64(32)) ^ c3 ^ np.uint64(key1)
        c1, c3 = product1 & mask, product0 & mask
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def test_philox_oracle_on_the_published_vectors():
    ones = 0xFFFFFFFF
    assert [int(word) for word in philox((0, 0, 0, 0), 0)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    all_ones = [int(word) for word in philox((ones,) * 4, (ones << 32) | ones)]
    assert all_ones == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 123456789012345678])
def test_dropout_mask_is_philox(seed, dtype):
    for rows, columns, projection, p in [(0, 5, 0, 0.5), (3, 1, 2, 0.5), (7, 130, 1, 0.1), (33, 67, 0, 0.9)]:
        x = make(rows, columns, dtype, LAYOUTS[columns % 4])
        out = ops.dropout(x, torch.tensor(seed), projection, p)
        m, k = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
        words = np.stack(philox((k // 4, m, np.zeros_like(m), np.full_like(m, projection)), seed))
        bits = np.take_along_axis(words, (k % 4)[None], axis=0)[0]
        keep = torch.from_numpy(bits >= np.uint64(round(p * 2**32)))
        check(out, x.double() * keep / (1 - p), x * keep / (1 - p), f"p={p}")
        assert torch.equal(out != 0, keep & (x != 0))


def test_dropout_with_probability_zero_changes_no_bit():
    x = torch.randn(9, 21)
    assert torch.equal(ops.dropout(x, torch.tensor(3), 0, 0.0), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_with_keys_of_their_own_are_those_of_the_reference(dtype):
    for rows, columns, projection, p in [(0, 5, 0, 0.5), (3, 1, 2, 0.5), (40, 130, 1, 0.1)]:
        x = make(rows, columns, dtype, LAYOUTS[columns % 4])
        keys = torch.stack([torch.randint(-(2**62), 2**62, (rows,)), torch.randint(2**62, (rows,))]).t()
        out, exact = ops.dropout_rows(x, keys, projection, p), reference.dropout_rows(x.double(), keys, projection, p)
        assert torch.equal(out != 0, exact != 0)
        check(out, exact, reference.dropout_rows(x, keys, projection, p), f"p={p}")
    seed = torch.tensor(-5)
    assert torch.equal(ops.dropout(x, seed, 3, 0.3), ops.dropout_rows(x, reference.row_keys(seed, len(x)), 3, 0.3))
