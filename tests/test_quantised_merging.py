"""Merging into a quantized base: on request, quantized anew by the library's own rule, or not at all."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from helpers import config, randomise
from quantised_help import EVERY, QUANTISED, K, N, adapted, by_bitsandbytes, by_torchao, inputs, make, plain

import fastlora
from fastlora.nn import quantized as requantizing
from fastlora.nn.linear import adapted_layers

pytestmark = pytest.mark.filterwarnings("ignore")


def outputs(model):
    """Of each layer on its own for every unit vector: what it multiplies by, plus the bias."""
    with torch.no_grad():
        return [model[i](torch.eye(K if i == 0 else N)) for i in (0, 2)]


def fresh(kind, weights):
    """The library's quantisation of other weights, by its public way."""
    model = plain()
    with torch.no_grad():
        for i, W in zip((0, 2), weights, strict=True):
            model[i].weight.copy_(W)
    return QUANTISED[kind](model)


@EVERY
def test_the_sum_is_quantised_as_the_library_would(kind, caplog):
    model, weights = adapted(kind)
    sums = [W + model[i].delta().double() for i, W in zip((0, 2), weights, strict=True)]
    with caplog.at_level(logging.WARNING, "fastlora"):
        assert fastlora.merge(model, requantize=True) is model
    assert [type(model[i].weight) for i in (0, 2)] == [type(make(kind)[i].weight) for i in (0, 2)]
    for mine, theirs, exact, layer in zip(outputs(model), outputs(fresh(kind, sums)), sums, model[::2], strict=True):
        # What the base multiplied by is known to the rounding of fp32 (8-bit: fp16), so a few entries fall on the
        # other side of a step; the steps are those of the library.
        worst = (theirs.t() - layer.bias[:, None] - exact).abs().max()
        assert ((mine - theirs).abs() > 1e-4 * theirs.abs().max()).float().mean() < 0.02
        assert (mine.t() - layer.bias[:, None] - exact).abs().max() <= 1.5 * worst
    (said,) = [record.getMessage() for record in caplog.records if record.name == "fastlora.model.merge"]
    assert said.startswith("merge: rounding to the quantized grid moved the merged weight of '")


@EVERY
def test_forward_is_the_base_s_alone_and_unmerge_gives_all_back(kind):
    model, _ = adapted(kind)
    x = inputs(4, K)
    with torch.no_grad():
        before = model(x)
        weights = [model[i].weight for i in (0, 2)]
        fastlora.merge(model, requantize=True)
        merged = model(x)
        other = copy.deepcopy(model)
        assert not torch.equal(merged, before)
        # Closer to the adapted model than the base is: the update is in the weights.
        with fastlora.disable_adapters(fastlora.unmerge(copy.deepcopy(model))) as base:
            assert (merged - before).norm() < 0.5 * (base(x) - before).norm()
        assert torch.equal(other(x), merged)
        assert all(layer.merged == ("default",) for layer in adapted_layers(model).values())
        fastlora.unmerge(model)
        assert all(model[i].weight is w for i, w in zip((0, 2), weights, strict=True))
        assert torch.equal(model(x), before)
        assert torch.equal(fastlora.unmerge(other)(x), before)
    model(x).square().sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)


@EVERY
def test_state_dicts_of_a_merged_model_load_into_the_plain_one(kind):
    """A merged base is the library's own: its files are what that library writes."""
    model, _ = adapted(kind)
    fastlora.merge(model, requantize=True)
    x = inputs(4, K)
    state = {key: value for key, value in model.state_dict().items() if "lora_" not in key}
    assert state.keys() == make(kind).state_dict().keys()
    if not kind.startswith("torchao"):
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


def test_no_rank_no_change():
    model = fastlora.inject(make("torchao int8"), config(target_modules=["0", "2"], r=4, rank_pattern={"0": 0}))
    randomise(model)
    weight = model[0].weight
    fastlora.merge(model, requantize=True)
    assert model[0].weight is weight and model[0].merged and model[2].weight is not weight


def test_a_base_that_is_quantised_in_part():
    """Full-precision layers are merged as ever beside quantized ones."""
    torchao = pytest.importorskip("torchao.quantization")
    model = plain()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), filter_fn=lambda module, name: name == "0")
    randomise(fastlora.inject(model, config(target_modules=["0", "2"], r=4)))
    exact = model[2].weight + model[2].delta()
    fastlora.merge(model, requantize=True)
    torch.testing.assert_close(model[2].weight, exact)
    assert type(model[0].weight).__name__ == "Int8Tensor"


