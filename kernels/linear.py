"""Linear: y = x W^T + bias + s h B^T with the expand in the accumulator of the matmul."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import (
    Factors,
    Matrix,
    Options,
    Rows,
    Runs,
    Segments,
    aligned,
    find_tile,
    hide_from_specialization,
    launch,
    matmul_loop,
    matrices,
    matrix,
    multiples_of_8,
    precision,
    rank_columns,
    rank_matrix,
    reveal,
    select,
    select_matrix,
    spread,
    store_moments,
    swizzle,
    table_row,
    tile_rows,
    unit_last,
)
from .reduce import reduce_moments, reduce_partials
from .tiling import TileConfig, choose_strategy, choose_tiles, limits


class Projection(NamedTuple):
    """A block of output columns with its own adapter: views of the frozen weight, its bias, B and the output.

    W [N_i, K]; bias [N_i] or None; B [N_i, r_i]; y [M, N_i]; moments float64 [2, N_i + 1 or more], the number of rows
    in its last column, or None; offset: first column in h. With ``Runs`` a view has the first row or column and the
    number of them right.
    """

    W: Tensor
    bias: Tensor | None
    B: Tensor
    y: Tensor
    moments: Tensor | None
    offset: int
    scale: float


class Group(NamedTuple):
    """The projections as a kernel takes them: weights, biases (None: no projection has one), B, outputs."""

    W: Matrix
    bias: tuple | None
    B: Factors
    y: Matrix


class Part(NamedTuple):
    """Projection ``i``, or one adapter's part of it: weight, output, B with its stride, ranks in h, scale."""

    i: tl.tensor
    W: Matrix
    y: Matrix
    B: tl.tensor
    stride_B: tl.tensor
    offset: tl.tensor
    rank: tl.tensor
    scale: tl.tensor


class Place(NamedTuple):
    """Where a tile lies: number and rows of its row tile, its first column, that of its projection among all."""

    row_tile: tl.tensor
    rows: Rows
    column: tl.tensor
    entry: tl.tensor


@triton.jit
def projection_part(group, i, segments, adapter, EVEN: tl.constexpr):
    """Projection i of a group, with ``segments`` one adapter's part of it."""
    B = group.B
    if segments is None:
        rank = reveal(select(B.columns.ranks, i), EVEN)
        offset = reveal(select(B.columns.offsets, i), EVEN)
        p_b, stride_b = select(B.data, i), reveal(select(B.strides, i), EVEN)
        scale = select(B.scales, i)
    else:
        i_pair = adapter * len(group.y.data) + i
        first, rank, offset = table_row(segments.table, i_pair, 3, EVEN)
        p_b, stride_b, scale = B.data[0] + first, rank, tl.load(segments.scales + i_pair)
    return Part(i, select_matrix(group.W, i), select_matrix(group.y, i), p_b, stride_b, offset, rank, scale)


