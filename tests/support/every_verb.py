"""Every committed verb by name, with any tile: what it finds beside what float64 wants."""

from __future__ import annotations

import torch
from fastlora.kernels import (
    expand_backward,
    gradstat,
    grouped,
    linear,
    linear_backward,
    shrink,
    shrink_linear,
    shrink_linear_backward,
    wgrad,
)

from fastlora.ops import reference
from support.triton_grouped_help import Mixed, Operands, expected_dx, expected_wgrad, expected_y
from support.triton_grouped_help import expected_dh as expected_mixed_dh
from support.triton_grouped_help import expected_h as expected_mixed_h
from support.triton_help import DEVICE, expected_dh, expected_h, wide


def run_dropped(o, tiles, others=None):
    """(found, wanted) pairs of the verbs that see dropout; the tile is shrink's, ``others`` that of the rest."""
    G, M = len(o.case.ranks), len(o.case.ids)
    p, keys = [(0.25, 0.0, 0.5)[g % 3] for g in range(G)], torch.randint(2**62, (M, 2), device=DEVICE)
    thresholds = tuple(reference.keep_threshold(q) if q else 0 for q in p)
    streams = tuple(range(1, 2 * len(o.case.widths), 2))
    drop, rest = grouped.Dropout(keys, thresholds, tuple(1 / (1 - q) for q in p), streams), (o.batch, o.own)
    wanted_h, dh, dy = expected_mixed_h(o), expected_mixed_dh(o, o.slices(o.dy)).to(DEVICE, o.dtype), o.slices(o.dy)
    wanted_dx, wanted_dA = wide(o.x), []
    for g, ranks in enumerate(o.case.ranks):
        rows, column = o.rows(g), 0
        for i, r in enumerate(ranks):
            own, A = (wide(dh)[rows, column : column + r], keys[rows].cpu(), streams[i], p[g]), o.factor(o.A, g, i)
            seen = reference.dropout_rows(wide(o.x)[rows], *own[1:]) if p[g] else wide(o.x)[rows]
            part = own[0] @ A
            wanted_h[rows, column : column + r] = seen @ A.T
            wanted_dx[rows] += reference.dropout_rows(part, *own[1:]) if p[g] else part
            wanted_dA.append(own[0].T @ seen)
            column += r
    h = grouped.grouped_shrink(o.x, o.factors_of_shrink(), *rest, tiles, drop)
    dx = grouped.grouped_linear_backward_(o.x.clone(), dh, o.A, *rest, others, drop)
    near = expected_mixed_h(o).to(DEVICE, o.dtype)
    dA, dB, Q = grouped.grouped_wgrad(o.x, dh, dy, near, o.case.widths, *rest, o.scales, tiles=others, drop=drop)
    _, wanted_dB, wanted_Q = expected_wgrad(o, o.x, dh, dy, near)
    found, wanted = [h, dx, *dA, *dB, *Q], [wanted_h, wanted_dx, *wanted_dA, *wanted_dB, *wanted_Q]
    return list(zip(found, wanted, strict=True))


def mixed_of(data):
    """Rows of four adapters, and of none, with the sizes of a problem."""
    s, some = data.problem, torch.Generator().manual_seed(data.problem.M)
    ids = torch.randint(-1, 4, (s.M,), generator=some).tolist()
    ranks = tuple(tuple(max(1, r >> g) for r in s.ranks) for g in range(4))
    return Operands(Mixed(tuple(ids), s.K, s.outputs, s.widths, ranks, (s.probes, 0, 3, 1)), data.dtype)


