"""``MultiheadAttention`` and the encoder layer: every option of torch's modules, statistics, several adapters."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict

import pytest
import torch
from support.attention_help import OPTIONS, E, H, arguments, mask_2d, outputs, pair, random, run
from support.helpers import config, lora_grads, randomise
from support.model_zoo import assert_as_exact, build, reference
from torch import nn

import fastlora
from fastlora.nn.attention import InProjection
from fastlora.nn.linear import adapted_layers


def check(base, model, call):
    """Output and every gradient against float64, and the base's output at B = 0."""
    exact, exact_grads = reference(base, model, call)
    plain, plain_grads = reference(base, model, call, torch.float32)
    model.zero_grad()
    y = call(model)
    assert_as_exact(y.detach(), plain, exact)
    y.square().sum().backward()
    for key, grad in lora_grads(model).items():
        assert grad is not None, key
        assert_as_exact(grad, plain_grads[key], exact_grads[key], key)
    with torch.no_grad():
        expected = call(base)
        with fastlora.disable_adapters(model):
            torch.testing.assert_close(call(model), expected)
        assert not torch.allclose(call(model), expected, rtol=1e-3)
        torch.testing.assert_close(call(model), y.detach())


class TestOptions:
    @pytest.mark.parametrize("which", ["self", "cross", "apart", "odd"])
    @pytest.mark.parametrize("options", OPTIONS)
    def test_inputs(self, options, which):
        given = OPTIONS[options]
        base, model = pair(**given)
        for need_weights in (False, True):
            check(base, model, run(which, given.get("batch_first", False), need_weights=need_weights))

    @pytest.mark.parametrize("target", ["qkv", ["attn"], ["in_proj"], ["out_proj"]])
    @pytest.mark.parametrize("which", ["self", "cross", "apart"])
    def test_what_is_adapted(self, target, which):
        check(*pair(target, batch_first=True), run(which, True))

    @pytest.mark.parametrize("which", ["self", "cross"])
    @pytest.mark.parametrize("kind", [bool, float])
    @pytest.mark.parametrize("options", ["plain", "batch_first", "both"])
    def test_masks(self, which, kind, options):
        given = OPTIONS[options]
        base, model = pair(**given)
        source = 5 if which == "self" else 7
        mask, padding = mask_2d(kind, 5, source), torch.zeros(3, source, dtype=torch.bool)
        padding[1, -2:] = True
        padding = padding if kind is bool else torch.zeros(3, source).masked_fill(padding, -torch.inf)
        per_head = torch.stack([mask.roll(-i, 1) if kind is float else mask for i in range(3 * H)])
        for masks in ({"mask": mask}, {"padding": padding}, {"mask": mask, "padding": padding}, {"mask": per_head}):
            for need_weights in (False, True):
                check(base, model, run(which, given.get("batch_first", False), **masks, need_weights=need_weights))

    def test_weights_of_every_head(self):
        base, model = pair(batch_first=True)
        check(base, model, run("cross", True, need_weights=True, average_attn_weights=False))
        y, weights = model(*arguments("cross", True, torch.float32), average_attn_weights=False)
        assert weights.shape == (3, H, 5, 7)

    def test_the_causal_hint(self):
        base, model = pair(batch_first=True)
        for need_weights in (False, True):
            check(base, model, run("self", True, mask_2d(bool, 5, 5), need_weights=need_weights, is_causal=True))

    @pytest.mark.parametrize("batch_first", [False, True])
    def test_one_sample_without_its_dimension(self, batch_first):
        base, model = pair(batch_first=batch_first)

        def call(module):
            dtype = module.attn.in_proj_weight.dtype
            query, key = random(5, E, dtype=dtype), random(7, E, dtype=dtype)
            padding = torch.arange(7) > 4
            return outputs(module, (query, key, key), key_padding_mask=padding)

        check(base, model, call)
        for need_weights in (True, False):
            for mine, theirs in zip(
                model(random(5, E).float(), *[random(7, E).float()] * 2, need_weights=need_weights),
                base(random(5, E).float(), *[random(7, E).float()] * 2, need_weights=need_weights),
                strict=True,
            ):
                assert (mine is None) == (theirs is None) and (mine is None or mine.shape == theirs.shape)

    def test_dropout_only_in_training(self):
        base, model = pair(dropout=0.5, batch_first=True)
        call = run("self", True)
        assert torch.equal(call(model), call(model))
        model.train()
        assert not torch.equal(call(model), call(model))
        torch.manual_seed(1)
        first, weights = model(*arguments("self", True, torch.float32))
        assert (weights == 0).any()

    def test_separate_weights_take_an_output_adapter(self):
        base, model = pair(["out_proj"], kdim=6, vdim=10, batch_first=True)
        dtype = lambda m: m.attn.q_proj_weight.dtype  # noqa: E731
        call = lambda m: outputs(  # noqa: E731
            m, (random(3, 5, E, dtype=dtype(m)), random(3, 7, 6, dtype=dtype(m)), random(3, 7, 10, dtype=dtype(m)))
        )
        check(base, model, call)

    @pytest.mark.parametrize(
        "kwargs, match",
        [
            (
                {"attn_mask": torch.zeros(1, 5)},
                r"attn_mask: expected shape \(5, 5\) or \(12, 5, 5\), got torch\.float32 \(1, 5\)",
            ),
            (
                {"key_padding_mask": torch.zeros(1, 5)},
                r"key_padding_mask: expected shape \(3, 5\), got torch\.float32 \(1, 5\)",
            ),
            ({"is_causal": True}, "is_causal"),
        ],
    )
    def test_bad_masks_are_named(self, kwargs, match):
        model = pair(batch_first=True)[1]
        with pytest.raises(ValueError, match=match):
            model(*arguments("self", True, torch.float32), **kwargs)

    def test_nested_tensors_are_refused(self):
        model = pair(batch_first=True)[1]
        x = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(5, E)])
        with pytest.raises(ValueError, match="query: nested tensors"):
            model(x, x, x)


