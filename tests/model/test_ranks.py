"""Ranks and scales: patterns, set_ranks, ranks from scores, presets; and what is said of them."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.helpers import FAMILIES, config, lora_grads, randomise
from support.model_state import assert_untouched, state_of
from torch import nn

import fastlora
from fastlora.config import PRESETS, LoraConfig
from fastlora.importance.scores import Scores
from fastlora.model.ranks import reallocate
from fastlora.nn.linear import adapted_layers
from fastlora.ops import native


def of_matrices(model: nn.Module, column: str) -> dict[str, float]:
    return {row.key: getattr(row, column) for row in fastlora.summary(model).rows}


class TestPatterns:
    def test_exact_keys_with_slices(self, build):
        pattern = {"blocks.0.attn.qkv[q]": 7, "blocks.1.attn.qkv[v]": 1, "blocks.1.attn.qkv[k]": 0}
        model = fastlora.inject(build("timm_vit"), config(target_modules="qkv", rank_pattern=pattern))
        keys = [f"blocks.{i}.attn.qkv[{s}]" for i in range(2) for s in "qkv"]
        assert of_matrices(model, "rank") == {key: pattern.get(key, 4) for key in keys}
        qkv = model.blocks[1].attn.qkv
        assert qkv.lora_A["default"].k is None and qkv.lora_B["default"].v.shape == (32, 1)
        randomise(model)
        FAMILIES["timm_vit"].run(model).sum().backward()
        assert all(g is not None for g in lora_grads(model).values())

    @pytest.mark.parametrize(
        "pattern, ranks",
        [
            ({"query": 2}, (2, 4, 2, 4)),
            ({"layer.1.attention.self.query": 2}, (4, 4, 2, 4)),
            ({r"layer\.0\.attention\.self\.(query|key)": 2}, (2, 2, 4, 4)),
            ({"query": 2, "layer.1.attention.self.query": 6}, (2, 4, 2, 4)),
            ({"query": 2, "bert.encoder.layer.1.attention.self.query": 6}, (2, 4, 6, 4)),
            ({"bert.encoder.layer.1.attention.self.query": 6, "query": 2}, (2, 4, 6, 4)),
            ({"^bert.encoder.layer.1.attention.self.query": 6}, (4, 4, 6, 4)),
        ],
    )
    def test_precedence(self, build, pattern, ranks):
        fields = dict(target_modules=["query", "key"], rank_pattern=pattern)
        model = fastlora.inject(build("bert"), config(**fields))
        assert tuple(of_matrices(model, "rank").values()) == ranks

    def test_precedence_of_a_path_over_a_suffix_when_split(self, build):
        pattern = {"qkv": 2, "blocks.1.attn.qkv": 3, "blocks.1.attn.qkv[v]": 5, "qkv[k]": 1}
        model = fastlora.inject(build("timm_vit"), config(target_modules="qkv", rank_pattern=pattern))
        assert tuple(of_matrices(model, "rank").values()) == (2, 2, 2, 3, 3, 5)
        pattern = {"qkv[k]": 1, "qkv": 2}
        model = fastlora.inject(build("timm_vit"), config(target_modules="qkv", rank_pattern=pattern))
        assert tuple(of_matrices(model, "rank").values()) == (2, 1, 2) * 2

    def test_an_exact_name_is_not_also_a_suffix(self):
        model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.ModuleDict({"a": nn.Linear(8, 8)})})
        fastlora.inject(model, config(target_modules=["a"], rank_pattern={"a": 2}))
        assert of_matrices(model, "rank") == {"a": 2, "b.a": 4}

    @pytest.mark.parametrize(
        "fields, scales",
        [
            ({}, (2.0, 2.0)),
            ({"scale": "per_rank"}, (4.0, 2.0)),
            ({"use_rslora": True}, (4.0, 4.0)),
            ({"use_rslora": True, "scale": "per_rank"}, (8 / 2**0.5, 4.0)),
            ({"alpha_pattern": {"key": 2}}, (2.0, 0.5)),
            ({"alpha_pattern": {"query": 2}, "scale": "per_rank"}, (1.0, 2.0)),
        ],
    )
    def test_scale_modes(self, build, fields, scales):
        fields = dict(target_modules=["layer.0.attention.self.query", "layer.0.attention.self.key"], **fields)
        model = fastlora.inject(build("bert"), config(rank_pattern={"query": 2}, **fields))
        assert tuple(of_matrices(model, "scale").values()) == pytest.approx(scales)


class TestPeftConfig:
    @pytest.mark.parametrize("rslora", [False, True])
    @pytest.mark.parametrize(
        "ranks, alphas",
        [
            ({}, {}),
            ({"query": 2, "layer.1.attention.self.value": 3}, {"value": 3}),
            # PEFT takes the first pattern that matches, also where a later one is the exact name.
            ({"query": 2, "bert.encoder.layer.1.attention.self.query": 6}, {r"layer\.0\..*": 5, "value": 3}),
        ],
    )
    def test_ranks_and_scaling_are_peft_s(self, build, rslora, ranks, alphas):
        import peft

        given = peft.LoraConfig(
            r=4, lora_alpha=6, target_modules=["query", "value"], rank_pattern=ranks, alpha_pattern=alphas,
            use_rslora=rslora,
        )  # fmt: skip
        model = fastlora.inject(build("bert"), given)
        theirs = peft.get_peft_model(build("bert"), copy.deepcopy(given)).base_model.model
        for row in fastlora.summary(model).rows:
            layer = theirs.get_submodule(row.key)
            assert row.rank == layer.r["default"] and row.scale == pytest.approx(layer.scaling["default"], rel=1e-12)

    def test_fields_are_taken_over(self, build):
        import peft

        given = peft.LoraConfig(
            r=3, lora_alpha=5, target_modules=["query", "value"], exclude_modules=["0.attention.self.query", "value"],
            lora_dropout=0.25, bias="lora_only", modules_to_save=["classifier"], init_lora_weights="gaussian",
        )  # fmt: skip
        model = fastlora.inject(build("bert"), given)
        assert list(adapted_layers(model)) == ["bert.encoder.layer.1.attention.self.query"]
        layer = model.bert.encoder.layer[1].attention.self.query
        assert layer.adapter_specs["default"].dropout == 0.25 and layer.bias.requires_grad
        assert model.classifier.weight.requires_grad

    @pytest.mark.parametrize("task, name", [("SEQ_CLS", "bert"), ("SEQ_CLS", "distilbert"), ("CAUSAL_LM", "llama")])
    def test_the_head_of_a_task_is_trained_as_by_peft(self, build, task, name):
        import peft

        target = ["q_lin", "query", "q_proj"][("distilbert", "bert", "llama").index(name)]
        given = peft.LoraConfig(task_type=task, target_modules=[target])
        model = fastlora.inject(build(name), given)
        theirs = peft.get_peft_model(build(name), copy.deepcopy(given))
        pattern = re.compile(r"^base_model\.model\.|modules_to_save\.default\.")
        wanted = {pattern.sub("", n) for n, p in theirs.named_parameters() if p.requires_grad and "lora_" not in n}
        mine = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
        assert mine == wanted and bool(mine) is (task == "SEQ_CLS")
        assert given.modules_to_save is None

    @pytest.mark.parametrize(
        "fields",
        [
            {"init_lora_weights": "mica"},
            {"layer_replication": [[0, 1]]},
            {"target_parameters": ["weight"]},
        ],
    )
    def test_what_is_not_implemented_raises(self, build, fields):
        import peft

        model = build("bert")
        with pytest.raises(ValueError, match=next(iter(fields))):
            fastlora.inject(model, peft.LoraConfig(target_modules=["query"], **fields))
        assert not adapted_layers(model)

    def test_other_methods_of_peft_raise(self, build):
        import peft

        with pytest.raises(
            TypeError,
            match=r"config: expected a fastlora\.LoraConfig or a peft\.LoraConfig, got IA3Config",
        ):
            fastlora.inject(build("bert"), peft.IA3Config(target_modules=["query"], feedforward_modules=[]))


class TestSetRanks:
    @pytest.fixture
    def model(self, build):
        return fastlora.inject(build("timm_vit"), config(target_modules="qkv"))

    def test_fresh_factors_where_asked_and_only_there(self, model):
        qkv, other = model.blocks[0].attn.qkv, model.blocks[1].attn.qkv
        kept = [qkv.lora_A["default"].k, qkv.lora_B["default"].k, *other.parameters()]
        assert fastlora.set_ranks(model, {"blocks.0.attn.qkv[q]": 9, "blocks.0.attn.qkv[v]": 1}) is model
        assert qkv.ranks() == {"q": 9, "k": 4, "v": 1} and other.ranks() == dict.fromkeys("qkv", 4)
        now = [qkv.lora_A["default"].k, qkv.lora_B["default"].k, *other.parameters()]
        assert all(a is b for a, b in zip(kept, now, strict=True))
        assert not qkv.lora_B["default"].q.any() and qkv.lora_A["default"].q.any()
        assert all(p.requires_grad for n, p in qkv.named_parameters() if "lora" in n)
        assert of_matrices(model, "scale")["blocks.0.attn.qkv[q]"] == 2.0

    def test_rank_zero_and_back(self, build, model):
        base, keys = build("timm_vit"), [row.key for row in fastlora.summary(model).rows]
        fastlora.set_ranks(model, dict.fromkeys(keys, 0))
        assert fastlora.summary(model).adapter_params == 0 and not lora_grads(model)
        assert torch.equal(FAMILIES["timm_vit"].run(model), FAMILIES["timm_vit"].run(base))
        fastlora.set_ranks(model, dict.fromkeys(keys, 3))
        randomise(model)
        FAMILIES["timm_vit"].run(model).sum().backward()
        grads = lora_grads(model)
        assert len(grads) == 12 and all(g.any() for g in grads.values())

    @pytest.mark.parametrize("rslora", [False, True])
    def test_per_rank_scale_follows_through_zero(self, build, rslora):
        fields = dict(target_modules=["fc1"], scale="per_rank", use_rslora=rslora, alpha_pattern={"blocks.1.*": 3})
        model = fastlora.inject(build("timm_vit"), config(**fields))
        for rank in (2, 0, 8, 4, 1):
            fastlora.set_ranks(model, {"blocks.0.mlp.fc1": rank, "blocks.1.mlp.fc1": rank})
            divisor = (rank or 4) ** (0.5 if rslora else 1)
            assert tuple(of_matrices(model, "scale").values()) == pytest.approx((8 / divisor, 3 / divisor))

    def test_after_training(self, model):
        randomise(model)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=r"ranks: 'blocks.0.attn.qkv' has been trained .*reinit=True"):
            fastlora.set_ranks(model, {"blocks.0.attn.qkv[q]": 2})
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        fastlora.set_ranks(model, {"blocks.0.attn.qkv[q]": 2}, reinit=True)
        qkv = model.blocks[0].attn.qkv
        assert qkv.ranks() == {"q": 2, "k": 4, "v": 4}
        assert qkv.lora_B["default"].k.any() and not qkv.lora_B["default"].q.any()

    @pytest.mark.parametrize("without", [False, True], ids=["", "without the native library"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_kept_components(self, model, dtype, without, monkeypatch):
        """q grows, v shrinks: what both ranks have stays bit for bit, and a matrix that grows computes what it did."""
        if without:
            monkeypatch.setattr(native, "_REASON", "taken away")
        randomise(model.to(dtype))
        qkv = model.blocks[0].attn.qkv
        before, deltas = qkv.pairs(), [b.double() @ a.double() for a, b, _ in qkv.pairs()]
        fastlora.set_ranks(model, {"blocks.0.attn.qkv[q]": 7, "blocks.0.attn.qkv[v]": 3}, keep=True)
        assert qkv.ranks() == {"q": 7, "k": 4, "v": 3} and [s for *_, s in qkv.pairs()] == [s for *_, s in before]
        for (a, b, _), (old_a, old_b, _), kept in zip(qkv.pairs(), before, (4, 4, 3), strict=True):
            assert a.dtype == b.dtype == old_a.dtype
            assert torch.equal(a[:kept], old_a[:kept]) and torch.equal(b[:, :kept], old_b[:, :kept])
            assert not b[:, kept:].any() and a[kept:].abs().sum(1).all()
        for (a, b, _), delta in zip(qkv.pairs()[:2], deltas[:2], strict=True):
            torch.testing.assert_close(b.double() @ a.double(), delta, rtol=1e-14, atol=1e-14)
        fastlora.set_ranks(model, {"blocks.0.attn.qkv[q]": 0}, keep=True)
        fastlora.set_ranks(model, {"blocks.0.attn.qkv[q]": 2}, keep=True)
        assert not qkv.lora_B["default"].q.any()
        with pytest.raises(ValueError, match="keep: expected keep or reinit, got both"):
            fastlora.set_ranks(model, {"blocks.0.attn.qkv[q]": 1}, keep=True, reinit=True)

    @pytest.mark.parametrize(
        "bad, message",
        [
            (
                {"blocks.1.attn.qkw[q]": 3},
                r"ranks: .* got 'blocks\.1\.attn\.qkw\[q\]' \(did you mean 'blocks\.1\.attn\.qkv\[q\]'\?\)",
            ),
            (
                {"blocks.1.attn.qkv": 3},
                r"ranks: .* got 'blocks\.1\.attn\.qkv' \(did you mean 'blocks\.1\.attn\.qkv\[v\]'\?\)",
            ),
            (
                {"blocks.1.attn.qkv[q]": 33},
                r"rank of blocks\.1\.attn\.qkv\[q\]: expected at most min\(in_features, out_features\) = 32, got 33",
            ),
            ({"blocks.1.attn.qkv[q]": -1}, r"rank of blocks\.1\.attn\.qkv\[q\]: expected an integer >= 0, got -1"),
            ({"blocks.1.attn.qkv[q]": 2.0}, r"rank of blocks\.1\.attn\.qkv\[q\]: expected an integer >= 0, got 2\.0"),
            ({"blocks.1.attn.qkv[q]": True}, "got True"),
        ],
    )
    def test_all_or_nothing(self, model, bad, message):
        before = copy.deepcopy(model.state_dict())
        kind = ValueError if all(type(rank) is int for rank in bad.values()) else TypeError
        with pytest.raises(kind, match=message):
            fastlora.set_ranks(model, {"blocks.0.attn.qkv[q]": 2, **bad})
        after = model.state_dict()
        assert list(after) == list(before) and all(torch.equal(v, before[k]) for k, v in after.items())

    def test_keeps_dtype_and_frozen_phases(self, model):
        model.double()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_A" in name)
        fastlora.set_ranks(model, {"blocks.0.attn.qkv[q]": 2})
        qkv = model.blocks[0].attn.qkv
        assert qkv.lora_A["default"].q.dtype == qkv.lora_B["default"].q.dtype == torch.float64
        assert qkv.lora_A["default"].q.requires_grad and not qkv.lora_B["default"].q.requires_grad

    def test_a_merged_model_is_refused(self, model):
        fastlora.merge(model)
        with pytest.raises(ValueError, match="is merged"):
            fastlora.set_ranks(model, {"blocks.0.attn.qkv[q]": 2})

    def test_ranks_from_allocate(self, model):
        keys = [row.key for row in fastlora.summary(model).rows]
        scores = {key: float(i) for i, key in enumerate(keys)}
        ranks = fastlora.allocate(scores, budget=18, r_min=0, r_max=8)
        fastlora.set_ranks(model, ranks)
        assert of_matrices(model, "rank") == ranks


class TestReports:
    def test_summary_counts(self, build):
        base = build("timm_vit")
        total = sum(p.numel() for p in base.parameters())
        pattern = {"blocks.0.attn.qkv[k]": 1, "blocks.1.attn.qkv[q]": 0}
        fields = dict(target_modules="qkv", rank_pattern=pattern, modules_to_save=["head"], bias="lora_only")
        summary = fastlora.summary(fastlora.inject(base, config(**fields)))
        adapters = (4 + 1 + 4 + 0 + 4 + 4) * 64
        assert summary.adapter_params == adapters == sum(row.params for row in summary.rows)
        assert summary.head_params == 32 * 5 + 5 and summary.other_trainable == 2 * 96
        assert summary.total_params == total + adapters
        assert summary.costs == {row.key: 64 for row in summary.rows} and len(summary.rows) == 6
        text = str(summary)
        assert "blocks.0.attn.qkv[k]" in text and f"adapters {adapters:,}" in text and "head 165" in text

    def test_summary_of_unequal_projections(self, build):
        summary = fastlora.summary(fastlora.inject(build("llama"), config(target_modules="qkv")))
        assert [row.params for row in summary.rows] == [4 * 64, 4 * 48, 4 * 48] * 2

    def test_param_groups(self, build):
        model = build("timm_vit")
        fastlora.inject(model, config(target_modules="qkv", modules_to_save=["head", "norm1"], bias="lora_only"))
        model.norm.weight.requires_grad_(True)
        groups = {
            g["name"]: g for g in fastlora.param_groups(model, lr_lora=1.0, lr_norm=2.0, lr_head=3.0, weight_decay=0.5)
        }
        names = {id(p): n for n, p in model.named_parameters()}
        listed = {k: sorted(names[id(p)] for p in g["params"]) for k, g in groups.items()}
        assert len(listed["lora"]) == 12 and all("lora_" in n for n in listed["lora"])
        blocks = [f"blocks.{i}.norm1.{n}" for i in range(2) for n in ("bias", "weight")]
        assert listed["norm"] == sorted([*blocks, "norm.weight"]) and listed["head"] == ["head.bias", "head.weight"]
        assert listed["bias"] == [f"blocks.{i}.attn.qkv.bias" for i in range(2)]
        assert {k: (g["lr"], g["weight_decay"]) for k, g in groups.items()} == {
            "lora": (1.0, 0.0), "norm": (2.0, 0.0), "bias": (1e-3, 0.0), "head": (3.0, 0.5)
        }  # fmt: skip
        every = [p for g in groups.values() for p in g["params"]]
        assert len({id(p) for p in every}) == len(every) == sum(p.requires_grad for p in model.parameters())
        torch.optim.AdamW(groups.values())

    def test_explain(self, build):
        text = str(fastlora.explain(fastlora.inject(build("bert"), config(target_modules="qkv"))))
        assert text.count("with 2 siblings") == 6
        model = fastlora.inject(build("timm_vit").double(), config(target_modules="qkv"))
        rows = fastlora.explain(model).rows
        assert [r[:2] for r in rows] == [(f"blocks.{i}.attn.qkv", "reference") for i in range(2)]
        assert all("split q/k/v" in r.remarks and "native:" in r.remarks for r in rows)

    @pytest.mark.parametrize("function", [fastlora.summary, fastlora.param_groups, fastlora.merge, fastlora.unmerge])
    def test_a_model_without_adapters(self, function):
        with pytest.raises(ValueError, match="model: has no adapters; call fastlora.inject first"):
            function(nn.Sequential(nn.Linear(4, 4)))


def ranks_of(model):
    return {row.key: row.rank for row in fastlora.summary(model).rows}


class TestReallocate:
    @pytest.fixture
    def model(self, build):
        return fastlora.inject(build("timm_vit"), config(target_modules="qkv"))

    def test_the_total_stays_and_follows_the_scores(self, model):
        scores = fastlora.Scores(dict(zip(ranks_of(model), (1.0, 2.0, 4.0, 8.0, 1e-9, 3.0), strict=True)), "lora_b_var")
        ranks = reallocate(model, scores)
        assert ranks == ranks_of(model) == fastlora.allocate(scores, 24, r_min=2, r_max=8)
        assert sum(ranks.values()) == 24 and min(ranks.values()) == 2 and max(ranks.values()) == 8
        assert all(row.scale == 2.0 for row in fastlora.summary(model).rows)  # alpha / r of before
        assert not any(p.any() for n, p in model.named_parameters() if "lora_B" in n)

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.floats(0, 1e6), min_size=6, max_size=6), st.sampled_from([1, 2, 4]))
    def test_the_published_overspending_cannot_happen(self, values, floor):
        import timm

        with torch.device("meta"):
            sizes = dict(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)
            model = timm.create_model("vit_tiny_patch16_224", **sizes)
        # B on the meta device has no values to be compared with zero.
        fastlora.inject(model, config(target_modules="qkv", init_lora_weights=False))
        keys = list(ranks_of(model))
        model.to_empty(device="cpu")
        ranks = reallocate(model, dict(zip(keys, values, strict=True)), r_min=floor)
        assert sum(ranks.values()) == 24 and all(floor <= r <= 8 for r in ranks.values())

    def test_parameters_caps_and_subsets(self, build):
        model = fastlora.inject(build("bert"), config(target_modules="all-linear", r=32))
        keys = list(ranks_of(model))[:3]
        ranks = reallocate(model, {keys[0]: 5.0, keys[1]: 1.0, keys[2]: 0.0})
        assert ranks == {keys[0]: 32, keys[1]: 32, keys[2]: 32}  # twice the rank is more than the matrices can have
        ranks = reallocate(
            model,
            {keys[0]: 5.0, keys[1]: 1.0},
            6 * 64,
            r_min=1,
            r_max=5,
            unit="params",
            costs=fastlora.summary(model).costs,
        )
        assert ranks == {keys[0]: 5, keys[1]: 1} and ranks_of(model)[keys[2]] == 32

    def test_refusals(self, model, build):
        key = next(iter(ranks_of(model)))
        trained = randomise(copy.deepcopy(model))
        bad = [
            (
                model,
                ({"blocks.0.attn.qkw[q]": 1.0},),
                {},
                r"scores: .* got 'blocks\.0\.attn\.qkw\[q\]' \(did you mean 'blocks\.0\.attn\.qkv\[q\]'\?\)",
            ),
            (model, ({key: 1.0},), {"budget": 1}, "budget: expected at least the 2 ranks .*, got 1"),
            (model, ({key: float("nan")},), {}, "scores.*: expected a finite number"),
            (model, ({},), {}, "scores: expected at least one, got none"),
            (
                model,
                ({key: 1.0},),
                {"r_min": 5, "r_max": 4},
                r"r_min: expected at most r_max = 4 for 'blocks\.0\.attn\.qkv\[q\]', got 5",
            ),
            (
                model,
                ({key: 1.0},),
                {"unit": "layers"},
                r"unit: expected one of \('ranks', 'params'\), got 'layers' \(did you mean 'params'\?\)",
            ),
            (trained, ({key: 1.0},), {}, "has been trained .*reinit=True"),
            (build("timm_vit"), ({key: 1.0},), {}, "model: has no adapters"),
        ]
        for m, args, kwargs, message in bad:
            before = state_of(m)
            with pytest.raises(ValueError, match=message):
                reallocate(m, *args, **kwargs)
            assert_untouched(m, before)
        assert sum(reallocate(trained, dict.fromkeys(ranks_of(trained), 1.0), reinit=True).values()) == 24


class TestBreakdown:
    def test_by_hand(self):
        scores = {"blocks.0.attn.qkv[q]": 1.0, "blocks.0.mlp.fc1": 2.0, "blocks.1.attn.qkv[q]": 5.0, "pooler": 8.0}
        found = Scores(scores, kind="grad_sq").breakdown()
        assert found.by_projection == {"attn.qkv[q]": 3.0, "mlp.fc1": 2.0, "pooler": 8.0}
        assert found.by_depth == {"blocks.0": 1.5, "blocks.1": 5.0, "": 8.0}
        lines = str(found).splitlines()
        assert lines[0].split() == ["block", "attn.qkv[q]", "mlp.fc1", "pooler", "mean"]
        assert lines[2].split() == ["blocks.0", "1", "2", "1.5"] and lines[-1].split() == ["mean", "3", "2", "8", "4"]

    @pytest.mark.parametrize(
        "key, block, projection",
        [
            ("bert.encoder.layer.11.attention.self.query", "bert.encoder.layer.11", "attention.self.query"),
            ("layers.2.blocks.5.attn.qkv[v]", "layers.2.blocks.5", "attn.qkv[v]"),
            ("encoder.block.3.layer.0.SelfAttention.q", "encoder.block.3", "layer.0.SelfAttention.q"),
            ("0.fc1", "0", "fc1"),
            ("layer3.fc1", "", "layer3.fc1"),
        ],
    )
    def test_keys_of_families(self, key, block, projection):
        assert list(Scores({key: 1.0}, kind="grad_sq").breakdown().cells) == [(block, projection)]

    def test_bad_scores(self):
        with pytest.raises(ValueError, match="scores: expected at least one, got none"):
            Scores({}, kind="grad_sq").breakdown()
        with pytest.raises(ValueError, match=r"values\['a'\]: expected a finite number, got inf"):
            Scores({"a": float("inf")}, kind="grad_sq").breakdown()


class TestPresets:
    @pytest.mark.parametrize(
        "difficulty, r, alpha, matrices",
        [("simple", 8, 16, 4), ("medium", 16, 32, 8), ("complex", 32, 64, 8), ("very_complex", 64, 128, 8)],
    )
    def test_on_a_model(self, difficulty, r, alpha, matrices):
        import timm

        with torch.device("meta"):
            sizes = dict(img_size=16, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=5)
            model = timm.create_model("vit_tiny_patch16_224", **sizes)
        chosen = LoraConfig.preset(difficulty, modules_to_save=["head"])
        assert (chosen.r, chosen.lora_alpha, chosen.modules_to_save) == (r, alpha, ["head"])
        rows = fastlora.summary(fastlora.inject(model, chosen)).rows
        assert len(rows) == matrices and {(row.rank, row.scale) for row in rows} == {(r, 2.0)}

    def test_overrides_and_refusals(self):
        assert LoraConfig.preset("simple", r=4, split_qkv=True).split_qkv is True
        assert LoraConfig.preset("simple", r=4).r == 4
        with pytest.raises(ValueError, match=r"difficulty: expected one of \('simple', .*got 'easy'"):
            LoraConfig.preset("easy")
        with pytest.raises(ValueError, match="r: expected"):
            LoraConfig.preset("simple", r=0)
        assert list(PRESETS) == ["simple", "medium", "complex", "very_complex"]
