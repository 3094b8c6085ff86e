"""Adapted convolutions and embeddings: outputs, gradients and files as PEFT's, merging, several adapters."""

import copy
import importlib
import pathlib
import pickle
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.peft_help import TENSORS, peft
from torch import nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2TextScaledWordEmbedding

import fastlora
from fastlora.model.eject import eject
from fastlora.nn.linear import adapted_layers
from fastlora.nn.plain import is_scaled

KINDS = {
    "conv1d": lambda: (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 7)),
    "conv2d": lambda: (nn.Conv2d(4, 6, (3, 2), stride=2, padding=1), (2, 4, 7, 6)),
    "conv2d without bias": lambda: (nn.Conv2d(4, 6, 4, stride=4, bias=False), (2, 4, 8, 8)),
    "conv2d same": lambda: (nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 5, 5)),
    "conv2d in groups": lambda: (nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 5, 5)),
    "conv3d": lambda: (nn.Conv3d(4, 6, 2), (2, 4, 3, 4, 5)),
    "embedding": lambda: (nn.Embedding(9, 6), None),
    "embedding with padding": lambda: (nn.Embedding(9, 6, padding_idx=2, scale_grad_by_freq=True), None),
    "embedding times a number": lambda: (BartScaledWordEmbedding(9, 6, 2, embed_scale=2.5), None),
    "embedding times a buffer": lambda: (Gemma3TextScaledWordEmbedding(9, 6, 2, embed_scale=2.5), None),
}
SCALED = [kind for kind in KINDS if "times" in kind]
LAYER = dict(r=2, target_modules=["layer"])
UNMERGEABLE = ("conv2d in groups",)