class TestTheFusedPath:
    """Eval mode under no_grad, where torch's own module reads the weights itself."""

    @pytest.mark.parametrize("target", ["qkv", ["out_proj"], ["linear1"], ["linear2"], "all-linear"])
    @pytest.mark.parametrize("norm_first", [False, True])
    def test_an_encoder_layer_goes_through_its_adapters(self, target, norm_first):
        layer = nn.TransformerEncoderLayer(E, H, 24, batch_first=True, norm_first=norm_first).eval()
        base = nn.Sequential(OrderedDict(layer=layer))
        model = fastlora.inject(copy.deepcopy(base), config(target_modules=target))
        x = torch.randn(3, 5, E)
        mask, padding = mask_2d(bool, 5, 5), torch.arange(5).expand(3, 5) > torch.tensor([[4], [2], [3]])
        for given in ({}, {"src_mask": mask}, {"src_key_padding_mask": padding}):
            with torch.no_grad():
                torch.testing.assert_close(model.layer(x, **given), base.layer(x, **given), rtol=1e-5, atol=1e-5)
        randomise(model)
        merged = fastlora.merge(copy.deepcopy(model))
        with torch.no_grad():
            y = model(x)
            assert not torch.allclose(y, base(x), rtol=1e-2)
            torch.testing.assert_close(merged(x), y, rtol=1e-4, atol=1e-5)

    def test_padding_that_torch_nests_comes_back_as_zeros(self):
        base, model = build("torch_encoder"), build("torch_encoder")
        fastlora.inject(model, config(target_modules="all-linear"))
        x, padding = torch.randn(3, 5, 32), torch.arange(5).expand(3, 5) > torch.tensor([[4], [2], [0]])
        for frozen in (base, model):
            frozen.requires_grad_(False)
        with torch.no_grad():
            mine, theirs = (m.encoder(x, src_key_padding_mask=padding) for m in (model, base))
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
        assert not mine[padding].any() and mine[~padding].any()

    def test_other_layers_keep_theirs(self):
        model = build("torch_encoder")
        fastlora.inject(model, config(target_modules=["0.linear1"]))
        layers = model.encoder.layers
        assert type(layers[0]) is fastlora.nn.TransformerEncoderLayer and type(layers[1]) is nn.TransformerEncoderLayer
        assert type(layers[0].self_attn) is nn.MultiheadAttention


