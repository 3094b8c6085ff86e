"""Quantized bases of torchao and bitsandbytes: their own forward and backward, our adapters, statistics, merging.

References are the dequantized weight's, in float64.
"""

from __future__ import annotations

import copy
import logging
import pathlib
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from support.helpers import config, randomise
from support.model_zoo import ZOO
from support.model_zoo import build as zoo
from support.quantized_help import EVERY, QUANTISED, K, N, adapted, by_bitsandbytes, by_torchao, inputs, make, plain
from torch import nn

import fastlora
from fastlora.model.eject import eject
from fastlora.nn import quantized as requantizing
from fastlora.nn.linear import adapted_layers
from fastlora.nn.quantized import QuantizedLinear

pytestmark = pytest.mark.filterwarnings("ignore")


def reference(model, weights, x, adapter="default"):
    """Output, dx and gradients of every factor in float64, of the sum of squares; dy of each layer."""
    x = x.double().requires_grad_()
    y, leaves, outputs, seen = x, {}, [], []
    for i, W in zip((0, 2), weights, strict=True):
        layer = model[i]
        seen.append(y)
        a, b, s = layer.pairs(adapter)[0]
        a, b = a.detach().double().requires_grad_(), b.detach().double().requires_grad_()
        leaves |= {f"{i}.lora_A.{adapter}.weight": a, f"{i}.lora_B.{adapter}.weight": b}
        y = F.linear(y, W, layer.bias.detach().double()) + s * y @ a.t() @ b.t()
        outputs.append(y)
        y = F.gelu(y) if i == 0 else y
    dy = torch.autograd.grad(y.square().sum(), outputs, retain_graph=True)
    y.square().sum().backward()
    return y.detach(), x.grad, {n: t.grad for n, t in leaves.items()}, [t.detach() for t in seen], outputs, dy


def assert_near(mine, exact, of=2e-4):
    """Sums of up to 64 products in fp32, which the libraries round once more."""
    assert (mine.double() - exact).abs().max() <= of * exact.abs().max()


@EVERY
def test_forward_and_every_gradient(kind):
    model, weights = adapted(kind)
    x = inputs(3, 5, K).requires_grad_()
    y = model(x)
    y.square().sum().backward()
    exact, dx, grads, *_ = reference(model, weights, x.detach())
    assert_near(y.detach(), exact)
    assert_near(x.grad, dx)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name)
        if "lora_" in name:
            assert_near(parameter.grad, grads[name])


@EVERY
def test_outputs_are_the_base_s_at_first_and_when_off(kind):
    base = make(kind)
    x = inputs(4, K)
    with torch.no_grad():
        expected = base(x)
        model = fastlora.inject(copy.deepcopy(base), config(target_modules=["0", "2"]))
        assert torch.equal(model(x), expected)
        randomise(model)
        assert not torch.allclose(model(x), expected)
        with fastlora.disable_adapters(model):
            assert torch.equal(model(x), expected)
        assert torch.equal(eject(model)(x), expected)
    assert [type(m) for m in model] == [type(m) for m in base]


@EVERY
def test_statistics(kind):
    model, weights = adapted(kind)
    x = inputs(6, K)
    *_, seen, outputs, dy = reference(model, weights, x)
    with fastlora.track(model, statistics=("grad_sq", "act_var"), estimator="exact") as tracker:
        model(x).square().sum().backward()
        tracker.step()
        squares, variances = tracker.scores("grad_sq"), tracker.scores("act_var")
    for key, inp, out, g in zip(("0", "2"), seen, outputs, dy, strict=True):
        assert squares[key] == pytest.approx(float((g.t() @ inp).square().sum()), rel=1e-3)
        assert variances[key] == pytest.approx(float(out.var(0, correction=0).sum()), rel=1e-3)


@EVERY
def test_probes_read_the_gradient(kind):
    model, weights = adapted(kind)
    x = inputs(6, K)
    *_, seen, outputs, dy = reference(model, weights, x)
    with fastlora.track(model, statistics=("grad_sq",), every=1):
        model(x).square().sum().backward()
        for i, inp, g in zip((0, 2), seen, dy, strict=True):
            probe = model[i].probes["default"]
            assert_near(probe.Z["weight"].grad, g.t() @ inp @ probe.P.double().t())


@EVERY
def test_several_adapters_in_one_batch(kind):
    model, weights = adapted(kind)
    fastlora.add_adapter(model, "b", config(target_modules=["0", "2"], r=2))
    randomise(model)
    x, ids = inputs(5, K), torch.tensor([0, 1, -1, 1, 0])
    with fastlora.use_adapters(model, ids):
        y = model(x)
    for index, name in enumerate(("default", "b")):
        exact, *_ = reference(model, weights, x[ids == index], name)
        assert_near(y[ids == index].detach(), exact)
    with torch.no_grad(), fastlora.disable_adapters(model):
        torch.testing.assert_close(y[ids == -1].detach(), model(x[ids == -1]))