class Around(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(6, 3)

    def forward(self, x):
        y = torch.tanh(self.layer(x))
        return self.head(y.flatten(2).mean(-1) if x.is_floating_point() else y)


def make(kind):
    torch.manual_seed(0)
    layer, _ = KINDS[kind]()
    return Around(layer).double()


def data(kind):
    generator = torch.Generator().manual_seed(4)
    shape = KINDS[kind]()[1]
    if shape is None:
        return torch.randint(0, 9, (2, 5), generator=generator)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def randomised(model, seed=1):
    """Every factor random, by PEFT's shapes, so that both libraries draw the same."""
    generator = torch.Generator().manual_seed(seed)
    for _, p in sorted((n, p) for n, p in model.named_parameters() if ".lora_" in n):
        p.data.copy_(torch.randn(p.numel(), generator=generator, dtype=p.dtype).view(p.shape) * 0.3)
    return model


def adapted(kind, **fields):
    return randomised(
        fastlora.inject(make(kind), fastlora.LoraConfig(**{"r": 2, "target_modules": ["layer"], **fields}))
    )


def by_peft(kind, **fields):
    return randomised(
        peft.get_peft_model(make(kind), peft.LoraConfig(**{"r": 2, "target_modules": ["layer"], **fields}))
    )


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
class TestAsPeft:
    def test_outputs_gradients_and_one_step(self, kind):
        ours, theirs, x = adapted(kind, lora_alpha=3), by_peft(kind, lora_alpha=3), data(kind)
        count = lambda m: sum(p.numel() for p in m.parameters() if p.requires_grad)  # noqa: E731
        assert count(ours) == count(theirs) == fastlora.summary(ours).adapter_params
        for model in (ours, theirs):
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
            model(x).square().sum().backward()
            optimizer.step()
        mine = [p.grad for n, p in sorted(ours.named_parameters()) if ".lora_" in n]
        its = [p.grad for n, p in sorted(theirs.named_parameters()) if ".lora_" in n]
        for a, b in zip(mine, its, strict=True):
            assert a.any()
            close(a, b.view(a.shape))
        close(ours(x), theirs(x))

    @pytest.mark.parametrize("init", [True, False, "gaussian"])
    def test_initial_factors(self, kind, init):
        drawn = []
        for library in (fastlora, peft):
            torch.manual_seed(7)
            config = library.LoraConfig(r=2, target_modules=["layer"], init_lora_weights=init)
            if library is fastlora:
                model = fastlora.inject(make(kind).float(), config)
            else:
                model = peft.get_peft_model(make(kind).float(), config)
            named = {
                n.split(".lora_")[1].removeprefix("embedding_"): p for n, p in model.named_parameters() if "lora_" in n
            }
            drawn.append([named[name] for name in sorted(named)])  # A, then B
        for a, b in zip(*drawn, strict=True):
            assert bool(a.any()) == bool(b.any()) and a.numel() == b.numel()
            assert float(a.std()) == pytest.approx(float(b.std()), rel=0.9)

    def test_files_both_ways(self, kind, tmp_path):
        theirs, x = by_peft(kind, lora_alpha=3), data(kind)
        theirs.save_pretrained(str(tmp_path / "theirs"))
        loaded = fastlora.load(make(kind), tmp_path / "theirs")
        close(loaded(x), theirs(x))
        fastlora.save(loaded, tmp_path / "ours")
        theirs_again = peft.PeftModel.from_pretrained(make(kind), str(tmp_path / "ours"))
        close(theirs_again(x), theirs(x))
        close(fastlora.load(make(kind), tmp_path / "ours")(x), theirs(x))
        saved, given = load_file(tmp_path / "ours" / TENSORS), load_file(tmp_path / "theirs" / TENSORS)
        assert {k: v.shape for k, v in saved.items()} == {k: v.shape for k, v in given.items() if ".lora_" in k}
        fastlora.save(loaded, tmp_path / "folded", fold_scale=True)
        close(fastlora.load(make(kind), tmp_path / "folded")(x), theirs(x))

    def test_conversion(self, kind):
        ours, x = adapted(kind), data(kind)
        close(fastlora.to_peft(ours)(x), ours(x))
        close(fastlora.from_peft(by_peft(kind))(x), ours(x))


@pytest.mark.parametrize("kind", KINDS)
class TestHere:
    def test_at_first_the_base(self, kind):
        model, x = make(kind), data(kind)
        before = model(x)
        close(fastlora.inject(model, fastlora.LoraConfig(r=2, target_modules=["layer"]))(x), before)

    def test_merge_and_unmerge(self, kind):
        model, x = adapted(kind), data(kind)
        before, weight = model(x), model.layer.weight.clone()
        if kind in UNMERGEABLE:
            with pytest.raises(ValueError, match="2 groups.* cannot be merged"):
                fastlora.merge(model)
            return
        close(fastlora.merge(model)(x), before)
        assert not torch.equal(model.layer.weight, weight)
        assert torch.equal(fastlora.unmerge(model).layer.weight, weight)
        close(model(x), before)

    def test_rows_of_several_adapters(self, kind):
        model, x = adapted(kind), data(kind)
        fastlora.add_adapter(model, "b", fastlora.LoraConfig(r=4, target_modules=["layer"]))
        randomised(model, seed=2)
        alone = []
        for name in ("default", "b"):
            with fastlora.use_adapters(model, name):
                alone.append(model(x))
        with fastlora.use_adapters(model, ["b", "default"]):
            mixed = model(x)
        close(mixed[0], alone[1][0])
        close(mixed[1], alone[0][1])
        with fastlora.use_adapters(model, ["b", None]):
            y = model(x)
        y.sum().backward()
        assert model.layer.lora_A.default.weight.grad is None and model.layer.lora_A.b.weight.grad.any()
        with fastlora.disable_adapters(model):
            close(model(x), make(kind)(x))
            close(y[1], model(x)[1])

    def test_ranks_and_eject(self, kind):
        model, x = make(kind), data(kind)
        before, names, classes = model(x), list(model.state_dict()), [type(m) for m in model.modules()]
        fastlora.inject(model, fastlora.LoraConfig(r=2, target_modules=["layer"]))
        fastlora.set_ranks(model, {"layer": 4})
        close(model(x), before)
        randomised(model)
        with pytest.raises(ValueError, match="has been trained"):
            fastlora.set_ranks(model, {"layer": 2})
        fastlora.set_ranks(model, {"layer": 0}, reinit=True)
        close(model(x), before)
        eject(model)
        assert list(model.state_dict()) == names and [type(m) for m in model.modules()] == classes
        close(model(x), before)

    def test_checkpointed_and_compiled(self, kind):
        model, x = adapted(kind), data(kind)
        plain = torch.autograd.grad(model(x).square().sum(), model.layer.lora_A.default.weight)[0]
        y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
        close(torch.autograd.grad(y.square().sum(), model.layer.lora_A.default.weight)[0], plain)
        close(torch.compile(model, backend="eager")(x), model(x))


def test_every_scaled_embedding_of_transformers_but_the_one_that_does_more():
    others, models = {}, pathlib.Path(transformers.__file__).parent / "models"
    for path in sorted(models.glob("*/modeling_*.py")):
        for name in re.findall(r"class (\w*Scaled\w+)\(nn.Embedding\)", path.read_text()):
            module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
            others[name] = not is_scaled(getattr(module, name)(3, 2, 0))
    assert len(others) > 20 and [name for name, other in others.items() if other] == ["T5Gemma2TextScaledWordEmbedding"]


class Twice(BartScaledWordEmbedding):
    """A further class between it and ``nn.Embedding``."""

    def forward(self, input_ids):
        return super().forward(input_ids) * self.embed_scale


@pytest.mark.parametrize("layer", [T5Gemma2TextScaledWordEmbedding(9, 6, 0), Twice(9, 6, 0)])
def test_no_other_scaled_embedding_is_adapted(layer):
    named = dict(r=2, target_modules=["head"], trainable_token_indices={"layer": [1]})
    for fields in (LAYER, named):
        with pytest.raises(ValueError, match=f"{type(layer).__name__}, no"):
            fastlora.inject(Around(layer), fastlora.LoraConfig(**fields))


def test_a_number_that_the_forward_does_not_read_is_no_scale():
    model, x = make("embedding"), data("embedding")
    model.layer.embed_scale = 3.0
    before = randomised(fastlora.inject(model, fastlora.LoraConfig(**LAYER)))(x)
    close(fastlora.merge(model)(x), before)


def test_a_scale_of_several_numbers_is_refused():
    layer = BartScaledWordEmbedding(9, 6, 0, embed_scale=torch.ones(6))
    with pytest.raises(ValueError, match="BartScaledWordEmbedding, not exactly"):
        fastlora.inject(Around(layer), fastlora.LoraConfig(**LAYER))


@pytest.mark.parametrize("kind", SCALED)
def test_copies_of_a_scaled_embedding(kind):
    model, x = adapted(kind), data(kind)
    original = type(make(kind).layer)
    assert isinstance(model.layer, original)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin.layer) is type(model.layer) and twin.layer.weight is not model.layer.weight
        close(twin(x), model(x))
        assert type(fastlora.unload(twin).layer) is original and "original" not in vars(twin.layer)
        close(twin(x), make(kind)(x))