@triton.jit
def linear_tile(part, bias, x, h, sums, place, runs, descriptors, TILE: tl.constexpr, OPTIONS: tl.constexpr):
    """The tile at ``place`` of a projection's y."""
    BLOCK_M: tl.constexpr = TILE.rows
    BLOCK_N: tl.constexpr = TILE.columns
    BLOCK_K: tl.constexpr = TILE.depth
    BLOCK_R: tl.constexpr = 16  # a tensor core's
    o_n = place.column + tl.arange(0, BLOCK_N)
    o_y = spread(o_n, runs, part.i)
    m_m, m_n = place.rows.exist[:, None], (o_n < part.y.columns)[None, :]
    o_row = place.rows.numbers.to(tl.int64)[:, None]
    # The expand comes first: scaled in fp32 it becomes the start of the accumulator and needs no registers of its own.
    # With descriptors a block of it comes last: its loads are under way while the first steps of the matmul are copied.
    # Without wide loads there are no registers to keep it in.
    LATE: tl.constexpr = descriptors is not None and OPTIONS.even_r
    p_h = h.data + o_row * reveal(h.stride, OPTIONS.even_r) + part.offset
    p_b = part.B + o_n.to(tl.int64)[None, :] * part.stride_B
    b_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r in tl.range(BLOCK_R if LATE else 0, part.rank, BLOCK_R, num_stages=1):
        o_rank = r + tl.arange(0, BLOCK_R)
        b_h = tl.load(p_h + o_rank[None, :], mask=m_m & (o_rank < part.rank)[None, :], other=0.0)
        b_b = tl.load(p_b + o_rank[:, None], mask=m_n & (o_rank < part.rank)[:, None], other=0.0).to(b_h.dtype)
        b_acc = tl.dot(b_h, b_b, b_acc, input_precision=OPTIONS.precision)
    b_acc *= part.scale
    if x is not None and descriptors is None:
        p_w, p_x = part.W.data + o_y.to(tl.int64)[None, :] * part.W.stride, x.data + o_row * x.stride
        b_acc = matmul_loop(b_acc, p_x, p_w, 1, m_m, m_n, x.columns, TILE, OPTIONS)
    elif x is not None:
        if LATE:
            o_rank = tl.arange(0, BLOCK_R)
            m_h, m_b = m_m & (o_rank < part.rank)[None, :], m_n & (o_rank < part.rank)[:, None]
            b_h, b_b = tl.load(p_h + o_rank[None, :], mask=m_h), tl.load(p_b + o_rank[:, None], mask=m_b, other=0.0)
        for k in tl.range(0, x.columns, BLOCK_K):
            b_x, b_w = descriptors[0].load([place.row_tile * BLOCK_M, k]), descriptors[1].load([place.column, k])
            b_acc = tl.dot(b_x, tl.trans(b_w), b_acc, input_precision=OPTIONS.precision)
        if LATE:
            # Masked here, or the compiler waits for h before the first copies.
            b_h, b_b = tl.where(m_h, b_h, 0.0), (b_b.to(tl.float32) * part.scale).to(b_h.dtype)
            b_acc = tl.dot(b_h, b_b, b_acc, input_precision=OPTIONS.precision)
    if bias is not None:
        b_acc += tl.load(bias + o_y[None, :], mask=m_n, other=0.0).to(tl.float32)
    p_tile = part.y.data + o_row * part.y.stride + o_y[None, :]
    if x is None:
        b_acc += tl.load(p_tile, mask=m_m & m_n, other=0.0).to(tl.float32)
    b_y = b_acc.to(part.y.data.dtype.element_ty)
    tl.store(p_tile, b_y, mask=m_m & m_n)
    if sums is not None:
        p_sum = sums.data + place.row_tile.to(tl.int64) * 2 * sums.stride + place.entry + o_n
        store_moments(p_sum, sums.stride, b_y.to(tl.float32), m_m, o_n < part.y.columns)


@triton.jit(do_not_specialize=["M", "tiles_m", "tiles_n"])
def linear_kernel(group, x, h, sums, segments, M, tiles_m, tiles_n, TILE: tl.constexpr, OPTIONS: tl.constexpr):
    """One tile of one projection's y, or with TILE.tma every so many of them from a fixed number of programs.

    Without x, y holds x W^T + bias already and is updated in place. With ``segments`` a tile is rows of one adapter.
    """
    BLOCK_M: tl.constexpr = TILE.rows
    BLOCK_N: tl.constexpr = TILE.columns
    BLOCK_K: tl.constexpr = TILE.depth
    if TILE.tma:
        desc_x = tl.make_tensor_descriptor(x.data, [M, x.columns], [x.stride, 1], [BLOCK_M, BLOCK_K])
        i_next, o_entry = tl.program_id(0), 0
        for i in tl.range(0, len(group.y.data), num_stages=1):
            part = projection_part(group, i, None, None, OPTIONS.even_r)
            bias = None if group.bias is None else select(group.bias, i)
            W, width = part.W, part.y.columns
            desc_w = tl.make_tensor_descriptor(W.data, [width, x.columns], [W.stride, 1], [BLOCK_N, BLOCK_K])
            own = tiles_m * tl.cdiv(width, BLOCK_N)
            for i_tile in tl.range(i_next, own, tl.num_programs(0), num_stages=1, disable_licm=True):
                i_m, i_n = swizzle(i_tile, tiles_m, tl.cdiv(width, BLOCK_N), TILE.band)
                place = Place(i_m, tile_rows(None, None, i_m, M, BLOCK_M, False), i_n * BLOCK_N, o_entry)
                linear_tile(part, bias, x, h, sums, place, None, (desc_x, desc_w), TILE, OPTIONS)
            # The next projection's tiles go on where this one's ended, so that every program has as many.
            i_next += tl.cdiv(tl.maximum(own - i_next, 0), tl.num_programs(0)) * tl.num_programs(0) - own
            o_entry += width
        return
    i_m, i_n = swizzle(tl.program_id(0), tiles_m, tiles_n, TILE.band)
    i, o_first, o_entry = find_tile(i_n, group.y.columns, BLOCK_N)
    adapter = None
    if segments is not None:
        adapter = tl.load(segments.tiles + 2 * i_m).to(tl.int64)
        if adapter < 0:
            return
    place = Place(i_m, tile_rows(segments, adapter, i_m, M, BLOCK_M, OPTIONS.gather), o_first, o_entry)
    part = projection_part(group, i, segments, adapter, OPTIONS.even_r)
    bias = None if group.bias is None else select(group.bias, i)
    linear_tile(part, bias, x, h, sums, place, group.B.runs, None, TILE, OPTIONS)


