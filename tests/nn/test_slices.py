"""Slices of a fused matrix that interleave: outputs, gradients, statistics, merging, against a dense float64 model."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from support.helpers import config
from torch import nn

import fastlora
from fastlora.nn.adapter import Slices
from fastlora.ops import reference

HEADS, K, M = 3, 10, 14
PARTS = {"q": 4, "k": 2, "v": 3}  # rows of each head
N = HEADS * sum(PARTS.values())
SLICES = Slices({name: HEADS * rows for name, rows in PARTS.items()}, HEADS)


def rows_of(name):
    """Rows of a slice, counted one by one."""
    before = {"q": 0, "k": PARTS["q"], "v": PARTS["q"] + PARTS["k"]}[name]
    return [h * sum(PARTS.values()) + before + i for h in range(HEADS) for i in range(PARTS[name])]


def base(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(K, N), nn.Tanh(), nn.Linear(N, 3)).to(dtype)


def adapted(dtype=torch.float64, ranks=(2, 3, 1), seed=1, **fields):
    fields = {"target_modules": ["0"], "init_lora_weights": False, "split_qkv": {"0": SLICES}, **fields}
    fields["rank_pattern"] = {f"0[{name}]": r for name, r in zip(PARTS, ranks, strict=True)}
    torch.manual_seed(seed)
    return fastlora.inject(base(dtype), config(r=3, **fields))


def x_of(rows=M, dtype=torch.float64):
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)


def dense_weight(layer, adapter="default"):
    """W + s B A, each slice's rows put in place one slice after another."""
    weight = layer.weight.detach().double().clone()
    for name in PARTS:
        A, B = (getattr(side[adapter], name) for side in (layer.lora_A, layer.lora_B))
        if A is not None:
            s = layer.adapter_specs[adapter].scale[name]
            weight[rows_of(name)] += s * B.detach().double() @ A.detach().double()
    return weight


def dense(model, adapter="default"):
    plain = base()
    plain[0].weight = nn.Parameter(dense_weight(model[0], adapter))
    return plain


def test_rows_of_each_slice():
    for name in PARTS:
        assert SLICES.rows(name).tolist() == rows_of(name)
    assert Slices({"q": 2, "k": 3}).rows("k") == slice(2, 5)
    assert SLICES != dict(SLICES) and Slices({"q": 1}) == {"q": 1} and copy.deepcopy(SLICES) == SLICES


@pytest.mark.parametrize("backend", ["native", "eager", "reference"])
@pytest.mark.parametrize("ranks", [(2, 3, 1), (0, 2, 0), (3, 0, 1)])
@pytest.mark.parametrize("alphas", [{}, {"0[q]": 5.0, "0[v]": 0.5}])
def test_outputs_and_every_gradient(backend, ranks, alphas):
    dtype = torch.float64 if backend == "reference" else torch.float32
    model = adapted(dtype, ranks, backend=backend, alpha_pattern={k: v for k, v in alphas.items() if ranks[0]})
    layer, plain, x, twin = model[0], dense(model), x_of(dtype=dtype).requires_grad_(), x_of().requires_grad_()
    plain[0].weight.requires_grad_()
    y, expected = model(x), plain(twin)
    y.square().sum().backward()
    expected.square().sum().backward()
    close = dict(rtol=2e-4, atol=2e-5) if dtype == torch.float32 else dict(rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(y.double(), expected, **close)
    torch.testing.assert_close(x.grad.double(), twin.grad, **close)
    for name, r in zip(PARTS, ranks, strict=True):
        A, B = (getattr(side["default"], name) for side in (layer.lora_A, layer.lora_B))
        assert (A is None) is (r == 0)
        if r:
            G, s = plain[0].weight.grad[rows_of(name)], layer.adapter_specs["default"].scale[name]
            torch.testing.assert_close(A.grad.double(), s * B.detach().double().T @ G, **close)
            torch.testing.assert_close(B.grad.double(), s * G @ A.detach().double().T, **close)


def test_factors_that_change_are_seen_without_a_new_graph():
    model, x = adapted(), x_of()
    with torch.no_grad():
        model(x)
        model[0].lora_B["default"].k.mul_(2.0)
        torch.testing.assert_close(model(x), dense(model)(x))
    y = model(x)
    y.sum().backward()
    with torch.no_grad():
        for p in model[0].lora_A.parameters():
            p -= 0.1 * p.grad
    y = model(x)
    torch.testing.assert_close(y, dense(model)(x))
    y.sum().backward()


def test_merge_and_unmerge():
    model, x = adapted(), x_of()
    W, y = model[0].weight.detach().clone(), model(x).detach()
    torch.testing.assert_close(model[0].delta(), dense_weight(model[0]) - W)
    fastlora.merge(model)
    torch.testing.assert_close(model(x), y)
    fastlora.unmerge(model)
    assert torch.equal(model[0].weight, W)


def test_a_transposed_layer():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(N, K).double())
    plain, x = copy.deepcopy(model), x_of()
    fields = dict(target_modules=["0"], init_lora_weights=False, split_qkv={"0": SLICES})
    fastlora.inject(model, config(r=2, **fields))
    for name in PARTS:
        A, B = (getattr(side["default"], name).detach() for side in (model[0].lora_A, model[0].lora_B))
        plain[0].weight.data[:, rows_of(name)] += (model[0].adapter_specs["default"].scale[name] * B @ A).T
    y = model(x)
    torch.testing.assert_close(y, plain(x))
    y.square().sum().backward()
    plain(x).square().sum().backward()
    G, spec = plain[0].weight.grad.T[rows_of("k")], model[0].adapter_specs["default"]
    A = model[0].lora_A["default"].k.detach()
    torch.testing.assert_close(model[0].lora_B["default"].k.grad, spec.scale["k"] * G @ A.T)
    fastlora.merge(model)
    torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize("backend", ["native", "eager", "reference"])
