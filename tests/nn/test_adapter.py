"""The operands of layers that run together: kept between calls, made anew when something is replaced or hooked."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch
from support.adapters_help import IDS, NAMES, batch, gradients, model
from torch.nn.utils import parametrize, prune

import fastlora
from fastlora import LoraConfig
from fastlora.nn import adapter
from fastlora.nn.adapter import Bundle


def run(m, ids=IDS, x=None):
    m.zero_grad()
    with fastlora.use_adapters(m, ids):
        y = m(batch() if x is None else x)
    y.square().sum().backward()
    return y, gradients(m)


def kept(m) -> Bundle:
    """The bundle of q, k and v of the first block, which run together."""
    bundles = [b for layers, b in m[0].query.group._bundles.items() if len(layers) == 3]
    return bundles[0] if bundles else Bundle()


def operands(m, names=NAMES):
    return kept(m).kept((m[0].query, m[0].key, m[0].value), names)


def ranks(m, names=NAMES) -> list[int]:
    return [a.shape[0] for a in operands(m, names).call.A]


def test_a_batch_lays_out_nothing_that_is_there_already():
    m = model()
    run(m)
    before = operands(m)
    for ids in (IDS, IDS.flip(0), torch.tensor([2, 2, 0, 0, -1, 0])):
        run(m, ids)
    assert operands(m) is before


@pytest.mark.parametrize("change", ["ranks", "scale", "weight", "factor", "dtype"])
def test_what_changes_is_noticed(change):
    m = model()
    y, _ = run(m)
    before, layer = operands(m), m[0].query
    if change == "ranks":
        fastlora.set_ranks(m, {"0.key": 5}, adapter="b", reinit=True)
        assert ranks(m) == [2, 2, 2, 3, 5, 3, 1, 0, 0]
    elif change == "scale":
        layer.rescale("b", {"weight": 7.0})
        assert operands(m).call.scale[3] == 7.0
    elif change == "weight":
        layer.weight = torch.nn.Parameter(2 * layer.weight.detach(), requires_grad=False)
        assert operands(m).call.W[0] is layer.weight
    elif change == "factor":
        layer.lora_A["b"].weight = torch.nn.Parameter(2 * layer.lora_A["b"].weight.detach())
        assert operands(m).call.A[3] is layer.lora_A["b"].weight
    else:
        m.to(torch.float32)
        assert operands(m).call.dtype is torch.float32
    assert operands(m) is not before


def test_adapters_come_and_go():
    m = model()
    run(m)
    fastlora.add_adapter(m, "d", LoraConfig(r=4, target_modules="qkv"))
    run(m, torch.tensor([0, 1, 2, 3, 3, -1]))
    assert ranks(m, ("d",)) == [4, 4, 4]
    fastlora.delete_adapter(m, "b")
    run(m, torch.tensor([0, 2, 2, 3, 3, -1]))
    assert ranks(m, ("b",)) == [0, 0, 0]


def test_a_bundle_is_bounded():
    m = model()
    run(m)
    for i in range(100):
        operands(m, (f"absent {i}",))
    assert len(kept(m)._kept) <= 16 and ranks(m) == [2, 2, 2, 3, 3, 3, 1, 0, 0]


def test_scales_follow_a_file(tmp_path):
    """A loaded adapter may have another scale than the one before."""
    m, other = model(torch.float32), model(torch.float32)
    x = batch(torch.float32)
    fastlora.delete_adapter(other, "b")
    fastlora.add_adapter(
        other, "b", LoraConfig(r=3, lora_alpha=30, target_modules="attention", init_lora_weights=False)
    )
    fastlora.save(other, tmp_path, adapter="b")
    ids = torch.ones(6, dtype=torch.int64)
    run(m, ids, x)
    fastlora.load(m, tmp_path, adapter="b")
    y, _ = run(m, ids, x)
    with fastlora.use_adapters(other, "b"):
        torch.testing.assert_close(y, other(x))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_have_their_own(again):
    m = model()
    y, _ = run(m)
    other = again(m)
    assert not other[0].query.group._bundles and other[0].query.bundle is None
    with torch.no_grad():
        for parameter in other[0].query.lora_B["b"].parameters():
            parameter.zero_()
    assert not torch.allclose(run(other)[0], y)
    assert other[0].query.group.layers == [other[0].query, other[0].key, other[0].value]


def test_parameters_are_read_at_every_call():
    """``functional_call`` puts other tensors in their place."""
    m, x = model(), batch()
    y, _ = run(m)
    name = "0.query.lora_B.b.weight"
    doubled = {name: 2 * dict(m.named_parameters())[name].detach()}
    with fastlora.use_adapters(m, IDS):
        other = torch.func.functional_call(m, doubled, (x,))
    assert torch.equal(run(m)[0], y) and not torch.allclose(other[IDS == 1], y[IDS == 1])
    assert torch.equal(other[IDS != 1], y[IDS != 1])


def test_factors_that_do_not_fit_are_named():
    m = model()
    run(m)
    m[0].query.lora_A["b"].weight = torch.nn.Parameter(torch.zeros(5, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"adapter 'b': expected factors .* got \(5, 8\) on cpu and \(8, 3\) on cpu"):
        run(m)


ANOTHER_SHAPE = {
    "fewer rows of B": ("lora_B", lambda b: b[:5].clone()),
    "one row of B": ("lora_B", lambda b: b[:1].clone()),
    "more rows of B": ("lora_B", lambda b: torch.cat([b, b])),
    "a flat B": ("lora_B", lambda b: b.flatten()),
    "fewer columns of A": ("lora_A", lambda a: a[:, :5].clone()),
    "one column of A": ("lora_A", lambda a: a[:, :1].clone()),
    "another rank of A": ("lora_A", lambda a: torch.cat([a, a])),
}


@pytest.mark.parametrize("in_cpp", [True, False])
@pytest.mark.parametrize("backend", ["auto", "eager", "reference"])
@pytest.mark.parametrize("change", ANOTHER_SHAPE)
def test_a_factor_that_gets_another_shape_by_its_data_is_named(change, backend, in_cpp, monkeypatch):
    """The parameter is the same object, and what was worked out from its shape is not right any more."""
    if not in_cpp:
        monkeypatch.setattr(adapter, "NODE", None)
    side, changed = ANOTHER_SHAPE[change]
    torch.manual_seed(0)
    m = torch.nn.ModuleDict({"linear": torch.nn.Linear(8, 6), "words": torch.nn.Embedding(8, 6)})
    config = LoraConfig(r=2, target_modules=["linear", "words"], init_lora_weights=False, backend=backend)
    fastlora.inject(m, config)
    inputs = {"linear": torch.randn(3, 8), "words": torch.tensor([0, 4, 7])}
    for name, x in inputs.items():
        layer = m[name]
        for _ in range(3):
            layer(x).sum().backward()
        factor = getattr(layer, side)["default"].weight
        factor.data = changed(factor.data)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"expected factors A \[r, 8\] and B \[6, r\] of slice 'weight'"):
                layer(x)


def test_factors_of_another_rank_and_dtype_by_their_data():
    m = model()
    run(m)
    for block in m[:2]:
        A, B = block.query.lora_A["b"].weight, block.query.lora_B["b"].weight
        A.data, B.data = torch.randn(5, 8), torch.randn(8, 5)
    other = model()
    for block, plain in zip(m[:2], other[:2], strict=True):
        for side in ("lora_A", "lora_B"):
            data = getattr(block.query, side)["b"].weight.detach().double()
            getattr(plain.query, side)["b"].weight = torch.nn.Parameter(data)
    for got, want in zip(run(m), run(other), strict=True):
        torch.testing.assert_close(got, want, check_dtype=False, rtol=1e-5, atol=1e-5)


def test_factors_elsewhere_than_the_weight_are_named():
    m = model()
    m[0].query.lora_A["b"].to("meta")
    with pytest.raises(ValueError, match=r"adapter 'b': .* on cpu, where the weight is; got \(3, 8\) on meta"):
        run(m)


def test_hooks_on_factors_run():
    """As an offloading library would have them: the factors are what a call of their module gives."""
    m = model()
    y, _ = run(m)
    calls = []
    hook = (
        m[0]
        .query.lora_B["b"]
        .register_forward_hook(lambda module, args, out: (calls.append(1), {k: 2 * b for k, b in out.items()})[1])
    )
    other, _ = run(m)
    assert calls and not torch.allclose(other[IDS == 1], y[IDS == 1]) and torch.equal(other[IDS != 1], y[IDS != 1])
    hook.remove()
    assert torch.equal(run(m)[0], y)


def test_pruned_and_parametrized_factors():
    m = model()
    y, _ = run(m)
    factors = m[0].query.lora_B["b"]
    prune.l1_unstructured(factors, "weight", amount=0.5)
    pruned, _ = run(m)
    assert not torch.allclose(pruned[IDS == 1], y[IDS == 1])
    want = (factors.weight_orig * factors.weight_mask).detach()
    prune.remove(factors, "weight")
    assert torch.equal(run(m)[0], pruned) and torch.equal(factors.weight, want)
    parametrize.register_parametrization(factors, "weight", Doubled())
    doubled, grads = run(m)
    assert not torch.allclose(doubled[IDS == 1], pruned[IDS == 1])
    assert grads["0.query.lora_B.b.parametrizations.weight.original"].any()


class Doubled(torch.nn.Module):
    def forward(self, factor):
        return 2 * factor


def test_rank_zero_and_adapters_of_some_layers():
    m = model()
    fastlora.set_ranks(m, {"0.key": 0}, adapter="b", reinit=True)
    run(m)
    call = operands(m).call
    assert [a.shape[0] for a in call.A] == [2, 2, 2, 3, 0, 3, 1, 0, 0]
    assert call.layout.starts == [0, 2, 4, 6, 0, 3, 3, 6, 0, 1, 1, 1]


@pytest.mark.parametrize("ids", [None, torch.tensor([0, -1, 0])])
@pytest.mark.parametrize("with_bias", [False, True])
def test_what_is_kept_in_inference_mode_trains_afterwards(ids, with_bias):
    torch.manual_seed(0)
    split = {"split_qkv": {"0": {"q": 3, "k": 3, "v": 3}}, "rank_pattern": {"0[k]": 0}}
    m = torch.nn.Sequential(torch.nn.Linear(6, 9))
    fastlora.inject(m, LoraConfig(r=2, target_modules=["0"], **({"lora_bias": True} if with_bias else split)))
    x = torch.randn(3, 2, 6)
    with contextlib.nullcontext() if ids is None else fastlora.use_adapters(m, ids):
        with torch.inference_mode():
            y = m(x)
        again = m(x)
    again.square().sum().backward()
    assert torch.equal(again, y) and m[0].lora_B.default.get_parameter("bias" if with_bias else "q").grad.abs().sum()
