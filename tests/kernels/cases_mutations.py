"""The cases can fail: each kernel with one line of its source broken gives a wrong answer.

A mutant is the shipped file with one piece of text replaced, imported beside the original.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from fastlora.kernels import tiling
from fastlora.kernels.tiling import TileConfig
from kernel_support import (
    DEVICE,
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

from fastlora import kernels, reference

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


def off_linear(module, data, p):
    h, layout = expected_h(data).to(DEVICE, data.dtype), data.layout
    y, moments = module.linear(
        data.x, data.W, data.bias, h, data.B, data.places, layout.offsets, data.scale, True, "fused", TILES
    )
    update = torch.cat(
        [
            s * wide(h)[:, o : o + b.shape[1]] @ wide(b).T
            for b, o, s in zip(data.B, layout.offsets, data.scale, strict=True)
        ],
        1,
    )
    base = [wide(data.x) @ wide(w).T + (0 if b is None else wide(b)) for w, b in zip(data.W, data.bias, strict=True)]
    sums = [reference.column_moments(wide(out)) for out in y]
    return max(error(torch.cat(y, 1), torch.cat(base, 1) + update), error(torch.cat(moments, 1), torch.cat(sums, 1)))


def off_linear_backward(module, data, p):
    dh = torch.randn(data.problem.M, data.layout.rank, device=DEVICE)
    dx = module.linear_backward(data.dy, data.W, dh, data.A, data.layout.offsets, strategy="fused", tiles=TILES)
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


def off_gradstat(module, data, p):
    offsets = [0, 11, data.problem.M]
    found = module.gradstat(data.x, data.dy[0], torch.tensor(offsets, device=DEVICE), TILES)
    return error(found, reference.gradstat(wide(data.x), wide(data.dy[0]), offsets))


FIRST_PROBE = "clear(first_probe[0], EVEN_R) + o_rank"
OWN_RANKS = "clear(pick(offsets, i_entry), EVEN_R)"
MUTATIONS = {
    "shrink: no mask past K": ("shrink", "if not EVEN_K:", "if False:", off_shrink, 0.0),
    "shrink: parts overlap": ("shrink", "tl.range(i_split * part,", "tl.range(0,", off_shrink, 0.0),
    "shrink: one mask for all": ("shrink", "keep_mask(seed, i, o_m", "keep_mask(seed, 0, o_m", off_shrink, 0.3),
    "shrink: probes drop": ("shrink", "(o_rank >= clear(ends[MASKED - 1]))[", "(o_rank < 0)[", off_shrink, 0.3),
    "dh: a neighbour's ranks": ("shrink", f"{OWN_RANKS} + o_own", "o_own", off_shrink_backward, 0.0),
    "dh: no scale": ("shrink", "b_acc *= pick(scales, i_entry)", "b_acc *= 1.0", off_shrink_backward, 0.0),
    "linear: h of the first": ("linear", f"+ {OWN_RANKS}", "", off_linear, 0.0),
    "linear: bias of the first": ("linear", "tl.load(pick(p_bias, i_entry)", "tl.load(p_bias[0]", off_linear, 0.0),
    "linear: moments of padding": ("linear", "tl.where(m_m, b_seen - ", "tl.where(m_n, b_seen - ", off_linear, 0.0),
    "linear: sum lost": ("linear", "matmul_loop(b_acc, p_x", "matmul_loop(b_acc * 0.0, p_x", off_linear, 0.0),
    "dx: a source less": ("linear", "static_range(SOURCES)", "static_range(SOURCES - 1)", off_linear_backward, 0.0),
    "wgrad: last row lost": ("wgrad", "tl.minimum(first + rows, M)", "tl.minimum(first + rows, M - 3)", off_wgrad, 0.0),
    "wgrad: a rank as probe": ("wgrad", f"{FIRST_PROBE} - rank", FIRST_PROBE, off_wgrad, 0.0),
    "wgrad: partials overwritten": ("wgrad", "tl.program_id(2).to(tl.int64) * total", "0 * total", off_wgrad, 0.0),
    "gradstat: run boundary": ("gradstat", "(last - first).to", "(last - first - 1).to", off_gradstat, 0.0),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutant_is_caught(mutation, tmp_path, monkeypatch):
    name, original, broken, off, p = MUTATIONS[mutation]
    monkeypatch.setattr(tiling, "PROGRAMS", 24)
    monkeypatch.setattr(tiling, "choose_split", lambda *sizes: 2)
    data = Data(SEPARATE, torch.float32)
    tolerance = 10 * TOLERANCE[torch.float32]
    assert off(load(name, original, broken, tmp_path), data, p) > tolerance


@pytest.mark.parametrize(("name", "off"), sorted({(name, off) for name, _, _, off, _ in MUTATIONS.values()}, key=str))
def test_an_unbroken_copy_is_right(name, off, tmp_path, monkeypatch):
    monkeypatch.setattr(tiling, "PROGRAMS", 24)
    monkeypatch.setattr(tiling, "choose_split", lambda *sizes: 2)
    copy = load(name, "import annotations", "import annotations", tmp_path)
    assert off(copy, Data(SEPARATE, torch.float32), 0.0) <= 10 * TOLERANCE[torch.float32]


def test_fused_weight_columns(tmp_path):
    """The column of a projection within its output matters only where one weight holds several."""
    data = Data(FUSED, torch.float32)
    broken = load("linear", "y[j].narrow(1, column, n)", "y[j].narrow(1, 0, n)", tmp_path)
    assert off_linear(broken, data, 0.0) > 1e-3
