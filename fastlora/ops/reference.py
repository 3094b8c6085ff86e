"""The specification: every number the package produces, in plain torch, in any floating dtype.

Letters follow the field: M tokens, K in_features, N out_features, r rank of one projection, R = sum of the ranks packed
together, k probe rows. Low-precision inputs accumulate in fp32, float64 stays float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are taken in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _mulhilo(constant: int, value: Tensor) -> tuple[Tensor, Tensor]:
    # Both factors fit 32 bits; int64 wraps, which keeps all 64 bits of the product.
    product = value * constant
    return (product >> 32) & _WORD, product & _WORD


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four 32-bit words (as int64) for each counter ``(c0, c1, c2, c3)`` under a 64-bit ``seed``.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
    """
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        hi0, lo0 = _mulhilo(_PHILOX_M[0], c0)
        hi1, lo1 = _mulhilo(_PHILOX_M[1], c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _PHILOX_W[0]) & _WORD, (k1 + _PHILOX_W[1]) & _WORD
    return c0, c1, c2, c3


def signs_of(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> Tensor:
    """Fair signs (+1 or -1, float32) from the bits of Philox words: 128 of each of the counters [C]."""
    words = torch.stack(philox(seed, c0, c1, c2, c3), dim=1)
    bits = (words.unsqueeze(-1) >> torch.arange(32, device=seed.device)) & 1
    return (1 - 2 * bits).reshape(-1).float()


def signs(seed: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, numel: int) -> Tensor:
    """The first ``numel`` signs of the counters (0, c1, c2, c3), (1, c1, c2, c3), ..."""
    c0 = torch.arange((numel + 127) // 128, device=seed.device)
    return signs_of(seed, c0, c1.expand_as(c0), c2.expand_as(c0), c3.expand_as(c0))[:numel]


def keep_threshold(p: float) -> int:
    """Smallest 32-bit word that is kept at dropout probability ``p``."""
    return min(round(p * 2**32), _WORD)


def dropout(x: Tensor, seed: Tensor, projection: int, p: float) -> Tensor:
    """``x o keep / (1 - p)`` with ``keep`` a function of (seed, projection, row, column) alone.

    x [M, K]; seed int64 scalar tensor. Row m is dropped as ``dropout_rows`` drops one with the key (seed, m).
    """
    return dropout_rows(x, row_keys(seed, x.shape[0]), projection, p)


def row_keys(seed: Tensor, rows: int) -> Tensor:
    """``(seed, m)`` for each of M rows: int64 [M, 2]."""
    return torch.stack([seed.expand(rows), torch.arange(rows, device=seed.device)], dim=1)


def dropout_rows(x: Tensor, keys: Tensor, projection: int, p: float) -> Tensor:
    """``x o keep / (1 - p)``, every row with a key (seed, counter) of its own: x [M, K], keys int64 [M, 2].

    Word ``column % 4`` of ``philox(seed, (column // 4, counter, counter >> 32, projection))`` is kept if it is at least
    ``keep_threshold(p)``.
    """
    rows, columns = x.shape
    seed, row = keys[:, :1], keys[:, 1:]
    block = torch.arange((columns + 3) // 4, device=x.device).unsqueeze(0)
    row, block = torch.broadcast_tensors(row, block)
    words = torch.stack(philox(seed, block, row & _WORD, row >> 32, torch.full_like(row, projection)), dim=2)
    keep = words.reshape(rows, 4 * block.shape[1])[:, :columns] >= keep_threshold(p)
    return torch.where(keep, x / (1.0 - p), torch.zeros((), dtype=x.dtype, device=x.device))


def lora_linear(
    x: Tensor,
    W: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scale: Sequence[float],
    Z: Sequence[Tensor] = (),
    P: Tensor | None = None,
    sign: Tensor | None = None,
    seed: Tensor | None = None,
    p: float = 0.0,
    streams: Sequence[int] = (),
    blocks: Sequence[int] = (),
) -> list[Tensor]:
    """The adapted linears of one group, written as the formula and differentiable any number of times.

    ``y_i = x W_i^T + bias_i + s_i dropout(x) A_i^T B_i^T + (x P^T o sign) Z_i^T``, ``x[:, P_i]`` for ``x P^T`` where P
    are columns of x.

    x [*, K]; W_j [N_j, K]; projection i covers the next N_i columns of the concatenated outputs, A_i [r_i, K],
    B_i [N_i, r_i]; P [k, K] or int64 [projections, k], Z_i [N_i, k] (zero: it only collects the gradient
    Q_i = G_W P^T), sign [S, k] for the S samples of dimension 0. ``streams``: the number by which ``dropout``
    knows each projection, its place without. ``blocks``: the columns of y_j are that many equal blocks (1 without),
    each with its part of every projection of W_j in order. Returns one y_j [*, N_j] a weight.
    """
    rows = x.reshape(-1, x.shape[-1])
    base = torch.cat([torch.nn.functional.linear(rows, w, b) for w, b in zip(W, bias, strict=True)], dim=1)
    updates, probe = [], None
    for i, (a, b) in enumerate(zip(A, B, strict=True)):
        seen = dropout(rows, seed, streams[i] if streams else i, p) if p > 0 else rows
        update = scale[i] * (seen @ a.to(rows.dtype).T) @ b.to(rows.dtype).T
        if P is not None and (probe is None or not P.is_floating_point()):
            probe = rows @ P.to(rows.dtype).T if P.is_floating_point() else rows[:, P[i]]
            if sign is not None:
                own = probe.reshape(sign.shape[0], -1, sign.shape[1]) * sign.to(rows.dtype).unsqueeze(1)
                probe = own.flatten(0, 1)
        if probe is not None:
            update = update + probe @ Z[i].to(rows.dtype).T
        updates.append(update)
    y = base + interleaved(updates, [w.shape[0] for w in W], blocks)
    return [part.reshape(*x.shape[:-1], part.shape[1]) for part in y.split([w.shape[0] for w in W], dim=1)]


def lora_grouped(
    x: Tensor,
    W: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scale: Sequence[float],
    ids: Tensor,
    Z: Sequence[Tensor] = (),
    P: Sequence[Tensor] = (),
    sign: Sequence[Tensor] = (),
    keys: Tensor | None = None,
    p: Sequence[float] = (),
    streams: Sequence[int] = (),
    blocks: Sequence[int] = (),
) -> list[Tensor]:
    """``lora_linear`` of every row with the adapter that its id names; -1 leaves the frozen linear alone.

    x [*, K], ids int64 [M] for the M rows of x. The lists A, B, scale and Z run over adapters, then projections; P,
    sign and p over adapters (P_g [k_g, K], sign_g [S, k_g] or empty). keys [M, 2] are the rows' dropout keys.
    """
    rows = x.reshape(-1, x.shape[-1])
    y = torch.cat([torch.nn.functional.linear(rows, w, b) for w, b in zip(W, bias, strict=True)], dim=1)
    projections = projections_of(W, B)
    for g in range(len(A) // projections):
        mine = (ids == g).nonzero()[:, 0]
        seen, part = rows[mine], slice(g * projections, (g + 1) * projections)
        probe = None
        if P and P[g].shape[0]:
            probe = seen @ P[g].to(seen.dtype).T
            if sign and sign[g].numel():
                probe = probe * sign[g].to(seen.dtype)[mine // (rows.shape[0] // sign[g].shape[0])]
        updates = []
        for i, (a, b, s) in enumerate(zip(A[part], B[part], scale[part], strict=True)):
            stream = streams[i] if streams else i
            dropped = dropout_rows(seen, keys[mine], stream, p[g]) if p and p[g] > 0 else seen
            update = s * (dropped @ a.to(seen.dtype).T) @ b.to(seen.dtype).T
            if probe is not None:
                update = update + probe @ Z[part][i].to(seen.dtype).T
            updates.append(update)
        y = y.index_add(0, mine, interleaved(updates, [w.shape[0] for w in W], blocks))
    return [part.reshape(*x.shape[:-1], part.shape[1]) for part in y.split([w.shape[0] for w in W], dim=1)]


def interleaved(parts: Sequence[Tensor], widths: Sequence[int], blocks: Sequence[int] = ()) -> Tensor:
    """Columns of projections [M, N_i] as they lie in the outputs [M, N_j] side by side, ``blocks`` of each output."""
    outputs, rest = [], list(parts)
    for width, n in zip(widths, blocks or [1] * len(widths), strict=True):
        own = []
        while sum(part.shape[1] for part in own) < width:
            own.append(rest.pop(0))
        outputs += own if n == 1 else [torch.cat([p.unflatten(1, (n, -1)) for p in own], dim=2).flatten(1)]
    return torch.cat([*outputs, *rest], dim=1)


def split_columns(y: Tensor, widths: Sequence[int], blocks: int = 1) -> Sequence[Tensor]:
    """The columns of each projection [M, N_i] of one output [M, N] in ``blocks``: views where they are together."""
    if blocks == 1:
        return y.split(list(widths), dim=1)
    parts = y.unflatten(1, (blocks, -1)).split([width // blocks for width in widths], dim=2)
    return [part.flatten(1) for part in parts]


def projections_of(W: Sequence[Tensor], B: Sequence[Tensor]) -> int:
    """How many projections one adapter has: those whose rows tile the weights' rows."""
    rows, covered = sum(w.shape[0] for w in W), 0
    for count, b in enumerate(B, 1):
        covered += b.shape[0]
        if covered == rows:
            return count
    raise ValueError(f"lora_B: rows {[b.shape[0] for b in B]} do not tile weights with {rows} rows")


def row_norms(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """``‖w + s b A‖`` of each row w of W [N, K] and b of B [N, r]: [N]."""
    acc = accumulate_dtype(W.dtype)
    return torch.linalg.vector_norm(W.to(acc) + scale * (B.to(acc) @ A.to(acc)), dim=1)


def shrink(x: Tensor, A: Tensor) -> Tensor:
    """``h = x A^T``: x [M, K], A [R, K] -> h [M, R] in x's dtype."""
    acc = accumulate_dtype(x.dtype)
    return (x.to(acc) @ A.to(acc).T).to(x.dtype)


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
    acc = accumulate_dtype(y.dtype)
    for factor, offset, column, s in zip(factors, offsets, columns, scales, strict=True):
        part = y[:, column : column + factor.shape[1]]
        update = h[:, offset : offset + factor.shape[0]].to(acc) @ factor.to(acc)
        part.copy_(part.to(acc) + s * update)
    return column_moments(y) if moments else y.new_empty(0, dtype=torch.float64)


def column_moments(y: Tensor) -> Tensor:
    """``[sum_m y, sum_m y^2]`` per column in float64: y [M, N] -> [2, N]."""
    wide = y.double()
    return torch.stack([wide.sum(0), wide.square().sum(0)])


def counted_moments(y: Tensor) -> Tensor:
    """``column_moments`` of y [M, N] with M in one more column: what a moment leaf accumulates, float64 [2, N + 1]."""
    return torch.cat([column_moments(y), torch.full((2, 1), y.shape[0], dtype=torch.float64, device=y.device)], dim=1)


def outer(d: Tensor, x: Tensor) -> Tensor:
    """``d^T x``: d [M, r], x [M, K] -> [r, K] in the accumulation dtype."""
    acc = accumulate_dtype(x.dtype)
    return d.to(acc).T @ x.to(acc)


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
    """The skinny products of the backward.

    ``dh_i = s_i dy_i B_i``, ``dA = dh^T x``, ``dB_i = s_i dy_i^T h_i``, ``Q_i = dy_i^T h_P``

    x [M, K], dy_i [M, N_i], h [M, rank + probes], B_i [N_i, r_i] -> dh [M, rank], dA [rank, K] (empty [0, K] unless
    needed), dB_i [N_i, r_i], Q_i [N_i, probes], all in the accumulation dtype. With ``probes`` columns of h for each
    projection, one run after the other, h_P are projection i's.
    """
    acc, firsts = accumulate_dtype(x.dtype), first_probes(h, rank, probes, len(dy))
    dh = torch.zeros(x.shape[0], rank, dtype=acc, device=x.device)
    dB, Q = [], []
    for grad, b, offset, s, first in zip(dy, B, offsets, scales, firsts, strict=True):
        wide = grad.to(acc)
        dh[:, offset : offset + b.shape[1]] = s * (wide @ b.to(acc))
        dB.append(s * (wide.T @ h[:, offset : offset + b.shape[1]].to(acc)))
        Q.append(wide.T @ h[:, first : first + probes].to(acc))
    dA = outer(dh, x) if need_dA else x.new_empty((0, x.shape[1]), dtype=acc)
    return dh, dA, dB, Q


def first_probes(h: Tensor, rank: int, probes: int, projections: int) -> list[int]:
    """The first probe column of h [M, rank + ...] that each projection meets: one for all, or a run for each."""
    stride = probes if h.shape[1] - rank == probes * projections else 0
    return [rank + i * stride for i in range(projections)]


def column_gradients(x: Tensor, dy: Tensor, index: Tensor) -> Tensor:
    """``G[:, index]`` of ``G = dy^T x``: x [M, K], dy [M, N], index int64 [k] -> [N, k] in the accumulation dtype.

    With ``P(index_i = j) = p_j`` and ``w_i = 1 / (k p_{index_i})``, ``sum_i w_i ||Q_i||^2`` and ``sum_i w_i ||Q_i||_1``
    of its columns Q_i have the expectations ``||G||_F^2`` and ``sum |G|``: P of one-hot rows scaled ``w_i^(1/2)``.
    """
    return outer(dy, x.index_select(1, index))


def column_norms(x: Tensor, dy: Sequence[Tensor]) -> Tensor:
    """``sum_m ||dy_im||^2 x_mj^2``, the squared column norms of G_i if its tokens do not add up: [n, K].

    x [M, K], dy_i [M, N_i], in the accumulation dtype.
    """
    acc = accumulate_dtype(x.dtype)
    weight = torch.stack([torch.linalg.vector_norm(grad, dim=1, dtype=acc).square() for grad in dy])
    return weight @ x.to(acc).square()


def column_shares(norms: Tensor, squares: bool, absolutes: bool, uniform: float = 0.1) -> Tensor:
    """Probabilities of the columns of every matrix, from their squared norms [n, K]: [n, K], each row sums to 1.

    ``p = (1 - u) q + u / K``, q proportional to the squared norms (least noise for ``grad_sq``), to their roots (for
    ``grad_abs``), or the mean of both. Uniform where every norm is 0.
    """
    wanted = [norms] * squares + [norms.sqrt()] * absolutes
    total = norms.sum(1, keepdim=True)
    shares = sum(part / part.sum(1, keepdim=True) for part in wanted) / len(wanted)
    even = 1.0 / norms.shape[1]
    return torch.where(total > 0, (1.0 - uniform) * shares + uniform * even, even)


_GRADSTAT_ROWS = 256


def gradstat(x: Tensor, dy: Tensor, offsets: Sequence[int], absolute: bool = True) -> Tensor:
    """``sum G^2`` and ``sum |G|`` of ``G = dy^T x`` for each run of rows ``offsets[i]:offsets[i + 1]``.

    x [M, K], dy [M, N] -> [len(offsets) - 1, 2]. G is reduced block by block of its rows: no [N, K] buffer. Without
    ``absolute`` the second column is zero.
    """
    acc = accumulate_dtype(x.dtype)
    out = torch.zeros(len(offsets) - 1, 2, dtype=acc, device=x.device)
    for i, (start, stop) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        rows = x[start:stop].to(acc)
        for n in range(0, dy.shape[1], _GRADSTAT_ROWS):
            tile = dy[start:stop, n : n + _GRADSTAT_ROWS].to(acc).T @ rows
            out[i, 0] += tile.square().sum()
            if absolute:
                out[i, 1] += tile.abs().sum()
    return out


def build_segments(ids: Tensor, adapters: int) -> tuple[Tensor, Tensor]:
    """The rows of a mixed batch by adapter: ``(order, ranges)`` with adapter g's rows ``order[begin_g:end_g]``.

    ids int64 [M], -1 for base only -> order int64 [M], stable by adapter with the base-only rows last, and ranges
    int64 [adapters, 2], (0, 0) without rows. On the CPU order is empty if the rows of every adapter already are one
    run, which ranges then gives, and an id out of range raises ``RuntimeError``; on a GPU, where nothing is read
    back, it counts as -1.
    """
    if ids.dim() != 1 or ids.dtype != torch.int64:
        raise RuntimeError(f"ids: expected an int64 vector with one id per row, got {ids.dtype} {tuple(ids.shape)}")
    outside = (ids < -1) | (ids >= adapters)
    if ids.device.type == "cpu" and bool(outside.any()):
        position = int(outside.nonzero()[0])
        accepted = f"0 to {adapters - 1} (an adapter) and -1 (base only)"
        raise RuntimeError(f"ids[{position}] is {int(ids[position])}; accepted: {accepted}")
    keys = torch.where(outside | (ids < 0), adapters, ids)
    sorted_keys, order = torch.sort(keys, stable=True)
    numbers = torch.arange(adapters, device=ids.device)
    begin = torch.searchsorted(sorted_keys, numbers)
    end = torch.searchsorted(sorted_keys, numbers, right=True)
    ranges = torch.stack([begin, end], dim=1) * (end > begin).unsqueeze(1)
    if ids.device.type == "cpu":
        live = (ranges[:, 1] > ranges[:, 0]).nonzero().flatten().tolist()
        runs = [(g, order[begin[g] : end[g]]) for g in live]
        if all(int(rows[-1]) - int(rows[0]) + 1 == rows.numel() for _, rows in runs):
            for g, rows in runs:
                ranges[g, 0], ranges[g, 1] = rows[0], rows[-1] + 1
            return order[:0], ranges
    return order, ranges


def _check_ranges(ranges: Tensor, rows: int) -> None:
    if ranges.device.type != "cpu":
        return
    covered = 0
    for g, (begin, end) in enumerate(ranges.tolist()):
        covered += end - begin
        if begin < 0 or end < begin or end > rows or covered > rows:
            accepted = f"runs inside the {rows} rows, with no more rows in all"
            raise RuntimeError(f"ranges[{g}] is {begin} to {end}; accepted: {accepted}")


def segment_tiles(ranges: Tensor, rows: int, block: int) -> Tensor:
    """Tiles of at most ``block`` rows of one adapter: ``(adapter, first position)`` each, (-1, 0) for the unused ones.

    ranges int64 [adapters, 2] from ``build_segments`` -> int64 [ceil(rows / block) + adapters, 2]: the length is known
    without reading ranges.
    """
    if ranges.dim() != 2 or ranges.shape[1] != 2 or ranges.dtype != torch.int64:
        raise RuntimeError(
            f"ranges has {ranges.dim()} dimensions and dtype {ranges.dtype}; expected int64 [adapters, 2]"
        )
    if rows < 0 or block < 1:
        raise RuntimeError(f"rows is {rows}, block is {block}; accepted: 0 or more, 1 or more")
    _check_ranges(ranges, rows)
    adapters, device, block = ranges.shape[0], ranges.device, min(block, max(rows, 1))
    counts = (ranges[:, 1] - ranges[:, 0] + block - 1) // block
    ends = counts.cumsum(0)
    numbers = torch.arange((rows + block - 1) // block + adapters, device=device)
    owner = torch.searchsorted(ends, numbers, right=True)
    inside = owner < adapters
    if adapters == 0:
        return torch.stack([torch.full_like(numbers, -1), torch.zeros_like(numbers)], dim=1)
    g = owner.clamp(max=adapters - 1)
    first = ranges[g, 0] + (numbers - (ends - counts)[g]) * block
    return torch.stack([torch.where(inside, g, -1), torch.where(inside, first, 0)], dim=1)
