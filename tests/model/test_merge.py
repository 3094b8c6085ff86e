"""Merging into the frozen weights and back, and switching adapters off."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from support.helpers import FAMILIES, config, lora_grads, randomise
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastlora
from fastlora.nn.linear import adapted_layers


def snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_unchanged(model, before):
    after = model.state_dict()
    assert list(after) == list(before)
    for key, value in after.items():
        assert value.view(torch.uint8).equal(before[key].view(torch.uint8)) if value.dim() else value == before[key]


@pytest.fixture(params=["timm_vit", "bert", "llama"])
def adapted(build, request):
    model = fastlora.inject(build(request.param), config(target_modules="all-linear", split_qkv=True))
    return randomise(model, 0.1), FAMILIES[request.param].run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_unmerge_restores_bit_for_bit(adapted, dtype):
    model, _ = adapted
    model.to(dtype)
    before = snapshot(model)
    assert fastlora.merge(model) is model
    assert all(not torch.equal(m.weight, before[f"{n}.weight"]) for n, m in adapted_layers(model).items())
    assert fastlora.unmerge(model) is model
    assert_unchanged(model, before)
    assert not any(m.merged or hasattr(m, "unmerged_weight") for m in adapted_layers(model).values())


def test_merged_forward_in_float64(adapted):
    model, run = adapted
    model.double()
    if not any(p.dtype == torch.float64 for p in model.parameters()):
        pytest.skip("the family keeps its dtype")
    with torch.no_grad():
        layer = next(iter(adapted_layers(model).values()))
        x = torch.randn(5, layer.in_features, dtype=torch.float64)
        before = layer(x)
        fastlora.merge(model)
        after = layer(x)
    assert (after - before).abs().max() <= 1e-12 * before.abs().max()
    assert not torch.equal(after, nn.functional.linear(x, layer.unmerged_weight, layer.bias))


def test_merged_model_equals_the_adapted_one(adapted):
    model, run = adapted
    with torch.no_grad():
        before = run(model)
        merged = run(fastlora.merge(model))
        torch.testing.assert_close(merged, before, rtol=1e-4, atol=1e-5)
        assert torch.equal(run(fastlora.unmerge(model)), before)


def test_bf16_is_rounded_once():
    layer = randomise(fastlora.nn.Linear(48, 40, r=4, dtype=torch.bfloat16), 0.1)
    exact = layer.weight.double() + layer.pairs()[0][2] * (
        layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    )
    fastlora.merge(layer)
    assert torch.equal(layer.weight, exact.float().bfloat16())
    assert (layer.weight.double() - exact).abs().max() <= 2**-8 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("entries", [1, 7 * 48, 2**17])
def test_blocks_of_rows_give_the_whole_sum(dtype, entries, monkeypatch):
    """A last block that is shorter, one row at a time, and a matrix that is one block."""
    monkeypatch.setattr(fastlora.nn.linear, "_MERGED_AT_ONCE", entries)
    layer = randomise(fastlora.nn.Linear(48, 40, r=4, lora_alpha=6, dtype=dtype), 0.1)
    a, b, s = layer.pairs()[0]
    exact = layer.weight.double() + s * b.double() @ a.double()
    # One rounding to the dtype, after sums of r + 1 terms in fp32.
    eps = torch.finfo(dtype).eps / 2 + (0 if dtype == torch.float64 else 6 * 2**-24)
    bound = (
        eps
        * (layer.weight.double().abs() + s * b.double().abs() @ a.double().abs())
        * (6 if dtype == torch.float64 else 1)
    )
    fastlora.merge(layer)
    assert layer.weight.dtype == dtype and bool(((layer.weight.double() - exact).abs() <= bound).all())


def test_slices_and_the_transposed_layout():
    from support.model_zoo import build as zoo

    model = randomise(fastlora.inject(zoo("gpt2"), config(target_modules="qkv", split_qkv=True, rank_pattern={"transformer.h.0.attn.c_attn[k]": 0})), 0.1)  # fmt: skip  # noqa: E501
    layers = adapted_layers(model)
    exact = {path: layer.weight + layer.delta() for path, layer in layers.items()}
    fastlora.merge(model)
    for path, layer in layers.items():
        torch.testing.assert_close(layer.weight, exact[path])


def test_repr_and_gradients_while_merged(adapted):
    model, run = adapted
    fastlora.merge(model)
    assert all("merged" in repr(m) for m in adapted_layers(model).values())
    assert not run(model).requires_grad
    fastlora.unmerge(model)
    run(model).sum().backward()
    assert all(g is not None for g in lora_grads(model).values())


def test_a_merged_copy_unmerges_on_its_own(adapted):
    model, _ = adapted
    before = snapshot(model)
    fastlora.merge(model)
    other = copy.deepcopy(model)
    fastlora.unmerge(other)
    assert_unchanged(other, before)
    assert next(iter(adapted_layers(model).values())).merged


class TestProgress:
    def test_a_callable_sees_every_layer(self, adapted):
        model, _ = adapted
        seen, size = [], len(adapted_layers(model))
        fastlora.merge(model, progress=lambda done, wanted, _: seen.append((done, wanted)))
        assert seen == [(i, size) for i in range(1, size + 1)]

    @pytest.mark.parametrize("progress", [None, False])
    def test_logged_or_silent_where_nobody_looks(self, adapted, progress, caplog, capsys):
        model, _ = adapted
        with caplog.at_level(logging.INFO, "fastlora"):
            fastlora.merge(model, progress=progress)
        size = len(adapted_layers(model))
        said = [f"merge: {i} of {size} layers" for i in range(1, size + 1)]
        assert [record.getMessage() for record in caplog.records] == ([] if progress is False else said)
        assert not any(capsys.readouterr())

    def test_a_bar_on_request(self, adapted, capsys):
        pytest.importorskip("tqdm")
        fastlora.merge(adapted[0], progress=True)
        assert "merge: 100%" in capsys.readouterr().err

    def test_one_that_raises_leaves_the_model_as_it_was(self, adapted):
        model, _ = adapted
        before = snapshot(model)

        def stop(done, wanted, _):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fastlora.merge(model, progress=stop)
        assert_unchanged(model, before)


class TestErrorsChangeNothing:
    def test_merged_twice(self, adapted):
        model, _ = adapted
        fastlora.merge(model)
        before = snapshot(model)
        with pytest.raises(ValueError, match="is merged already"):
            fastlora.merge(model)
        assert_unchanged(model, before)

    def test_unmerged_twice(self, adapted):
        with pytest.raises(ValueError, match="nothing is merged"):
            fastlora.unmerge(adapted[0])

    def test_tied_between_adapted_layers(self):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        model[1].weight = model[0].weight
        randomise(fastlora.inject(model, config(target_modules=["0", "1"])))
        before = snapshot(model)
        with pytest.raises(ValueError, match="'0' and '1' share one weight and cannot be merged"):
            fastlora.merge(model)
        assert_unchanged(model, before)

    def test_tied_with_an_embedding(self):
        model = nn.ModuleDict({"embedding": nn.Embedding(10, 8), "out": nn.Linear(8, 10)})
        model["out"].weight = model["embedding"].weight
        randomise(fastlora.inject(model, config(target_modules=["out"])))
        before = snapshot(model)
        with pytest.raises(ValueError, match="'out' and 'embedding' share one weight"):
            fastlora.merge(model)
        assert_unchanged(model, before)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
    def test_a_delta_that_is_not_finite(self, adapted, bad):
        model, _ = adapted
        last = list(adapted_layers(model))[-1]
        with torch.no_grad():
            for b in adapted_layers(model)[last].lora_B["default"].parameters():
                b[0, 0] = bad
            for a in adapted_layers(model)[last].lora_A["default"].parameters():
                a[0, 0] = 1e10
        before = snapshot(model)
        with pytest.raises(ValueError, match=f"merging '{last}' gives weights that are not finite"):
            fastlora.merge(model)
        assert_unchanged(model, before)
        assert not any(m.merged for m in adapted_layers(model).values())

    def test_overflow_of_the_weight_s_dtype(self):
        layer = fastlora.nn.Linear(8, 8, r=2, dtype=torch.float16)
        with torch.no_grad():
            layer.lora_A["default"].weight.fill_(1e3)
            layer.lora_B["default"].weight.fill_(1e3)
        before = snapshot(layer)
        with pytest.raises(ValueError, match="not finite"):
            fastlora.merge(layer)
        assert_unchanged(layer, before)

    def test_a_bias_that_is_not_finite(self):
        made = config(target_modules=["0", "1"], lora_bias=True)
        model = randomise(fastlora.inject(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), made))
        with torch.no_grad():
            model[1].lora_B["default"].bias[0] = float("nan")
        before = snapshot(model)
        with pytest.raises(ValueError, match="merging '1' gives weights that are not finite"):
            fastlora.merge(model)
        assert_unchanged(model, before)

    def test_no_memory_and_then_another_try(self, adapted):
        """What a weight was is kept layer by layer; the last finds no memory for it."""
        model, run = adapted
        last = list(adapted_layers(model).values())[-1].weight
        before = snapshot(model)

        class NoMemory(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if func is torch.ops.aten.clone.default and args[0].data_ptr() == last.data_ptr():
                    raise torch.OutOfMemoryError
                return func(*args, **(kwargs or {}))

        with pytest.raises(torch.OutOfMemoryError), NoMemory():
            fastlora.merge(model)
        assert_unchanged(model, before)
        with torch.no_grad():
            expected = run(model)
            torch.testing.assert_close(run(fastlora.merge(model)), expected, rtol=1e-4, atol=1e-5)
        assert_unchanged(fastlora.unmerge(model), before)

    def test_unknown_adapter(self, adapted):
        with pytest.raises(ValueError, match=r"adapter: expected one of \['default'\], got 'b'"):
            fastlora.merge(adapted[0], "b")


class TestDisabled:
    def test_is_the_base_model(self, build):
        for name in ("timm_vit", "bert"):
            base, run = build(name), FAMILIES[name].run
            model = randomise(fastlora.inject(copy.deepcopy(base), config(target_modules="attention")))
            with torch.no_grad():
                before = run(model)
                with fastlora.disable_adapters(model) as inside:
                    assert inside is model and torch.equal(run(model), run(base))
                assert torch.equal(run(model), before) and not torch.equal(before, run(base))

    def test_nests_and_survives_exceptions(self, adapted):
        model, run = adapted
        with torch.no_grad():
            before = run(model)
            with pytest.raises(KeyError), fastlora.disable_adapters(model):
                with fastlora.disable_adapters(model):
                    off = run(model)
                assert torch.equal(run(model), off)
                raise KeyError
            assert torch.equal(run(model), before) and not torch.equal(off, before)


def test_a_weight_in_fp8_is_refused_whole():
    model = fastlora.inject(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), config(target_modules=["0", "1"]))
    model[1].weight.data = model[1].weight.data.to(torch.float8_e4m3fn)
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match="model: '1' is in float8_e4m3fn, to which the update would be rounded"):
        fastlora.merge(model)
    assert torch.equal(model[0].weight, before) and not model[0].merged