class TestTheModule:
    def test_parameters_keep_their_names_and_are_there_once(self):
        base, model = pair()
        kept = {k: v for k, v in model.state_dict().items() if ".lora_" not in k}
        assert {k: v.shape for k, v in kept.items()} == {k: v.shape for k, v in base.state_dict().items()}
        assert sorted(adapted_layers(model)) == ["attn.in_proj", "attn.out_proj"]
        assert type(model.attn) is fastlora.nn.MultiheadAttention
        assert model.attn.in_proj.weight is model.attn.in_proj_weight
        rows = fastlora.summary(model).rows
        assert [r.key for r in rows] == ["attn.in_proj[q]", "attn.in_proj[k]", "attn.in_proj[v]", "attn.out_proj"]
        assert not any(p.requires_grad for n, p in model.named_parameters() if ".lora_" not in n)

    @pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch"])
    def test_copies_stand_alone(self, way):
        _, model = pair()
        if way == "deepcopy":
            other = copy.deepcopy(model)
        elif way == "pickle":
            other = pickle.loads(pickle.dumps(model))
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        call = run("cross", False)
        assert torch.equal(call(other), call(model))
        assert other.attn.in_proj.weight is other.attn.in_proj_weight is not model.attn.in_proj_weight
        with torch.no_grad():
            other.attn.in_proj_weight.zero_()
        assert model.attn.in_proj.weight.any() and not other.attn.in_proj.weight.any()

    def test_a_cast_reaches_the_projection(self):
        _, model = pair()
        model.double()
        assert model.attn.in_proj.weight.dtype == torch.float64
        assert run("self", False)(model).dtype == torch.float64

    def test_merging_changes_the_owner_s_weight(self):
        base, model = pair()
        call = run("apart", False)
        y = call(model)
        fastlora.merge(model)
        assert not torch.equal(model.attn.in_proj_weight, base.attn.in_proj_weight)
        torch.testing.assert_close(call(model), y, rtol=1e-4, atol=1e-5)
        fastlora.unmerge(model)
        assert torch.equal(model.attn.in_proj_weight, base.attn.in_proj_weight)

    def test_built_by_hand(self):
        layer = fastlora.nn.MultiheadAttention(E, H, batch_first=True, r=3, lora_alpha=6)
        base = nn.MultiheadAttention(E, H, batch_first=True)
        base.load_state_dict({k: v for k, v in layer.state_dict().items() if "lora_" not in k})
        x = torch.randn(2, 5, E)
        torch.testing.assert_close(layer(x, x, x), base(x, x, x))
        assert isinstance(layer.in_proj, InProjection) and layer.in_proj.ranks() == {"q": 3, "k": 3, "v": 3}
        assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == 4 * 3 * 2 * E
        dense = fastlora.nn.MultiheadAttention(E, H, r=3, split_qkv=False)
        assert dense.in_proj.ranks() == {"weight": 3}
        with pytest.raises(ValueError, match="r: expected at most embed_dim = 16, got 17"):
            fastlora.nn.MultiheadAttention(E, H, r=E + 1)

    @pytest.mark.parametrize("which", ["self", "cross", "apart"])
    def test_checkpointing(self, which):
        from torch.utils.checkpoint import checkpoint

        _, model = pair(train=True)
        args = [a.detach().clone() for a in arguments(which, False, torch.float32)]
        args = [args[0]] * 3 if which == "self" else [args[0], args[1], args[1]] if which == "cross" else args
        results = []
        for way in (model, lambda *a: checkpoint(model, *a, use_reentrant=False)):
            model.zero_grad()
            way(*args)[0].square().sum().backward()
            results.append(list(lora_grads(model).values()))
        for mine, other in zip(*results, strict=True):
            torch.testing.assert_close(mine, other)

    @pytest.mark.parametrize("which", ["self", "cross", "apart"])
    def test_compiled(self, which):
        _, model = pair(batch_first=True)
        call = run(which, True)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(call(compiled), call(model), rtol=1e-5, atol=1e-6)

    def test_autocast(self):
        _, model = pair(batch_first=True)
        for which in ("self", "cross"):
            with torch.autocast("cpu", torch.bfloat16):
                y = run(which, True, need_weights=False)(model)
            assert y.dtype == torch.bfloat16
            torch.testing.assert_close(y.float(), run(which, True, need_weights=False)(model), rtol=0.1, atol=0.1)