@EVERY
def test_copies_pickles_and_files(kind, tmp_path):
    model, _ = adapted(kind)
    x = inputs(4, K)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(copy.deepcopy(model)(x), expected)
        fastlora.save(model, tmp_path)
        assert torch.equal(fastlora.load(make(kind), tmp_path)(x), expected)
        if not kind.startswith("torchao"):  # torchao 0.18's own models do not come back from a pickle
            assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)


@EVERY
def test_to_peft(kind):
    peft = pytest.importorskip("peft")
    model, _ = adapted(kind)
    theirs = fastlora.to_peft(model)
    assert isinstance(theirs, peft.PeftModel)
    x = inputs(4, K)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), model(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(fastlora.from_peft(theirs)(x), model(x), rtol=1e-4, atol=1e-4)


@EVERY
def test_dropout_and_checkpointing(kind):
    from torch.utils.checkpoint import checkpoint

    model, _ = adapted(kind, lora_dropout=0.3)
    x, grads = inputs(4, K).requires_grad_(), []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        torch.manual_seed(3)
        model.zero_grad()
        run(x).square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(map(torch.equal, *grads))
    model.eval()
    assert not torch.equal(model(x), model.train()(x))


@pytest.mark.parametrize("family", ["bert", "llama", "timm_vit", "t5"])
def test_whole_models(family, tmp_path):
    """Siblings that share an input, and a fused q/k/v with a rank for each, against the dequantized model."""
    model = by_torchao(zoo(family))
    exact = copy.deepcopy(model)
    for module in exact.modules():
        if isinstance(module, nn.Linear) and type(module.weight) is not nn.Parameter:
            module.weight = nn.Parameter(module.weight.dequantize())
    fields = dict(target_modules="attention", split_qkv=family == "timm_vit")
    randomise(fastlora.inject(model, config(**fields)), 0.1)
    fastlora.save(model, tmp_path)
    fastlora.load(exact, tmp_path)
    outputs = []
    for each in (model, exact):
        outputs.append(ZOO[family].run(each))
        outputs[-1].square().sum().backward()
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4 * float(outputs[1].detach().abs().max()))
    for path, layer in adapted_layers(model).items():
        mine, theirs = (x.lora_A["default"]._parameters for x in (layer, adapted_layers(exact)[path]))
        for name, p in mine.items():
            torch.testing.assert_close(
                p.grad, theirs[name].grad, rtol=1e-3, atol=1e-3 * float(theirs[name].grad.abs().max())
            )


@EVERY
@pytest.mark.parametrize("probe_kind", ["rademacher", "columns"])
def test_compiled_without_a_graph_break(kind, probe_kind):
    torch._dynamo.reset()  # the kinds share a frame, and with it the limit of compilations
    model, _ = adapted(kind)
    x, found = inputs(6, K), []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        with fastlora.track(model, statistics=("grad_sq", "act_var"), every=1, probe_kind=probe_kind) as tracker:
            for _ in range(2):  # the first only shows columns their norms
                model.zero_grad()
                run(x).square().sum().backward()
                tracker.step()
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            found.append((grads, tracker.scores("grad_sq"), tracker.scores("act_var")))
    torch.testing.assert_close(found[1], found[0])


def test_bf16_and_autocast():
    model, weights = adapted("torchao int8")
    x = inputs(4, K)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
        assert y.dtype == make("torchao int8")(x).dtype
    exact, *_ = reference(model, weights, x)
    assert_near(y.detach(), exact, of=2**-5)  # a few roundings to bf16, of 2^-9 each
    low = randomise(fastlora.inject(make("torchao int8", torch.bfloat16), config(target_modules=["0"])))
    assert low(x.bfloat16()).dtype == torch.bfloat16
    assert fastlora.explain(low).rows[0].backend in ("native", "eager")


@EVERY
def test_training_goes_on_after_an_evaluation(kind):
    """bitsandbytes packs a 4-bit weight for inference on CPUs with bf16 instructions, and has no derivative then."""
    layer, found = adapted(kind)[0][0], []
    for _ in range(2):
        layer.zero_grad()
        x = inputs(4, K).requires_grad_()
        layer.train()(x).square().sum().backward()
        found.append([x.grad, layer.lora_A["default"].weight.grad.clone(), layer.lora_B["default"].weight.grad.clone()])
        with torch.no_grad():
            layer.eval()(inputs(4, K))
    packed = getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False)
    for before, after in zip(*found, strict=True):
        assert_near(after, before.double(), of=2**-5 if packed else 0.0)  # a few roundings to bf16, of 2^-9 each