def cut(
    W: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    B: Sequence[Tensor],
    y: Sequence[Tensor],
    sums: Sequence[Tensor],
    places: Sequence[tuple[int, int]],
    offsets: Sequence[int],
    scales: Sequence[float],
) -> list[Projection]:
    """The projections at ``places`` (output, first column); ``sums``: the moments of every output, or none."""
    projections = []
    for i, (j, column) in enumerate(places):
        n = B[i].shape[0]
        w, b = W[j].narrow(0, column, n), None if bias[j] is None else bias[j].narrow(0, column, n)
        out, own = y[j].narrow(1, column, n), sums[j][:, column:] if sums else None
        projections.append(Projection(w, b, B[i], out, own, offsets[i], scales[i]))
    return projections


def as_group(projections: Sequence[Projection], matmul: bool = True, runs: Runs | None = None) -> Group:
    """The operand for projections; a bias is added where the kernel multiplies. ``runs``: of those that interleave."""
    bias = None
    if matmul and any(p.bias is not None for p in projections):
        # As many zeros as a row of y, since columns that interleave reach beyond their number.
        bias = tuple(p.W.new_zeros(p.y.stride(0)) if p.bias is None else p.bias for p in projections)
    columns = rank_columns([p.offset for p in projections], [p.B.shape[1] for p in projections])
    strides = hide_from_specialization([p.B.stride(0) for p in projections])
    B = Factors(tuple(p.B for p in projections), strides, columns, tuple(float(p.scale) for p in projections), runs)
    return Group(matrices([p.W for p in projections]), bias, B, matrices([p.y for p in projections]))


