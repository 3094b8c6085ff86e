"""Properties of generated operators and files: any shapes, ranks and strides; any config, saved and loaded again."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.op_help import BACKENDS, assert_close_as, make, oracle, run

import fastlora

sys.path.append(str(Path(__file__).parents[2] / "tools"))
from small_model import batch, plain  # noqa: E402

SETTINGS = dict(deadline=None, derandomize=True, database=None, report_multiple_bugs=False)


@st.composite
def calls(draw):
    """Operands of one group; x may be a slice, a transpose or strided, and rows may be none."""
    N = draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    K, M = draw(st.integers(1, 70)), draw(st.sampled_from([0, 1, 2, 3, 17, 64, 133]))
    r = tuple(draw(st.integers(0, 20)) for _ in N)
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    k, seed = draw(st.integers(0, 9)), draw(st.integers(0, 2**20))
    case = make(M, K, tuple(N), r, draw(st.booleans()), k, dtype, seed)
    x, layout = case["x"], draw(st.sampled_from(["as it is", "slice", "transposed", "strided"]))
    if layout == "slice":
        case["x"] = torch.nn.functional.pad(x, (3, 4))[:, 3 : 3 + K]
    elif layout == "transposed":
        case["x"] = x.t().contiguous().t()
    elif layout == "strided":
        case["x"] = x.repeat_interleave(2, dim=1)[:, ::2]
    return case


@settings(max_examples=80, **SETTINGS)
@given(calls(), st.sampled_from(BACKENDS))
def test_every_operator_is_the_formula(case, backend):
    """Outputs, dx, every dA, dB and Q: as near to float64 as the plain formula in the same precision."""
    exact, low = oracle(case), run(case, "reference")
    found = run(case, "auto" if case["x"].dtype == torch.float64 else backend)
    for mine, e, p in zip(found, exact, low, strict=True):
        assert_close_as(mine, e, p)


@settings(max_examples=25, **SETTINGS)
@given(calls(), st.data())
def test_rows_do_not_depend_on_each_other(case, data):
    """An output row is a function of its own row of x: rows in another order give outputs in that order."""
    if case["x"].dtype != torch.float64:
        case = {k: [t if t is None else t.double() for t in v] if isinstance(v, list) and k != "scale" else v
                for k, v in case.items()} | {"x": case["x"].double()}  # fmt: skip
    order = torch.tensor(data.draw(st.permutations(range(case["x"].shape[0]))), dtype=torch.int64)
    moved = {**case, "x": case["x"][order], "dy": [g[order] for g in case["dy"]]}
    (y, grads), (z, others) = run(case), run(moved)
    for a, b in zip(y, z, strict=True):
        torch.testing.assert_close(a[order], b, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads[0][order], others[0], rtol=1e-12, atol=1e-12)
    for a, b in zip(grads[1:], others[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


KEYS = [f"blocks.{i}.attn.qkv[{s}]" for i in range(2) for s in "qkv"] + [f"blocks.{i}.attn.proj" for i in range(2)]


@st.composite
def adapters(draw):
    """A config over both kinds of layers: ranks from none to full, scales, dtypes, heads and biases."""
    ranks = {key: draw(st.integers(0, 8)) for key in KEYS}
    ranks[draw(st.sampled_from(KEYS))] = draw(st.integers(1, 8))
    bias = draw(st.sampled_from(["none", "lora_only", "all"]))
    if (
        bias == "lora_only"
    ):  # a trained bias beside no adapter has no place in PEFT's files: ``save`` refuses it by name
        ranks |= {key: max(rank, 1) for key, rank in ranks.items()}
    alphas = {key: draw(st.sampled_from([0.5, 3, 8, 16])) for key in KEYS if ranks[key] and draw(st.booleans())}
    return fastlora.LoraConfig(
        r=draw(st.integers(1, 8)), lora_alpha=draw(st.sampled_from([1, 4.5, 16])), target_modules="attention",
        split_qkv=True,
        lora_dropout=draw(st.sampled_from([0.0, 0.1])), use_rslora=draw(st.booleans()), rank_pattern=ranks,
        alpha_pattern=alphas, scale=draw(st.sampled_from(["constant", "per_rank"])), init_lora_weights=False,
        adapter_dtype=draw(st.sampled_from([None, torch.float64, torch.bfloat16])),
        modules_to_save=draw(st.sampled_from([None, ["head"]])), bias=bias,
    )  # fmt: skip


def outputs(model):
    with torch.no_grad():
        return model.eval()(batch(0)[0])


@settings(max_examples=25, **SETTINGS)
@given(adapters(), st.booleans(), st.integers(0, 2**20))
def test_files_round_trip(config, fold, seed):
    """The loaded model computes the same with the same ranks and scales; saved again, the files say the same."""
    model = fastlora.inject(plain(), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / "first", Path(folder) / "second"
        fastlora.save(model, first, fold_scale=fold)
        other = fastlora.load(plain(), first)
        fastlora.save(other, second, fold_scale=fold)
        tensors, again = (load_file(f / "adapter_model.safetensors") for f in (first, second))
        configs = [json.loads((f / "adapter_config.json").read_text()) for f in (first, second)]
    mine, theirs = (fastlora.summary(m).rows for m in (model, other))
    kept = {row.key: row for row in theirs}
    for row in mine:
        assert (kept[row.key].rank if row.key in kept else 0) == row.rank, row
        if row.rank and not fold:
            assert kept[row.key].scale == pytest.approx(row.scale, rel=1e-9), row
    # Slices of unequal scales share one in the file, and B, multiplied by the quotient, is rounded once.
    tolerance = 3e-2 if config.adapter_dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(outputs(other), outputs(model), rtol=tolerance, atol=tolerance)
    assert tensors.keys() == again.keys()
    alphas = [{**c.pop("alpha_pattern"), "": c.pop("lora_alpha")} for c in configs]
    assert configs[0] == configs[1] and alphas[0] == pytest.approx(alphas[1], rel=1e-12)
    for key, tensor in tensors.items():
        torch.testing.assert_close(again[key], tensor, rtol=2 * torch.finfo(tensor.dtype).eps, atol=0)