class TestStatisticsOfCrossAttention:
    """q sees other rows than k and v, and the stacked matrix is one layer."""

    @pytest.mark.parametrize("target", ["qkv", ["in_proj"]])
    @pytest.mark.parametrize("which", ["cross", "apart"])
    def test_exact_and_probed(self, target, which):
        base, model = pair(target)
        call = run(which, False, need_weights=False)
        full = copy.deepcopy(model).double()
        full.attn.in_proj_weight.requires_grad_(True)
        call(full).square().sum().backward()
        gradient = full.attn.in_proj_weight.grad
        query, key, value = arguments(which, False, torch.float64)
        weights = [full.attn.in_proj_weight.detach() + full.attn.in_proj.delta()][0].chunk(3)
        projected = [(x @ w.T).reshape(-1, E) for x, w in zip((query, key, value), weights, strict=True)]
        spread = [p.var(dim=0, correction=0).sum().item() for p in projected]
        expected = [g.square().sum().item() for g in gradient.chunk(3)]
        if target == ["in_proj"]:
            spread, expected = [sum(spread)], [sum(expected)]
        with fastlora.track(model, estimator="exact", statistics=("grad_sq", "act_var")) as tracker:
            call(model).square().sum().backward()
            tracker.step()
        assert list(tracker.scores("grad_sq").values()) == pytest.approx(expected, rel=1e-4)
        assert list(tracker.scores("act_var").values()) == pytest.approx(spread, rel=1e-4)
        with fastlora.track(model, probes=8, ema=None, every=1, statistics=("grad_sq", "act_var")) as tracker:
            for _ in range(300):
                call(model).square().sum().backward()
                tracker.step()
        assert list(tracker.scores("grad_sq").values()) == pytest.approx(expected, rel=0.25)
        assert list(tracker.scores("act_var").values()) == pytest.approx(spread, rel=1e-4)

    @pytest.mark.parametrize("which", ["self", "cross"])
    def test_samples_are_told_apart_also_where_positions_come_first(self, which):
        for batch_first in (False, True):
            _, model = pair("qkv", batch_first=batch_first)
            call = run(which, batch_first, need_weights=False)
            with fastlora.track(model, estimator="exact", statistics=("fisher",), loss_reduction="sum") as tracker:
                call(model).square().sum().backward()
                tracker.step()
            args = arguments(which, batch_first, torch.float32)
            total = torch.zeros(3)
            for i in range(3):
                own = [a[i : i + 1] if batch_first else a[:, i : i + 1] for a in args]
                own = [own[0]] * 3 if which == "self" else [own[0], own[1], own[1]]
                single = copy.deepcopy(model)
                single.attn.in_proj_weight.requires_grad_(True)
                single(*own, need_weights=False)[0].square().sum().backward()
                total += torch.stack([g.square().sum() for g in single.attn.in_proj_weight.grad.chunk(3)]) / 3
            assert list(tracker.scores("fisher").values()) == pytest.approx(total.tolist(), rel=1e-4)


def test_a_batch_of_several_adapters():
    """Every sample with its own adapter equals the samples apart, also where positions come first."""
    for which in ("self", "cross"):
        for batch_first in (False, True):
            _, model = pair(batch_first=batch_first)
            fastlora.add_adapter(model, "b", config(target_modules="attention", r=2))
            randomise(model, 0.3)
            args = arguments(which, batch_first, torch.float32)
            with fastlora.use_adapters(model, ["default", "b", None]):
                together, _ = model(*args)
            for i, name in enumerate(["default", "b", None]):
                own = [a[i : i + 1] if batch_first else a[:, i : i + 1] for a in args]
                own = [own[0]] * 3 if which == "self" else [own[0], own[1], own[1]]
                with fastlora.use_adapters(model, [name]):
                    alone, _ = model(*own)
                mine = together[i : i + 1] if batch_first else together[:, i : i + 1]
                torch.testing.assert_close(mine, alone, rtol=1e-5, atol=1e-5)


def test_an_adapter_whose_targets_had_none_before():
    base, model = pair(["out_proj"])
    fastlora.add_adapter(model, "b", config(target_modules="qkv", r=2))
    call = run("cross", False)
    y = call(model)
    randomise(model, 0.3)
    with fastlora.use_adapters(model, "b"):
        assert not torch.allclose(call(model), call(base))
        assert list(fastlora.summary(model, "b").costs) == [f"attn.in_proj[{part}]" for part in "qkv"]
    assert y.shape == call(model).shape and not model.attn.in_proj_weight.requires_grad