def run_grouped(data, tiles):
    """(found, wanted) pairs of every verb over rows of several adapters; only shrink takes the tile."""
    s, o = data.problem, mixed_of(data)
    h, dh, dy = expected_mixed_h(o).to(DEVICE, o.dtype), expected_mixed_dh(o, o.slices(o.dy)), o.slices(o.dy)
    near, rest, wanted = dh.to(DEVICE, o.dtype), (o.batch, o.own), expected_y(o, h)
    pairs = [
        (grouped.grouped_shrink(o.x, o.factors_of_shrink(), *rest, tiles), expected_mixed_h(o)),
        (grouped.grouped_shrink_backward(dy, o.B, *rest, o.scales, tiles), dh),
        (grouped.grouped_linear_backward_(o.x.clone(), near, o.A, *rest), expected_dx(o, o.x, near)),
    ]
    moments = grouped.grouped_expand_(o.y, h, o.W, o.B, *rest, o.places, o.scales, True)
    found = grouped.grouped_wgrad(o.x, near, dy, h, s.widths, *rest, o.scales)
    for some, others in zip(found, expected_wgrad(o, o.x, near, dy, h), strict=True):
        pairs += zip(some, others, strict=True)
    sums = [reference.counted_moments(wide(y)[o.rows(g)]) for g in range(4) for y in o.y]
    return [*pairs, *zip(o.y, wanted, strict=True), *zip(moments, sums, strict=True)]


def run_linear(verb, data, tiles, h):
    """(found, wanted) pairs of y, and of its moments where the verb has them."""
    layout = data.layout
    strategy = "library" if verb == "expand" else "fused"
    y, sums = linear.linear(
        data.x, data.W, data.bias, h, data.B, data.places, layout.offsets, data.scale, verb != "linear",
        strategy, tiles,
    )  # fmt: skip
    update = [
        s * wide(h)[:, o : o + b.shape[1]] @ wide(b.to(data.dtype)).T
        for b, o, s in zip(data.B, layout.offsets, data.scale, strict=True)
    ]
    base = [wide(data.x) @ wide(w).T + (0 if b is None else wide(b)) for w, b in zip(data.W, data.bias, strict=True)]
    wanted = torch.cat(base, 1) + torch.cat(update, 1)
    found = [(m, reference.counted_moments(wide(o))) for m, o in zip(sums, y, strict=bool(sums))]
    return [(torch.cat(y, 1), wanted), *found]


def run_wgrad(data, tiles, h, dh, p, options):
    """(found, wanted) pairs of dA, dB and Q."""
    layout, s = data.layout, data.problem
    dA, dB, Q = wgrad.wgrad(
        data.x, dh, data.slices(), h, layout.offsets, s.ranks, data.scale, s.probes, tiles=tiles, **options
    )
    found = []
    for i, part in enumerate(data.slices()):
        own = slice(layout.offsets[i], layout.offsets[i] + s.ranks[i])
        x = reference.dropout(wide(data.x), data.seed.cpu(), i, p) if p else wide(data.x)
        found += [(dA[i], wide(dh)[:, own].T @ x), (Q[i], wide(part).T @ wide(h)[:, layout.rank :])]
        found.append((dB[i], data.scale[i] * wide(part).T @ wide(h)[:, own]))
    return found


def run_expand_backward(data, tiles, h):
    """(found, wanted) pairs of dh, dB and Q from one pass over dy."""
    layout, s = data.layout, data.problem
    rest = data.B, layout.offsets, data.scale, layout.rank, s.probes
    dh, _, dB, Q = expand_backward.expand_backward(None, data.slices(), h, *rest, strategy="fused", tiles=tiles)
    found = [(dh, expected_dh(data))]
    for i, part in enumerate(data.slices()):
        own = slice(layout.offsets[i], layout.offsets[i] + s.ranks[i])
        found.append((dB[i], data.scale[i] * wide(part).T @ wide(h)[:, own]))
        found.append((Q[i], wide(part).T @ wide(h)[:, layout.rank :]))
    return found


def run_shrink_linear(data, tiles):
    """(found, wanted) pairs of h and y; of ranks that do not fit beside a tile from two kernels."""
    layout = data.layout
    y, h, _ = shrink_linear.shrink_linear(
        data.x, data.W, data.bias, data.A, data.P, data.B, data.places, layout.offsets, data.scale,
        strategy="fused", tiles=tiles,
    )  # fmt: skip
    ((_, wanted),) = run_linear("linear", data, None, h)
    return [(h, expected_h(data)), (torch.cat(y, 1), wanted)]