@pytest.mark.parametrize("kind", SCALED)
def test_the_scale_is_rounded_as_the_base_rounds_it(kind):
    model, x = make(kind).bfloat16(), data(kind)
    model.layer.embed_scale = model.layer.embed_scale * 0 + 39.19  # 39.25 in bfloat16
    model = randomised(fastlora.inject(model, fastlora.LoraConfig(**LAYER)))
    with torch.no_grad():
        # The weight is zero, so that the update alone is there, in float32.
        model.layer.weight.zero_()
        unit = model.layer.delta("default")[x]
        torch.testing.assert_close(model.layer.update("default", x), unit * (39.25 if "buffer" in kind else 39.19))


@pytest.mark.parametrize("kind", ["conv2d", "embedding"])
def test_a_kept_rank_that_grows(kind):
    model, x = adapted(kind), data(kind)
    graph = model(x)
    with pytest.raises(ValueError, match="a forward of 'default' awaits its backward"):
        fastlora.set_ranks(model, {"layer": 4}, keep=True)
    before = graph.detach()
    del graph
    fastlora.set_ranks(model, {"layer": 4}, keep=True)
    close(model(x), before)
    model(x).square().sum().backward()
    A, B = model.layer.lora_A.default.weight.grad, model.layer.lora_B.default.weight.grad
    assert (A[2:] if kind == "embedding" else B[:, 2:]).any()  # the new part learns
    with pytest.raises(ValueError, match="keep: 'layer' is a convolution in groups"):
        fastlora.set_ranks(adapted("conv2d in groups"), {"layer": 4}, keep=True)


