"""Operands of every size and layout, and the tolerance, for the tests of the native operators."""

from __future__ import annotations

import os

import pytest
import torch

needs_library = pytest.mark.skipif(
    os.environ.get("FASTLORA_BUILD") == "0", reason="FASTLORA_BUILD=0: the native library is left out on purpose"
)


def interleaved_columns(widths: list[int], blocks: int) -> tuple[list[int], list[int]]:
    """``columns`` of projections in ``blocks`` of one matrix, and its columns counted one by one, projection by
    projection."""
    each = [width // blocks for width in widths]
    firsts, stride = [sum(each[:i]) for i in range(len(each))], sum(each)
    order = [b * stride + first + n for first, run in zip(firsts, each, strict=True) for b in range(blocks)
             for n in range(run)]  # fmt: skip
    return [*firsts, *each, *[stride] * len(each)], order


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = [0, 1, 2, 3, 7, 33, 100]
SIZES = [1, 5, 16, 17, 63, 130]
RANKS = [0, 1, 2, 3, 5, 8, 9, 16, 17, 33]
LAYOUTS = ["contiguous", "slice", "transposed", "strided"]


def make(rows: int, columns: int, dtype: torch.dtype, layout: str = "contiguous") -> torch.Tensor:
    if layout == "slice":
        return torch.randn(rows, columns + 7, dtype=dtype)[:, 3 : 3 + columns]
    if layout == "transposed":
        return torch.randn(columns, rows, dtype=dtype).t()
    if layout == "strided":
        return torch.randn(2 * rows, 3 * columns, dtype=dtype)[::2, ::3]
    return torch.randn(rows, columns, dtype=dtype)


def check(
    actual: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor, what: str, scale: torch.Tensor | None = None
) -> None:
    """Asserts that ``actual`` is as near to the float64 result as plain torch is, within a factor of 3."""
    assert actual.shape == exact.shape, what
    if exact.numel() == 0:
        return
    error = (actual.double() - exact).abs().max().item()
    allowed = 3 * (plain.double() - exact).abs().max().item()
    allowed += 4 * torch.finfo(actual.dtype).eps * (exact if scale is None else scale).abs().max().item()
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"