def expand(
    x: Tensor,
    h: Tensor,
    projections: Sequence[Projection],
    matmul: bool,
    tiles: TileConfig | None,
    segments: Segments | None = None,
    even: bool = False,
    runs: Runs | None = None,
) -> None:
    """Fill (``matmul``) or update every projection's y, and its moments where it has them.

    With ``segments`` every row gets its own adapter's part: B is then the packed [elements, 1] of all, ``even`` says
    whether all ranks are multiples of 8, and the moments are [adapters, 2, *]. With ``runs`` a tile has no TMA.
    """
    M, K = x.shape
    ranks, strides = [p.B.shape[1] for p in projections], [p.B.stride(0) for p in projections]
    offsets, N = [p.offset for p in projections], sum(p.W.shape[0] for p in projections)
    moments = projections[0].moments is not None
    operation = ("linear_moments" if moments else "linear") if matmul else "expand"
    tiles = tiles or choose_tiles(operation, M, N, K, max(ranks), x.dtype, x.device)
    tiles = tiles._replace(tma=matmul and tiles.tma)
    tiles_m = triton.cdiv(M, tiles.rows) if segments is None else segments.tiles.shape[0]
    tiles_n = sum(triton.cdiv(p.W.shape[0], tiles.columns) for p in projections)
    sums = torch.empty(2 * tiles_m, N, dtype=torch.float32, device=x.device) if moments else None
    if segments is None:
        even = multiples_of_8(ranks, strides, offsets)
    group = as_group(projections, matmul, runs)
    operands = group, matrix(x) if matmul else None, rank_matrix(h), None if sums is None else matrix(sums), segments
    own, programs = limits(x.device), tiles_m * tiles_n
    if tiles.tma:
        programs = min(programs, own.multiprocessors * max(1, own.shared // tiles.shared(x.element_size())))
    options = Options(
        precision(x.dtype),
        even_k=K % tiles.depth == 0,
        even_r=even and h.stride(0) % 8 == 0,
        gather=segments is not None and segments.order.numel() > 0,
    )
    launch(linear_kernel, (programs,), *operands, M, tiles_m, tiles_n, TILE=tiles, OPTIONS=options)
    if sums is not None:
        ranges = None if segments is None else segments.ranges
        widths = [p.W.shape[0] for p in projections]
        reduce_moments(sums, [p.moments for p in projections], widths, M, tiles.rows, ranges, runs)


def _augmented(both: Tensor, W: Tensor, bias: Tensor | None, mine: Sequence[Projection], n: int, y: Tensor) -> None:
    """``y = [x | h] [W | s B]^T + bias`` by the library's matmul, B block-diagonal over one weight's projections.

    What stands behind h in ``both`` meets zeros. The weight's rows are n blocks, each with a part of each projection.
    """
    blocks, width = [], both.shape[1] - W.shape[1]
    for p in mine:
        scaled, after = W.new_empty(p.B.shape), width - p.offset - p.B.shape[1]
        reduce_partials(p.B.contiguous().view(1, -1), [scaled], [p.scale])
        blocks.append([W.new_zeros(len(scaled), p.offset), scaled, W.new_zeros(len(scaled), after)])
    rows = [torch.cat(block, dim=1) for block in blocks]
    factor = torch.cat(rows) if n == 1 else torch.cat([own.unflatten(0, (n, -1)) for own in rows], dim=1).flatten(0, 1)
    weight = torch.cat([W, factor], dim=1)
    if bias is None:
        torch.mm(both, weight.t(), out=y)
    else:
        torch.addmm(bias, both, weight.t(), out=y)


def linear(
    x: Tensor,
    W: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    h: Tensor,
    B: Sequence[Tensor],
    places: Sequence[tuple[int, int]],
    offsets: Sequence[int],
    scales: Sequence[float],
    moments: bool = False,
    strategy: str | None = None,
    tiles: TileConfig | None = None,
    runs: Runs | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """``y_j = x W_j^T + bias_j`` with ``s_i h_i B_i^T`` added at projection i's place (output, first column).

    x [M, K], W_j [N_j, K], h [M, R or more], B_i [N_i, r_i] of one dtype -> y_j [M, N_j] and, with ``moments``, the
    column sums of y and y^2 with M beside them, float64 [2, N_j + 1]. ``strategy``: "fused", "library" or "augmented";
    default by the table. ``runs``: of projections that interleave.
    """
    x, h, B = unit_last(x), unit_last(h), [unit_last(b) for b in B]
    M, K = x.shape
    rank = sum(b.shape[1] for b in B)
    make = torch.zeros if M == 0 else torch.empty
    sums = [make(2, w.shape[0] + 1, dtype=torch.float64, device=x.device) for w in W] if moments else []
    if M == 0:
        return [x.new_empty(0, w.shape[0]) for w in W], sums
    N = sum(w.shape[0] for w in W)
    if strategy is None:
        strategy = choose_strategy("forward", M, N, K, rank, x.dtype, x.device)
        # A pass over y that counts its moments adds h B^T for nothing.
        strategy = "library" if moments and strategy == "augmented" else strategy
        # The addresses of rows that are not aligned spill, and nothing copies 16 bytes of them.
        strategy = "library" if strategy == "fused" and not aligned([x, *W]) else strategy
    if strategy == "fused":
        operation, most = "linear_moments" if moments else "linear", max(b.shape[1] for b in B)
        tiles = tiles or choose_tiles(operation, M, N, K, most, x.dtype, x.device)
        # By pointers that tile would keep what does not fit its registers on the stack.
        if tiles.tma and (runs or not aligned([x, *W])):
            strategy, tiles = "library", None
    if strategy == "library":
        # A weight that lies transposed, as Conv1D's, is multiplied by as it lies.
        y = [torch.nn.functional.linear(x, w, b) for w, b in zip(W, bias, strict=True)]
    else:
        y = [torch.empty(M, w.shape[0], dtype=x.dtype, device=x.device) for w in W]
    if strategy == "fused":
        W, bias = [unit_last(w) for w in W], [None if b is None else unit_last(b) for b in bias]
    projections = cut(W, bias, B, y, sums, places, offsets, scales)
    if strategy == "augmented":
        # Zeros behind the ranks, so that rows stay aligned.
        both = torch.cat([x, h.narrow(1, 0, rank), x.new_zeros(M, -(K + rank) % 8)], dim=1)
        for j, (w, b) in enumerate(zip(W, bias, strict=True)):
            mine = [p for p, (output, _) in zip(projections, places, strict=True) if output == j]
            own = zip(B, [b.shape[0] for b in B] if runs is None else runs.lengths, places, strict=True)
            n = next(b.shape[0] // run for b, run, (output, _) in own if output == j and run > 0)
            _augmented(both, w, b, mine, n, y[j])
        # The moments kernel finds nothing left to add.
        projections = [p._replace(B=p.B.narrow(1, 0, 0)) for p in projections]
    if strategy == "fused" or moments or (strategy == "library" and rank > 0):
        expand(x, h, projections, strategy == "fused", tiles, runs=runs)
    return y, sums
