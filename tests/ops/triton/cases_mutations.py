"""The cases can fail: each kernel with one line of its source broken gives a wrong answer.

A mutant is the shipped file with one piece of text replaced, imported beside the original.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from fastlora.kernels import grouped, linear, tiling
from fastlora.kernels.tiling import TileConfig
from support.every_verb import expected_dx_of, run_dropped
from support.triton_grouped_help import CASES, Operands, expected_dx, expected_wgrad, expected_y
from support.triton_grouped_help import expected_dh as expected_dh_of
from support.triton_grouped_help import expected_h as expected_h_of
from support.triton_help import (
    DEVICE,
    EVEN,
    FUSED,
    INTERPRETED,
    SEPARATE,
    TOLERANCE,
    Data,
    error,
    expected_dh,
    expected_h,
    wide,
)

from fastlora import kernels
from fastlora.ops import reference

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(not INTERPRETED, reason="a mutant may write anywhere: not on a GPU"),
]
TILES = TileConfig(16, 16, 16, 4, 2)
FOLDER = Path(kernels.__file__).parent


def load(name: str, original: str, broken: str, folder: Path):
    """The module ``name`` with one piece of its source replaced; the piece must occur exactly once."""
    source = (FOLDER / f"{name}.py").read_text()
    assert source.count(original) == 1, f"{name}: {original!r} occurs {source.count(original)} times"
    file = folder / f"{name}.py"
    file.write_text(source.replace(original, broken))
    spec = importlib.util.spec_from_file_location(f"fastlora.kernels.mutant_{name}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def off_shrink(module, data, p):
    options = {"seed": data.seed, "threshold": reference.keep_threshold(p), "keep_scale": 1 / (1 - p)} if p else {}
    return error(module.shrink(data.x, [*data.A, data.P], 1, tiles=TILES, **options), expected_h(data, p))


def off_shrink_backward(module, data, p):
    layout = data.layout
    dh = module.shrink_backward(data.slices(), data.B, layout.offsets, data.scale, layout.rank, TILES)
    return error(dh, expected_dh(data))


def off_linear(module, data, p, tiles=TILES):
    h, layout = expected_h(data).to(DEVICE, data.dtype), data.layout
    y, moments = module.linear(
        data.x, data.W, data.bias, h, data.B, data.places, layout.offsets, data.scale, True, "fused", tiles
    )
    update = torch.cat(
        [
            s * wide(h)[:, o : o + b.shape[1]] @ wide(b).T
            for b, o, s in zip(data.B, layout.offsets, data.scale, strict=True)
        ],
        1,
    )
    base = [wide(data.x) @ wide(w).T + (0 if b is None else wide(b)) for w, b in zip(data.W, data.bias, strict=True)]
    sums = [reference.counted_moments(wide(out)) for out in y]
    return max(error(torch.cat(y, 1), torch.cat(base, 1) + update), error(torch.cat(moments, 1), torch.cat(sums, 1)))


def off_linear_backward(module, data, p, tiles=TILES):
    dh = torch.randn(data.problem.M, data.layout.rank, device=DEVICE)
    dx = module.linear_backward(data.dy, data.W, dh, data.A, data.layout.offsets, strategy="fused", tiles=tiles)
    wanted = sum(wide(g) @ wide(w) for g, w in zip(data.dy, data.W, strict=True))
    return error(dx, wanted + wide(dh) @ wide(torch.cat(data.A)))


def off_wgrad(module, data, p):
    layout, s = data.layout, data.problem
    dh, h = expected_dh(data).to(DEVICE, data.dtype), expected_h(data).to(DEVICE, data.dtype)
    dA, dB, Q = module.wgrad(data.x, dh, data.slices(), h, layout.offsets, s.ranks, data.scale, s.probes, tiles=TILES)
    worst = error(torch.cat(dA), wide(dh).T @ wide(data.x))
    for i, part in enumerate(data.slices()):
        own = wide(h)[:, layout.offsets[i] : layout.offsets[i] + s.ranks[i]]
        worst = max(worst, error(dB[i], data.scale[i] * wide(part).T @ own))
        worst = max(worst, error(Q[i], wide(part).T @ wide(h)[:, layout.rank :]))
    return worst


def off_expand_backward(module, data, p):
    layout, s, h = data.layout, data.problem, expected_h(data).to(DEVICE, data.dtype)
    dh, dA, dB, Q = module.expand_backward(
        data.x, data.slices(), h, data.B, layout.offsets, data.scale, layout.rank, s.probes,
        strategy="fused", tiles=TILES,
    )  # fmt: skip
    worst = max(error(dh, expected_dh(data)), error(torch.cat(dA), wide(dh).T @ wide(data.x)))
    for i, part in enumerate(data.slices()):
        own = wide(h)[:, layout.offsets[i] : layout.offsets[i] + s.ranks[i]]
        worst = max(worst, error(dB[i], data.scale[i] * wide(part).T @ own))
        worst = max(worst, error(Q[i], wide(part).T @ wide(h)[:, layout.rank :]))
    return worst


def off_shrink_linear(module, data, p):
    data = Data(EVEN, torch.float32)
    layout = data.layout
    y, h, _ = module.shrink_linear(
        data.x, data.W, data.bias, data.A, data.P, data.B, data.places, layout.offsets, data.scale,
        strategy="fused", tiles=TILES,
    )  # fmt: skip
    worst = error(h, expected_h(data))
    for i, (w, b, bias) in enumerate(zip(data.W, data.B, data.bias, strict=True)):
        own = wide(h)[:, layout.offsets[i] : layout.offsets[i] + b.shape[1]]
        wanted = wide(data.x) @ wide(w).T + data.scale[i] * own @ wide(b).T + (0 if bias is None else wide(bias))
        worst = max(worst, error(y[i], wanted))
    return worst


def off_shrink_linear_backward(module, data, p):
    data = Data(EVEN, torch.float32)
    rest = data.W, data.B, data.A, data.places, data.layout.offsets, data.scale
    dx, dh = module.shrink_linear_backward(data.slices(), *rest, strategy="fused", tiles=TILES)
    return max(error(dh, expected_dh(data)), error(dx, expected_dx_of(data, expected_dh(data))))


def off_gradstat(module, data, p):
    offsets = [0, 11, data.problem.M]
    found = module.gradstat(data.x, data.dy, torch.tensor(offsets, device=DEVICE), TILES)
    wanted = [reference.gradstat(wide(data.x), wide(part), offsets) for part in data.dy]
    return error(found, torch.stack(wanted))


def off_split(module, data, p):
    x, dy = data.x.repeat(9, 1), data.dy[0].repeat(9, 1)
    found = module.gradstat(x, [dy], torch.tensor([0, len(x)], device=DEVICE), TILES)
    return error(found[0], reference.gradstat(wide(x), wide(dy), [0, len(x)]))


def off_tiles(module, data, p):
    partial, out = torch.randn(5, 3, 256, device=DEVICE), torch.empty(5, 2, device=DEVICE)
    module.reduce_tiles(partial, out)
    tiles = wide(partial).sum(1)
    return error(out, torch.stack([tiles.square().sum(1), tiles.abs().sum(1)], 1))


def off_linear_tma(module, data, p):
    return off_linear(module, Data(FUSED, torch.float32), p, TILES._replace(tma=True))


def off_linear_tma_even(module, data, p):
    return off_linear(module, Data(EVEN, torch.float32), p, TILES._replace(tma=True))


def off_linear_backward_tma(module, data, p):
    return off_linear_backward(module, Data(FUSED, torch.float32), p, TILES._replace(tma=True))


def off_diagonal(module, data, p):
    offsets, dy = [0, 11, data.problem.M], data.dy[0]
    diagonal = torch.ones(dy.shape[1], data.problem.K, device=DEVICE)
    module.gradstat(data.x, [dy], torch.tensor(offsets, device=DEVICE), TILES, diagonal=diagonal)
    runs = zip(offsets[:-1], offsets[1:], strict=True)
    return error(diagonal, 1 + sum((wide(dy)[a:b].T @ wide(data.x)[a:b]).square() for a, b in runs))


def off_covariance(module, data, p):
    found = [module.covariance(data.x, TILES), torch.ones(data.problem.K, data.problem.K, device=DEVICE)]
    module.add_gram_(found[1], data.x, torch.tensor(2.0, device=DEVICE), TILES)
    product = wide(data.x).T @ wide(data.x)
    return max(error(found[0], product / data.problem.M), error(found[1].triu(), (1 + 2 * product).triu()))


def off_grouped(module, data, p):
    """The verbs over rows of several adapters, with one of the files that hold their kernels broken."""
    return max(_off_mixed(Operands(CASES[name])) for name in ("separate", "long_runs"))


def off_dropped(module, data, p):
    """The same with dropout, each row with a key and each adapter with a probability of its own."""
    return max(error(found, wanted) for found, wanted in run_dropped(Operands(CASES["separate"]), TILES, TILES))


def _off_mixed(o):
    h, dh = expected_h_of(o).float().to(DEVICE), expected_dh_of(o, o.slices(o.dy)).float().to(DEVICE)
    dy, rest, wanted = o.slices(o.dy), (o.batch, o.own), expected_y(o, h)
    pairs = [
        (grouped.grouped_shrink(o.x, o.factors_of_shrink(), *rest, TILES), expected_h_of(o)),
        (grouped.grouped_shrink_backward(dy, o.B, *rest, o.scales, TILES), expected_dh_of(o, dy)),
        (grouped.grouped_linear_backward_(o.x.clone(), dh, o.A, *rest, TILES), expected_dx(o, o.x, dh)),
    ]
    moments = grouped.grouped_expand_(o.y, h, o.W, o.B, *rest, o.places, o.scales, True, TILES)
    found = grouped.grouped_wgrad(o.x, dh, dy, h, o.case.widths, *rest, o.scales, tiles=TILES)
    pairs += zip(o.y, wanted, strict=True)
    for some, others in zip(found, expected_wgrad(o, o.x, dh, dy, h), strict=True):
        pairs += zip(some, others, strict=True)
    sums = [reference.counted_moments(wide(y)[o.rows(g)]) for g in range(len(o.case.ranks)) for y in o.y]
    return max(error(one, other) for one, other in [*pairs, *zip(moments, sums, strict=True)])


FIRST_PROBE = "layout.first_probe + o_rank"
OWN_RANKS = "reveal(first, EVEN)"
ONE_MASK = "keep_mask(keys.seed, OPTIONS.streams[i],", "keep_mask(keys.seed, OPTIONS.streams[0],"
ROUTED, SHUFFLED = "OPTIONS.gather)", "False)"
MUTATIONS = {
    "shrink: no mask past K": ("shrink", "if not OPTIONS.even_k:", "if False:", off_shrink, 0.0),
    "shrink: parts overlap": ("shrink", "i_split * part, tl.minimum", "0, tl.minimum", off_shrink, 0.0),
    "shrink: one mask for all": ("shrink", *ONE_MASK, off_shrink, 0.3),
    "shrink: probes drop": ("shrink", "(block.columns >= masked)[", "(block.columns < 0)[", off_shrink, 0.3),
    "dh: a neighbour's ranks": ("shrink", f"o_rank = {OWN_RANKS} + o_own", "o_rank = o_own", off_shrink_backward, 0.0),
    "dh: no scale": ("shrink", "select(factors.scales, i)", "1.0", off_shrink_backward, 0.0),
    "linear: h of the first": ("linear", "OPTIONS.even_r) + part.offset", "OPTIONS.even_r)", off_linear, 0.0),
    "linear: bias of the first": ("linear", "select(group.bias, i)\n    linear_tile", "group.bias[0]\n    linear_tile",
                                  off_linear, 0.0),
    "linear: moments of padding": ("linear", "b_y.to(tl.float32), m_m,", "b_y.to(tl.float32), m_m | True,",
                                   off_linear, 0.0),
    "linear: sum lost": ("linear", "matmul_loop(b_acc, p_x", "matmul_loop(b_acc * 0.0, p_x", off_linear, 0.0),
    "tma: tiles skipped": ("linear", "tl.num_programs(0) - own", "tl.num_programs(0)", off_linear_tma, 0.0),
    "tma: rows of the first tile": ("linear", "load([place.row_tile * BLOCK_M, k])", "load([0, k])",
                                    off_linear_tma, 0.0),
    "tma: a step lost": ("linear", "tl.range(0, x.columns, BLOCK_K)", "tl.range(BLOCK_K, x.columns, BLOCK_K)",
                         off_linear_tma, 0.0),
    "tma: the first ranks twice": ("linear", "BLOCK_R if LATE else 0", "0", off_linear_tma_even, 0.0),
    "tma: other ranks' columns": ("linear", "tl.where(m_h, b_h, 0.0)", "b_h + 1.0", off_linear_tma_even, 0.0),
    "dx: a source less": ("linear_backward", "static_range(len(dy.data))", "static_range(len(dy.data) - 1)",
                          off_linear_backward, 0.0),
    "dx, tma: rows of the first tile": ("linear_backward", "load([i_m * BLOCK_M, n])", "load([0, n])",
                                        off_linear_backward_tma, 0.0),
    "dx, tma: a step lost": ("linear_backward", "tl.range(0, N, BLOCK_K)", "tl.range(BLOCK_K, N, BLOCK_K)",
                             off_linear_backward_tma, 0.0),
    "dx, tma: columns of the first tile": ("linear_backward", "load([n, i_n * BLOCK_N])", "load([n, 0])",
                                           off_linear_backward_tma, 0.0),
    "wgrad: last row lost": ("wgrad", "tl.minimum(first + rows, M)", "tl.minimum(first + rows, M - 3)", off_wgrad, 0.0),
    "wgrad: a rank as probe": ("wgrad", f"{FIRST_PROBE} - ranks", FIRST_PROBE, off_wgrad, 0.0),
    "wgrad: partials overwritten": ("wgrad", "i_part.to(tl.int64) * reveal", "0 * reveal", off_wgrad, 0.0),
    "gradstat: run boundary": ("gradstat", "count = (last - first).to", "count = (last - first - 1).to",
                               off_gradstat, 0.0),
    "gradstat: the first matrix alone": ("gradstat", "select_matrix(dy, i_part)", "select_matrix(dy, i_part * 0)",
                                         off_gradstat, 0.0),
    "gradstat: a part of the rows twice": ("gradstat", "tl.program_id(2) * each", "0 * each", off_split, 0.0),
    "gradstat: squares before the sum": ("reduce", "b_squares += b_sum * b_sum", "b_squares += b_sum", off_tiles,
                                         0.0),
    "one pass: rows twice": ("expand_backward", "tl.minimum(M, (i_part + 1) * rows)", "M", off_expand_backward, 0.0),
    "one pass: columns twice": ("expand_backward", "tl.minimum(N, first + span)", "N", off_expand_backward, 0.0),
    "one pass: columns of the first": ("expand_backward", "tl.program_id(2) * span", "0 * span", off_expand_backward,
                                       0.0),
    "one pass: a rank as probe": ("expand_backward", f"{FIRST_PROBE} - ranks", FIRST_PROBE, off_expand_backward, 0.0),
    "one pass: partials overwritten": ("expand_backward", "i_part.to(tl.int64) * reveal", "0 * reveal",
                                       off_expand_backward, 0.0),
    "one pass: no scale": ("expand_backward", "b_dh * select(B.scales, i)", "b_dh", off_expand_backward, 0.0),
    "beside: no probes": ("shrink_linear", "m_rank | (m_f & (i == 0))", "m_rank", off_shrink_linear, 0.0),
    "beside: ranks of the first": ("shrink_linear", "select(factors.data, i)", "factors.data[0]", off_shrink_linear,
                                   0.0),
    "beside: no scale": ("shrink_linear", "* part.scale", "* 1.0", off_shrink_linear, 0.0),
    "beside: bias of the first": ("shrink_linear", "select(group.bias, i)", "group.bias[0]", off_shrink_linear, 0.0),
    "dh beside dx: no scale": ("shrink_linear_backward", "b_dh * B.scales[i]", "b_dh", off_shrink_linear_backward, 0.0),
    "dh beside dx: stored elsewhere": ("shrink_linear_backward", "(offset + o_rank)", "o_rank",
                                       off_shrink_linear_backward, 0.0),
    "dh beside dx: a projection less": ("shrink_linear_backward", "static_range(len(dy.data))",
                                        "static_range(len(dy.data) - 1)", off_shrink_linear_backward, 0.0),
    "dh beside dx: A of the first": ("shrink_linear_backward", "A.data[i] +", "A.data[0] +",
                                     off_shrink_linear_backward, 0.0),
    "diagonal: last run only": ("gradstat", "b_squares += b_acc", "b_squares = b_acc", off_diagonal, 0.0),
    "diagonal: overwritten": ("gradstat", "b_squares + tl.load(", "b_squares + 0 * tl.load(", off_diagonal, 0.0),
    "covariance: one weight": ("gradstat", "scale = tl.load(weight)", "scale = tl.load(weight) * 0.5",
                               off_covariance, 0.0),
    "covariance: mirrored into itself": ("gradstat", "if i_row != i_column:", "if i_row == i_column:",
                                         off_covariance, 0.0),
    "adapters, h: routing": ("shrink", f"{ROUTED}\n        p_fac", f"{SHUFFLED}\n        p_fac", off_grouped, 0.0),
    "adapters, h: a rank less": ("shrink", "offset + o_own, o_own < rank", "offset + o_own, o_own < rank - 1",
                                 off_grouped, 0.0),
    "adapters, h: factors of the first": ("shrink", "(row + o_own) * factors", "o_own * factors", off_grouped, 0.0),
    "adapters, y: routing": ("linear", ROUTED, SHUFFLED, off_grouped, 0.0),
    "adapters, y: a neighbour's scale": ("linear", "segments.scales + i_pair", "segments.scales + i", off_grouped, 0.0),
    "adapters, dx: routing": ("linear_backward", ROUTED, SHUFFLED, off_grouped, 0.0),
    "adapters, dx: factors of the first": ("linear_backward", "(o_skip + o_rank)", "o_rank", off_grouped, 0.0),
    "adapters, dA: routing": ("wgrad", "if OPTIONS.gather:", "if False:", off_grouped, 0.0),
    "adapters, dA: rows twice": ("wgrad", "begin + i_part * own", "begin", off_grouped, 0.0),
    "adapters, dB: no scale": ("wgrad", "tl.where(o_rank < ranks, scale, 1.0)", "tl.where(o_rank < ranks, 1.0, 1.0)",
                               off_grouped, 0.0),
    "adapters, dropout of h: row for key": ("shrink", "keys.counters, k,", "rows.numbers, k,", off_dropped, 0.0),
    "adapters, dropout of dx: no scale": ("linear_backward", "b_part * keys.scale", "b_part", off_dropped, 0.0),
    "adapters, dropout of dA: one mask": ("wgrad", *ONE_MASK,
                                          off_dropped, 0.0),
    "adapters, moments: of the first": ("reduce", "(i_before + o_tile) * 2", "o_tile * 2", off_grouped, 0.0),
    "adapters, moments: rows of all": ("reduce", "p_count, own.to(tl.float64)", "p_count, M.to(tl.float64)",
                                       off_grouped, 0.0),
    "adapters, moments: no row of their own": ("reduce", "select(out.data, i_entry) + adapter * 2 * stride_out",
                                               "select(out.data, i_entry)", off_grouped, 0.0),
}  # fmt: skip


def broken_in(name: str, module, monkeypatch) -> None:
    """Let the verbs over adapters call the mutant."""
    if name == "reduce":
        monkeypatch.setattr(linear, "reduce_moments", module.reduce_moments)
    else:
        monkeypatch.setattr(grouped, name, module)
    monkeypatch.setattr(grouped, "choose_split", lambda *sizes: 2)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutant_is_caught(mutation, tmp_path, monkeypatch):
    name, original, broken, off, p = MUTATIONS[mutation]
    monkeypatch.setattr(tiling, "PROGRAMS", 24)
    monkeypatch.setattr(tiling, "choose_split", lambda *sizes: 2)
    data, module = Data(SEPARATE, torch.float32), load(name, original, broken, tmp_path)
    if off in (off_grouped, off_dropped):
        broken_in(name, module, monkeypatch)
    assert off(module, data, p) > 10 * TOLERANCE[torch.float32]


@pytest.mark.parametrize(("name", "off"), sorted({(name, off) for name, _, _, off, _ in MUTATIONS.values()}, key=str))
def test_an_unbroken_copy_is_right(name, off, tmp_path, monkeypatch):
    monkeypatch.setattr(tiling, "PROGRAMS", 24)
    monkeypatch.setattr(tiling, "choose_split", lambda *sizes: 2)
    copy = load(name, "import annotations", "import annotations", tmp_path)
    if off in (off_grouped, off_dropped):
        broken_in(name, copy, monkeypatch)
    assert off(copy, Data(SEPARATE, torch.float32), 0.0) <= 10 * TOLERANCE[torch.float32]


def test_fused_weight_columns(tmp_path):
    """The column of a projection within its output matters only where one weight holds several."""
    data = Data(FUSED, torch.float32)
    broken = load("linear", "y[j].narrow(1, column, n)", "y[j].narrow(1, 0, n)", tmp_path)
    assert off_linear(broken, data, 0.0) > 1e-3