def test_dilation_and_padding_modes_are_the_base_s():
    """PEFT leaves both out of A; the update of the merged weight is what runs here."""
    for layer in (nn.Conv2d(4, 6, 3, dilation=2, padding=2), nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")):
        model = fastlora.inject(Around(layer).double(), fastlora.LoraConfig(r=2, target_modules=["layer"]))
        x = data("conv2d same")
        before = randomised(model)(x)
        close(fastlora.merge(model)(x), before)


def test_statistics_are_not_tracked(caplog):
    model = adapted("conv2d", target_modules=["layer", "head"])
    with fastlora.track(model, estimator="exact") as tracker:
        model(data("conv2d")).sum().backward()
        tracker.step()
    assert list(tracker.scores("grad_sq")) == ["head"]
    assert "not tracked, since they are no linears: layer" in caplog.text
    with pytest.raises(ValueError, match="'default' has no linear; statistics of other layers are not tracked"):
        fastlora.track(adapted("conv2d"))


@pytest.mark.parametrize(
    "layer, fields, says",
    [
        (nn.Conv2d(4, 6, 3, groups=2), dict(r=3), "rank of layer: expected a multiple of the convolution's groups"),
        (nn.Conv2d(4, 6, 3), dict(r=7), r"rank of layer: expected at most min\(in_features, out_features\) = 6"),
        (
            nn.ConvTranspose2d(4, 6, 3),
            {},
            "ConvTranspose2d, not exactly torch.nn.Linear, Conv1d, Conv2d, Conv3d, Embed",
        ),
        (nn.Embedding(9, 6, max_norm=1.0), {}, "an embedding with max_norm"),
        (nn.Embedding(9, 6, sparse=True), {}, "an embedding with max_norm or sparse gradients"),
    ],
)
def test_what_cannot_be_adapted(layer, fields, says):
    model = Around(layer)
    with pytest.raises(ValueError, match=says):
        fastlora.inject(model, fastlora.LoraConfig(**{"r": 2, "target_modules": ["layer"], **fields}))
    assert not adapted_layers(model)


def test_ids_of_tokens_in_a_convolution():
    model = adapted("conv2d")
    with pytest.raises(ValueError, match=r"ids: \(2, 7\) given, but a convolution takes one a sample \(2\)"):
        with fastlora.use_adapters(model, torch.zeros(2, 7, dtype=torch.int64)):
            model(data("conv2d"))


def test_dropout_of_a_convolution():
    model, x = adapted("conv2d", lora_dropout=0.5), data("conv2d")
    assert not torch.equal(model.train()(x), model(x))
    close(model.eval()(x), model(x))
    with pytest.raises(ValueError, match="row_seeds: expected None, or no dropout in a Conv2d"):
        with fastlora.use_adapters(model.train(), "default", row_seeds=torch.arange(2)):
            model(x)