def test_int8_of_activations_and_of_whole_tensors_keeps_its_settings():
    granularity = pytest.importorskip("torchao.quantization.granularity")
    for name, fields in (
        ("Int8WeightOnlyConfig", dict(granularity=granularity.PerTensor())),
        ("Int8DynamicActivationInt8WeightConfig", {}),
    ):
        model = by_torchao(plain(), name, **fields)
        before = model[0].weight
        randomise(fastlora.inject(model, config(target_modules=["0"], r=4)))
        fastlora.merge(model, requantize=True)
        after = model[0].weight
        assert after is not before and after.block_size == before.block_size
        assert after.act_quant_kwargs == before.act_quant_kwargs and after.scale.shape == before.scale.shape


@pytest.mark.parametrize(
    "kind, fields",
    [
        ("Linear8bitLt", dict(has_fp16_weights=True)),  # quantized anew at every forward
        ("Linear8bitLt", dict(has_fp16_weights=False, threshold=6.0)),
        ("Linear4bit", dict(quant_type="nf4", compute_dtype=torch.float32, compress_statistics=True)),
        ("Linear4bit", dict(quant_type="fp4", compute_dtype=torch.float32, quant_storage=torch.float32)),
    ],
)
def test_other_settings_of_bitsandbytes(kind, fields):
    """Also after an evaluation, for which a CPU packs 4-bit weights."""
    layer = by_bitsandbytes(plain(), kind, **fields)[0]
    model, x = torch.nn.Sequential(layer), inputs(4, K)
    randomise(fastlora.inject(model, config(target_modules=["0"], r=4)))
    exact = requantizing.dequantized(layer) + layer.delta()
    with torch.no_grad():
        model.eval()(x)
        before, stored = model(x), layer.weight.data.clone()
        fastlora.merge(model, requantize=True)
        # Half of the widest step, 1/3 of the largest value in fp4 and 1/127 in int8, and the rounding of what it is
        # made from: 4-bit scales of 8 bits, fp16 before int8.
        half = 1 / 6 + 2**-9 if kind == "Linear4bit" else 1 / 254 + 2**-11
        assert (requantizing.dequantized(layer) - exact).abs().max() <= half * exact.abs().max()
        torch.testing.assert_close(model(x), x @ requantizing.dequantized(layer).t() + layer.bias, rtol=0.05, atol=0.05)
        fastlora.unmerge(model)
        assert torch.equal(model(x), before) and torch.equal(layer.weight.data, stored)


class TestErrorsChangeNothing:
    def refused(self, model, match):
        expected, kept = outputs(model), [model[i].weight for i in (0, 2)]
        with pytest.raises(ValueError, match=match):
            fastlora.merge(model, requantize=True)
        assert all(
            torch.equal(mine, was) or not was.isfinite().all()
            for mine, was in zip(outputs(model), expected, strict=True)
        )
        assert all(model[i].weight is w for i, w in zip((0, 2), kept, strict=True))
        assert not any(layer.merged for layer in adapted_layers(model).values())

    @EVERY
    def test_a_delta_that_is_not_finite(self, kind):
        model, _ = adapted(kind)
        with torch.no_grad():
            model[2].lora_B["default"].weight[0, 0] = torch.inf
        self.refused(model, "model: merging '2' gives weights that are not finite")

    def test_a_sum_that_fp16_cannot_hold(self):
        model, _ = adapted("8-bit")
        with torch.no_grad():
            model[2].lora_B["default"].weight.fill_(1e4)
            model[2].lora_A["default"].weight.fill_(1e4)
        self.refused(model, "model: merging '2' gives weights that are not finite")

    def test_a_kind_that_cannot_be_made_anew(self, monkeypatch):
        model, _ = adapted("torchao int8")
        monkeypatch.setattr(requantizing, "_KINDS", {"Params4bit": None})
        self.refused(model, "model: '0': a Int8Tensor cannot be quantized anew here, only Params4bit")

    def test_merged_twice(self):
        model, _ = adapted("torchao int8")
        fastlora.merge(model, requantize=True)
        weight = model[0].weight
        with pytest.raises(ValueError, match="model: '0' is merged already"):
            fastlora.merge(model, requantize=True)
        assert model[0].weight is weight