def test_dx_of_an_int4_base_by_blocks_of_unit_vectors(monkeypatch):
    model, weights = adapted("torchao int4")
    for units in (1, 24, 1024):
        monkeypatch.setattr(requantizing, "_UNITS", units)
        x = inputs(3, K).requires_grad_()
        model(x).square().sum().backward()
        assert_near(x.grad, reference(model, weights, x.detach())[1])


@pytest.mark.parametrize("packing", ["plain", "preshuffled", "plain_int32", "tile_packed_to_4d"])
def test_int4_layouts_of_other_devices(packing):
    """torchao 0.18 has them for GPUs and the like; its layout for CPUs is "torchao int4" above."""
    pytest.importorskip("torchao")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = nn.Sequential(nn.Linear(256, 256)).to(device, torch.bfloat16)
    try:
        by_torchao(model, "Int4WeightOnlyConfig", group_size=128, int4_packing_format=packing)
        model(torch.zeros(1, 256, dtype=torch.bfloat16, device=device))
    except (ImportError, NotImplementedError, AssertionError, RuntimeError) as error:
        pytest.skip(f"torchao has no {packing} layout on this {device}: {error}")
    with torch.no_grad():
        W = (model(torch.eye(256, dtype=torch.bfloat16, device=device)) - model[0].bias).t().float()
    randomise(fastlora.inject(model, config(target_modules=["0"], r=4)))
    x = torch.randn(8, 256, dtype=torch.bfloat16, device=device).requires_grad_()
    model(x).sum().backward()
    expected = (W + model[0].delta()).sum(0).expand(8, -1)
    assert_near(x.grad.float(), expected.double(), of=2**-5)


@EVERY
def test_said_and_refused_by_name(kind):
    model, _ = adapted(kind)
    assert all(isinstance(layer, QuantizedLinear) for layer in adapted_layers(model).values())
    assert fastlora.summary(model).total_params == fastlora.summary(fastlora.inject(plain(), config(target_modules=["0", "2"], r=4))).total_params  # fmt: skip  # noqa: E501
    row = fastlora.explain(model).rows[0]
    assert row.engine.startswith(("torchao", "bitsandbytes")) and row.engine.endswith("'s own")
    before = {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, torch.Tensor) and "lora" in k}
    with pytest.raises(ValueError, match="model: '0' is quantized .(torchao|bitsandbytes) .*requantize=True"):
        fastlora.merge(model)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    with pytest.raises(ValueError, match="backend: 'triton' multiplies by the weight itself"):
        fastlora.inject(make(kind), config(target_modules=["0"], backend="triton"))


def test_other_frozen_linears_stay():
    model = make("torchao int8")
    fastlora.inject(model, config(target_modules=["0"]), accelerate_frozen=True)
    assert type(model[2]) is nn.Linear
    model(inputs(4, K))


def test_the_page_runs(tmp_path, monkeypatch):
    pytest.importorskip("torchao")
    monkeypatch.chdir(tmp_path)
    page, names = pathlib.Path(fastlora.__file__).parent.parent / "docs" / "quantized.md", {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(block, str(page), "exec"), names)
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


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
def test_a_sum_that_was_made_in_inference_mode_takes_part_in_training(kind):
    model, _ = adapted(kind)
    with torch.inference_mode():
        fastlora.merge(model, requantize=True)
    x = torch.ones(2, K, requires_grad=True)
    model(x).sum().backward()


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


@EVERY
@pytest.mark.parametrize("fields", [dict(use_dora=True), dict(init_lora_weights="pissa"), dict(lora_bias=True)])
def test_what_takes_the_values_of_the_weight_is_refused(kind, fields):
    model = make(kind)
    before = [(name, type(module)) for name, module in model.named_modules()]
    state = {name: (p, p.requires_grad) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=f"{next(iter(fields))}: .*'0' is .*; leave it out by exclude_modules"):
        fastlora.inject(model, config(target_modules=["0", "2"], r=4, **fields))
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert all(p is state[n][0] and p.requires_grad is state[n][1] for n, p in model.named_parameters())


@EVERY
def test_starting_from_data_is_refused(kind):
    model, _ = adapted(kind)
    for layer in adapted_layers(model).values():
        nn.init.zeros_(layer.lora_B.default.weight)
    eye = {path: torch.eye(layer.in_features) for path, layer in adapted_layers(model).items()}
    with pytest.raises(ValueError, match="'0' is .*, and initialize_corda takes parts of plain linears"):
        fastlora.initialize_corda(model, eye)
    with pytest.raises(ValueError, match="'0' is .*, and initialize_lora_ga takes parts of plain linears"):
        fastlora.initialize_lora_ga(model, [inputs(3, 5, K)], lambda m, x: m(x).sum(), steps=1)