@pytest.mark.parametrize("batched", [False, True])
def test_a_dropout_mask_of_its_own_for_each_slice(backend, batched):
    dtype, p = torch.float64 if backend == "reference" else torch.float32, 0.5
    model, x = adapted(dtype, lora_dropout=p, backend=backend), x_of(dtype=dtype).requires_grad_()
    layer, twin = model[0], x_of(dtype=dtype).double().requires_grad_()
    scope = fastlora.use_adapters(model, torch.zeros(M, dtype=torch.int64)) if batched else contextlib.nullcontext()
    torch.manual_seed(3)
    with scope:
        y = layer(x)
    torch.manual_seed(3)
    seed, wanted, factors = torch.randint(2**62, ()), nn.functional.linear(twin, *layer_of(layer)), []
    for stream, name in enumerate(PARTS):
        A, B = (getattr(side["default"], name).detach().double() for side in (layer.lora_A, layer.lora_B))
        factors += [A.requires_grad_(), B.requires_grad_()]
        update = layer.adapter_specs["default"].scale[name] * reference.dropout(twin, seed, stream, p) @ A.T @ B.T
        wanted = wanted.index_add(1, torch.tensor(rows_of(name)), update)
    close = dict(rtol=2e-4, atol=2e-5) if dtype == torch.float32 else dict(rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(y.double(), wanted, **close)
    y.square().sum().backward()
    wanted.square().sum().backward()
    found = [getattr(side["default"], name).grad for name in PARTS for side in (layer.lora_A, layer.lora_B)]
    for grad, own in zip([x.grad, *found], [twin.grad, *[f.grad for f in factors]], strict=True):
        torch.testing.assert_close(grad.double(), own, **close)


def layer_of(layer):
    return layer.weight.double(), layer.bias.double()


def test_several_adapters_in_one_batch():
    model, x = adapted(), x_of()
    torch.manual_seed(7)
    fields = dict(target_modules=["0"], init_lora_weights=False, split_qkv={"0": SLICES}, rank_pattern={"0[k]": 0})
    fastlora.add_adapter(model, "b", config(r=2, **fields))
    ids = torch.arange(M) % 3 - 1
    with fastlora.use_adapters(model, ids):
        y = model(x)
    y.square().sum().backward()
    for index, plain in ((-1, base()), (0, dense(model)), (1, dense(model, "b"))):
        plain[0].weight.requires_grad_()
        expected = plain(x[ids == index])
        torch.testing.assert_close(y[ids == index], expected)
        if index >= 0:
            expected.square().sum().backward()
            name, layer = fastlora.adapter_names(model)[index], model[0]
            G, s = plain[0].weight.grad[rows_of("v")], layer.adapter_specs[name].scale["v"]
            torch.testing.assert_close(layer.lora_B[name].v.grad, s * G @ layer.lora_A[name].v.detach().T)


def test_another_order_of_rows_for_a_second_adapter_is_refused():
    model = adapted()
    with pytest.raises(ValueError, match="split_qkv: '0' is adapted as"):
        fastlora.add_adapter(model, "b", config(r=2, target_modules=["0"], split_qkv={"0": dict(SLICES)}))


def gradient_of(model, x):
    plain = dense(model)
    plain[0].weight.requires_grad_()
    plain(x).square().sum().backward()
    return plain[0].weight.grad


@pytest.mark.parametrize("kinds", [("grad_sq", "act_var"), ("fisher",), ("grad_abs",)])
def test_exact_statistics_of_each_slice(kinds):
    model, x = adapted(), x_of()
    with fastlora.track(model, statistics=kinds, estimator="exact", loss_reduction="sum", ema=None) as tracker:
        model(x).square().sum().backward()
        tracker.step()
        found = {
            kind: tracker.scores(kind, reduce="sum" if kind in ("grad_sq", "fisher") else "mean") for kind in kinds
        }
    for name in PARTS:
        key, rows = f"0[{name}]", rows_of(name)
        G, y = gradient_of(model, x)[rows], dense(model)[0](x).detach()[:, rows]
        each = [gradient_of(model, row[None])[rows].square().sum() for row in x]
        wanted = {
            "grad_sq": G.square().sum(),
            "fisher": torch.stack(each).mean(),
            "grad_abs": G.abs().mean(),
            "act_var": y.var(0, unbiased=False).sum(),
        }
        for kind in kinds:
            assert found[kind][key] == pytest.approx(float(wanted[kind]), rel=1e-9)


@pytest.mark.parametrize("probe_kind", ["rademacher", "columns"])
@pytest.mark.parametrize("batched", [False, True])
def test_probes_estimate_each_slice(probe_kind, batched):
    model, x = adapted(), x_of()
    ids = torch.zeros(M, dtype=torch.int64)
    with fastlora.track(model, statistics=["grad_sq"], probes=64, probe_kind=probe_kind, ema=None) as tracker:
        for _ in range(40):
            with fastlora.use_adapters(model, ids) if batched else contextlib.nullcontext():
                model(x).square().sum().backward()
            tracker.step()
        found = tracker.scores("grad_sq", reduce="sum")
    for name in PARTS:
        assert found[f"0[{name}]"] == pytest.approx(float(gradient_of(model, x)[rows_of(name)].square().sum()), rel=0.1)


def test_norms_of_columns_are_of_each_slice():
    model, x = adapted(), x_of()
    with fastlora.track(model, statistics=["grad_sq"], probe_kind="columns", ema=None):
        kept, y = [], model[0](x)
        y.register_hook(kept.append)
        model[2](model[1](y)).square().sum().backward()
        for name, norms in model[0].probes["default"].norms.items():
            torch.testing.assert_close(norms.grad, kept[0][:, rows_of(name)].square().sum(1) @ x.square())


def test_under_compile_and_checkpointing():
    model, x = adapted(), x_of().requires_grad_()
    eager = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), eager)
    B = model[0].lora_B["default"].k
    (wanted,) = torch.autograd.grad(eager.square().sum(), B)
    (found,) = torch.autograd.grad(compiled(x).square().sum(), B)
    torch.testing.assert_close(found, wanted)
    for reentrant in (True, False):
        y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
        model.zero_grad()
        y.square().sum().backward()
        torch.testing.assert_close(B.grad, wanted)