def run_shrink_linear_backward(data, tiles):
    """(found, wanted) pairs of dh and dx; none of ranks that do not fit beside a tile."""
    rest = data.W, data.B, data.A, data.places, data.layout.offsets, data.scale
    both = shrink_linear_backward.shrink_linear_backward(data.slices(), *rest, strategy="fused", tiles=tiles)
    return [] if both is None else [(both[1], expected_dh(data)), (both[0], expected_dx_of(data, both[1]))]


def expected_dx_of(data, dh, p=0.0):
    """dx in float64, from a dh that may be rounded."""
    wanted = sum(wide(g) @ wide(w) for g, w in zip(data.dy, data.W, strict=True) if g is not None)
    for i, (a, o) in enumerate(zip(data.A, data.layout.offsets, strict=True)):
        part = wide(dh)[:, o : o + a.shape[0]] @ wide(a.to(data.dtype))
        wanted = wanted + (reference.dropout(part, data.seed.cpu(), i, p) if p else part)
    return wanted


def run_gradstat(verb, data, tiles):
    """(found, wanted) pairs of three runs, and of the diagonal where the verb has it."""
    s = data.problem
    offsets, shape = [0, 3, s.M // 2, s.M], (data.dy[0].shape[1], s.K)
    diagonal = torch.zeros(shape, device=DEVICE) if verb == "gradstat_diagonal" else None
    stat = gradstat.gradstat(data.x, data.dy[:1], torch.tensor(offsets, device=DEVICE), tiles, diagonal=diagonal)
    found = [(stat[0], reference.gradstat(wide(data.x), wide(data.dy[0]), offsets))]
    runs = zip(offsets[:-1], offsets[1:], strict=True)
    squares = sum((wide(data.dy[0])[a:b].T @ wide(data.x)[a:b]).square() for a, b in runs)
    return found if diagonal is None else [*found, (diagonal, squares)]


def run_verb(verb, data, tiles):
    """(found, wanted) pairs of a verb with one tile."""
    layout, s = data.layout, data.problem
    p = 0.25 if verb.endswith("dropout") else 0.0
    keep = {"threshold": reference.keep_threshold(p), "keep_scale": 1 / (1 - p)}
    options = {"seed": data.seed, **keep} if p else {}
    h, dh = expected_h(data, p).to(DEVICE, data.dtype), expected_dh(data).to(DEVICE, data.dtype)
    if verb == "grouped_shrink_dropout":
        return run_dropped(mixed_of(data), tiles)
    if verb == "grouped_shrink":
        return run_grouped(data, tiles)
    if verb == "shrink_linear_backward":
        return run_shrink_linear_backward(data, tiles)
    if verb == "shrink_linear":
        return run_shrink_linear(data, tiles)
    if verb.startswith("shrink"):
        found = [(shrink.shrink(data.x, [*data.A, data.P], 1, tiles=tiles, **options), expected_h(data, p))]
        if not p:
            dh = shrink.shrink_backward(data.slices(), data.B, layout.offsets, data.scale, layout.rank, tiles)
            found.append((dh, expected_dh(data)))
        return found
    if verb in ("linear", "linear_moments", "expand"):
        return run_linear(verb, data, tiles, h)
    if verb.startswith(("linear_backward", "expand_dropout")):
        strategy = "library" if verb.startswith("expand") else "fused"
        dx = linear_backward.linear_backward(
            data.dy, data.W, dh, data.A, layout.offsets, strategy=strategy, tiles=tiles, **options
        )
        return [(dx, expected_dx_of(data, dh, p))]
    if verb == "expand_backward":
        return run_expand_backward(data, tiles, h)
    if verb.startswith("wgrad"):
        return run_wgrad(data, tiles, h, dh, p, options)
    if verb.startswith("gradstat"):
        return run_gradstat(verb, data, tiles)
    assert verb == "covariance"
    total = torch.zeros(s.K, s.K, device=DEVICE)
    gradstat.add_gram_(total, data.x, torch.tensor(0.5, device=DEVICE), tiles)
    added = (total.triu(), 0.5 * (wide(data.x).T @ wide(data.x)).triu())
    return [added, (gradstat.covariance(data.x, tiles), wide(data.x).T @ wide(data.x) / s.M)]
