"""The skinny kernels in plain torch, blocked for the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .. import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Rows of a block, for each thread: 256 rows of 768 columns in fp32 fit a core's L2; at 64 the matmul itself slows down.
_ROWS = 256
# Rows of the blocks that are widened to float64, which take no part in a matmul.
_WIDE_ROWS = 32
# Rows of a tile of the gradient: it stays in cache between the product and its reduction, while the library's matmul,
# which packs x again for every tile, still runs at full speed (32 rows: a third of it).
_TILE_ROWS = 256


def _blocks(rows: int) -> Iterator[slice]:
    step = _ROWS * torch.get_num_threads()
    return (slice(start, start + step) for start in range(0, rows, step))


def shrink(x: Tensor, A: Tensor) -> Tensor:
    """``h = x A^T``: x [M, K], A [R, K] -> h [M, R] in x's dtype."""
    if x.dtype == torch.float32:
        return torch.mm(x, A.t())
    h, factor = x.new_empty(x.shape[0], A.shape[0]), A.float().t()
    for rows in _blocks(x.shape[0]):
        h[rows] = torch.mm(x[rows].float(), factor)
    return h


def expand_(
    y: Tensor,
    h: Tensor,
    factors: Sequence[Tensor],
    offsets: Sequence[int],
    columns: Sequence[int],
    scales: Sequence[float],
    moments: bool,
) -> Tensor:
    """In place ``y[:, c_i : c_i + N_i] += s_i h[:, o_i : o_i + r_i] F_i``; y [M, N], h [M, R], F_i [r_i, N_i].

    Returns the column sums of the new y and of its squares, float64 [2, N], or an empty tensor without ``moments``.
    """
    for factor, offset, column, s in zip(factors, offsets, columns, scales, strict=True):
        part = y.narrow(1, column, factor.shape[1])
        left = h.narrow(1, offset, factor.shape[0])
        if y.dtype == torch.float32:
            part.addmm_(left, factor, alpha=s)
            continue
        wide = factor.float()
        for rows in _blocks(y.shape[0]):
            part[rows] = torch.addmm(part[rows].float(), left[rows].float(), wide, alpha=s)
    return column_moments(y) if moments else y.new_empty(0, dtype=torch.float64)


def column_moments(y: Tensor) -> Tensor:
    """``[sum_m y, sum_m y^2]`` per column in float64: y [M, N] -> [2, N]. Only a few rows at a time are widened."""
    sums = y.new_zeros((2, y.shape[1]), dtype=torch.float64)
    for part in y.split(_WIDE_ROWS):
        wide = part.double()
        sums[0] += wide.sum(0)
        sums[1] += wide.square_().sum(0)
    return sums


def outer(d: Tensor, x: Tensor) -> Tensor:
    """``d^T x``: d [M, r], x [M, K] -> fp32 [r, K]."""
    if x.dtype == torch.float32:
        return torch.mm(d.float().t(), x)
    out = x.new_zeros((d.shape[1], x.shape[1]), dtype=torch.float32)
    for rows in _blocks(x.shape[0]):
        out.addmm_(d[rows].float().t(), x[rows].float())
    return out