@pytest.mark.parametrize(
    "split, why",
    [
        ({"0": {"q": 5, "k": 6}}, r"split_qkv\['0'\]: expected slices of the 27 rows"),
        ({"1": {"q": 27}}, "split_qkv: expected names of adapted modules"),
        ({"0": {}}, "split_qkv: expected one of"),
        ({"0": {"q": 0, "k": 27}}, r"split_qkv\['0'\]\['q'\]"),
        (3, "split_qkv"),
        *[
            ({"0": {name: 9, "k": 18}}, rf"split_qkv\['0'\]: expected names of slices without dots, .*, got {name!r}")
            for name in ("q.x", "", "magnitude", "train", "_parameters", "start_k", 3)
        ],
    ],
)
def test_slices_that_are_none(split, why):
    model = base()
    before = [type(m) for m in model.modules()]
    with pytest.raises((ValueError, TypeError), match=why):
        fastlora.inject(model, config(r=2, target_modules=["0"], split_qkv=split))
    assert [type(m) for m in model.modules()] == before


def test_a_conv1d_that_is_made_by_its_arguments():
    layer = fastlora.nn.Conv1D(8, 6, r=2, init_lora_weights=False, dtype=torch.float64)
    x, (A, B, s) = torch.randn(3, 8, dtype=torch.float64), layer.pairs()[0]
    assert layer.weight.shape == (8, 6) and layer.weight.is_contiguous() and not layer.weight.requires_grad
    torch.testing.assert_close(layer(x), x @ layer.weight + layer.bias + s * x @ A.t() @ B.t())