def wgrad(
    x: Tensor,
    dy: Sequence[Tensor],
    h: Tensor,
    B: Sequence[Tensor],
    offsets: Sequence[int],
    scales: Sequence[float],
    rank: int,
    probes: int,
    need_dA: bool,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """``dh_i = s_i dy_i B_i``, ``dA = dh^T x``, ``[dB_i / s_i, Q_i] = dy_i^T [h_i, h_P]``, block by block of the rows.

    x [M, K], dy_i [M, N_i], h [M, rank + probes], B_i [N_i, r_i] -> dh [M, rank], dA [rank, K] (empty [0, K] unless
    needed), dB_i [N_i, r_i], Q_i [N_i, probes], all fp32. With ``probes`` columns of h for each projection,
    h_P are projection i's.
    """
    single = {"dtype": torch.float32, "device": x.device}
    ranks = [b.shape[1] for b in B]
    covered = sum(ranks) == rank
    dh = torch.empty(x.shape[0], rank, **single) if covered else torch.zeros(x.shape[0], rank, **single)
    dA = torch.zeros(rank if need_dA else 0, x.shape[1], **single)
    parts = [dh.narrow(1, offset, r) for offset, r in zip(offsets, ranks, strict=True)]
    factors = [s * b.float() for s, b in zip(scales, B, strict=True)]
    firsts = reference.first_probes(h, rank, probes, len(dy))
    lefts = [_beside(h, offset, r, first, probes) for offset, r, first in zip(offsets, ranks, firsts, strict=True)]
    products = [torch.zeros(r + probes, grad.shape[1], **single) for r, grad in zip(ranks, dy, strict=True)]
    for rows in _blocks(x.shape[0]):
        for grad, factor, part, left, product in zip(dy, factors, parts, lefts, products, strict=True):
            block = grad[rows].float()
            torch.mm(block, factor, out=part[rows])
            product.addmm_(left[rows].t(), block)
        if need_dA:
            dA.addmm_(dh[rows].t(), x[rows].float())
    dB = [_transposed(product[:r]).mul_(s) for product, r, s in zip(products, ranks, scales, strict=True)]
    return dh, dA, dB, [_transposed(product[r:]) for product, r in zip(products, ranks, strict=True)]


def _beside(h: Tensor, offset: int, rank: int, first: int, probes: int) -> Tensor:
    """``[h_i, h_P]`` in fp32, a view of h where the two touch."""
    if probes == 0 or offset + rank == first:
        return h.narrow(1, offset, rank + probes).float()
    return torch.cat([h.narrow(1, offset, rank), h.narrow(1, first, probes)], dim=1).float()


def _transposed(product: Tensor) -> Tensor:
    """A copy in its own memory: results of an operator must not share any."""
    return product.t().clone(memory_format=torch.contiguous_format)


def dropout(x: Tensor, seed: Tensor, projection: int, p: float) -> Tensor:
    """``reference.dropout``, a few rows at a time."""
    return dropout_rows(x, reference.row_keys(seed, x.shape[0]), projection, p)


def dropout_rows(x: Tensor, keys: Tensor, projection: int, p: float) -> Tensor:
    """``reference.dropout_rows``, a few rows at a time: the generator's words stay in cache."""
    out = torch.empty_like(x)
    for start in range(0, x.shape[0], _WIDE_ROWS):
        rows = slice(start, start + _WIDE_ROWS)
        out[rows] = reference.dropout_rows(x[rows], keys[rows], projection, p)
    return out


def gradstat(
    x: Tensor, dy: Tensor, offsets: Sequence[int], absolute: bool = True, add_norms: Callable | None = None
) -> Tensor:
    """``sum G^2`` and ``sum |G|`` of ``G = dy^T x`` for each run of rows ``offsets[i]:offsets[i + 1]``.

    x [M, K], dy [M, N] -> fp32 [len(offsets) - 1, 2]. Without ``absolute`` the second column is zero, and short runs
    go by ``||G||^2 = <x x^T, dy dy^T>``. G is reduced tile by tile: no [N, K] buffer. ``add_norms(sums, tile)``, if
    given, adds a tile's two sums.
    """
    sums = torch.zeros(len(offsets) - 1, 2, dtype=torch.float64, device=x.device)
    depth, width = x.shape[1], dy.shape[1]
    buffer = torch.empty(min(_TILE_ROWS, width), depth, dtype=torch.float32, device=x.device)
    for i, (start, stop) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        count, rows = stop - start, x[start:stop].float()
        if not absolute and count * (depth + width) < depth * width:
            grad = dy[start:stop].float()
            sums[i, 0] = torch.dot((rows @ rows.t()).view(-1), (grad @ grad.t()).view(-1)).clamp_(min=0)
            continue
        for n in range(0, width, _TILE_ROWS):
            tile = buffer[: min(_TILE_ROWS, width - n)]
            torch.mm(dy[start:stop, n : n + _TILE_ROWS].float().t(), rows, out=tile)
            if add_norms is not None:
                add_norms(sums[i], tile)
                continue
            sums[i, 0] += torch.dot(tile.view(-1), tile.view(-1))
            if absolute:
                sums[i, 1] += tile.abs_().sum()
    if not absolute:
        sums[:, 1] = 0.0
    return sums.float()


def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"its blocks are made for a CPU's cache, the tensors are on {device.type}"
    if dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return None
