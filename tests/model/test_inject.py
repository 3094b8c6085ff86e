"""``inject`` on models of real families: what plays which role, what is adapted, and numbers against float64."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict

import pytest
import torch
from support.helpers import FAMILIES, CountOps, config, lora_grads, randomise, ungrouped
from support.model_zoo import ZOO, assert_as_exact, build, reference
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import fastlora
from fastlora.config import ROLES
from fastlora.model.modules import role_targets
from fastlora.nn.linear import Linear, QKVLinear, adapted_layers

EVERY = pytest.mark.parametrize("name", FAMILIES)


def expected(name: str, role: str) -> list[str]:
    """Names of a role, from the family's own description."""
    family = FAMILIES[name]
    wanted = {"qkv": family.qkv, "attention": (*family.qkv, family.attention_output), "mlp": family.mlp}
    parts = wanted["attention"] + family.mlp if role == "all-linear" else wanted[role]
    names = [prefix + part for prefix in family.layers for part in parts]
    if role == "all-linear" or (role == "mlp" and not family.mlp):
        names += family.other
    return sorted(names)


@EVERY
@pytest.mark.parametrize("role", ["qkv", "attention", "mlp", "all-linear"])
def test_roles(build, name, role):
    model = fastlora.inject(build(name), config(target_modules=role))
    assert sorted(adapted_layers(model)) == expected(name, role)
    fused = {n for n, m in adapted_layers(model).items() if type(m) is QKVLinear}
    assert fused == ({n for n in adapted_layers(model) if n.endswith("qkv")} if role in ("qkv", "attention") else set())


@EVERY
def test_outputs_at_first_are_the_base_s_bit_for_bit(build, name, library_matmul):
    base, run = build(name), FAMILIES[name].run
    model = fastlora.inject(copy.deepcopy(base), config(target_modules="all-linear"))
    base.train(), model.train()
    for module in [*base.modules(), *model.modules()]:
        if isinstance(module, nn.Dropout) or "Dropout" in type(module).__name__:
            module.eval()
    for mode in (torch.enable_grad, torch.no_grad):
        for _ in range(2):
            torch.manual_seed(5)
            with mode():
                mine = run(model)
            torch.manual_seed(5)
            assert torch.equal(mine, run(base))


@EVERY
def test_gradients_reach_every_adapter_and_grouping_changes_nothing(build, name):
    run, results = FAMILIES[name].run, []
    model = randomise(fastlora.inject(build(name), config(target_modules="attention")), 0.05)
    for candidate in (model, ungrouped(model)):
        for _ in range(2):  # the second pass runs with what the first one learned
            candidate.zero_grad()
            y = run(candidate)
            y.square().sum().backward()
        results.append((y.detach(), lora_grads(candidate)))
    (y, grads), (alone, other) = results
    torch.testing.assert_close(y, alone, rtol=1e-4, atol=1e-5)
    assert grads and all(g is not None and g.isfinite().all() and g.any() for g in grads.values())
    for key, grad in grads.items():
        torch.testing.assert_close(grad, other[key], rtol=1e-3, atol=1e-5 * other[key].abs().max().item())


@EVERY
def test_separate_projections_of_a_family_run_together(build, name):
    model = fastlora.inject(build(name), config(target_modules="qkv"))
    with torch.no_grad():
        FAMILIES[name].run(model)
        with CountOps() as count:
            FAMILIES[name].run(model)
    together = sorted(len(call) for call in count.calls)
    blocks = len(FAMILIES[name].layers)
    if name == "timm_vit":
        assert together == [1] * blocks
    elif name == "t5":  # q of the cross-attention sees another tensor than k and v
        assert together == [1, 2, 3, 3]
    elif name == "deberta":  # the relative positions pass through q and k once more
        assert together.count(3) == blocks and sum(together) == 5 * blocks
    else:
        assert together == [3] * blocks


class TestTargets:
    def test_suffixes_keep_a_fused_matrix_whole(self, build):
        model = fastlora.inject(build("timm_vit"), config(target_modules=["qkv", "1.mlp.fc1"]))
        assert list(adapted_layers(model)) == ["blocks.0.attn.qkv", "blocks.1.attn.qkv", "blocks.1.mlp.fc1"]
        assert type(model.blocks[0].attn.qkv) is Linear and model.blocks[0].attn.qkv.ranks() == {"weight": 4}

    def test_a_suffix_is_a_whole_component(self, build):
        model = fastlora.inject(build("bert"), config(target_modules=["output.dense"]))
        assert len(adapted_layers(model)) == 4 and not any("intermediate" in n for n in adapted_layers(model))

    @pytest.mark.parametrize("role, split, whole", [("qkv", False, True), (["qkv"], True, False)])
    def test_split_qkv_overrides(self, build, role, split, whole):
        model = fastlora.inject(build("timm_vit"), config(target_modules=role, split_qkv=split))
        assert (model.blocks[0].attn.qkv.ranks() == {"weight": 4}) is whole

    def test_regular_expression_of_whole_names(self, build):
        model = fastlora.inject(build("bert"), config(target_modules=r".*layer\.1\..*(query|value)"))
        prefix = "bert.encoder.layer.1.attention.self."
        assert list(adapted_layers(model)) == [prefix + "query", prefix + "value"]

    def test_exclude(self, build):
        model = fastlora.inject(build("bert"), config(target_modules="qkv", exclude_modules=["key"]))
        assert sorted(adapted_layers(model)) == [n for n in expected("bert", "qkv") if not n.endswith("key")]
        model = fastlora.inject(build("bert"), config(target_modules="all-linear", exclude_modules="mlp"))
        assert sorted(adapted_layers(model)) == sorted(
            set(expected("bert", "all-linear")) - set(expected("bert", "mlp"))
        )

    def test_what_is_saved_whole_is_not_adapted(self, build):
        # As in PEFT: RoBERTa's head holds a `dense` too.
        model = fastlora.inject(build("roberta"), config(target_modules=["dense"], modules_to_save=["classifier"]))
        assert not any(n.startswith("classifier") for n in adapted_layers(model))

    def test_a_projection_that_two_owners_share(self):
        owners = nn.ModuleList(nn.ModuleDict({n: nn.Linear(8, 8) for n in "qkv"}) for _ in range(2))
        owners[1]["q"] = owners[0]["q"]
        fastlora.inject(owners, config(target_modules="qkv"))
        assert list(adapted_layers(owners)) == ["0.q", "0.k", "0.v", "1.k", "1.v"]
        assert owners[1]["q"](torch.randn(2, 8)).shape == (2, 8)

    def test_heads_inside_a_wrapper_are_left_alone(self, build):
        model = nn.ModuleDict({"net": build("timm_vit")})
        fastlora.inject(model, config(target_modules="all-linear"))
        assert "net.head" not in adapted_layers(model) and len(adapted_layers(model)) == 8

    def test_hooks_and_modes_survive(self, build):
        model, seen = build("bert"), []
        query = model.bert.encoder.layer[0].attention.self.query
        query.register_forward_hook(lambda *a: seen.append(1))
        ids, training = id(query), query.training
        fastlora.inject(model, config(target_modules="qkv"))
        layer = model.bert.encoder.layer[0].attention.self.query
        assert id(layer) == ids and layer.training is training and layer.lora_A.training is training
        FAMILIES["bert"].run(model)
        assert seen == [1]

    def test_base_keys_are_unchanged(self, build):
        base = build("bert")
        model = fastlora.inject(copy.deepcopy(base), config(target_modules="all-linear"))
        kept = {k: v for k, v in model.state_dict().items() if ".lora_" not in k}
        assert list(kept) == list(base.state_dict())
        assert all(torch.equal(v, base.state_dict()[k]) for k, v in kept.items())


class OwnAttention(nn.MultiheadAttention):
    """May read its weights in any way."""


class OwnLayer(nn.TransformerEncoderLayer):
    """Likewise."""


class TestRefusedByName:
    def test_an_owner_that_reads_the_weight(self):
        from torchvision.models.swin_transformer import ShiftedWindowAttention

        model = nn.ModuleDict({"attn": ShiftedWindowAttention(16, [2, 2], [0, 0], 2)})
        for target in ("qkv", ["proj"]):
            with pytest.raises(ValueError, match="ShiftedWindowAttention reads (qkv|proj).weight instead of calling"):
                fastlora.inject(model, config(target_modules=target))

    @pytest.mark.parametrize(
        "make, target, why",
        [
            (lambda: OwnAttention(16, 2), ["out_proj"], "OwnAttention, not exactly torch.nn.MultiheadAttention"),
            (lambda: nn.MultiheadAttention(16, 2, kdim=8), "attention", "kdim or vdim"),
            (lambda: OwnLayer(16, 2, 32), ["linear1"], "OwnLayer, not exactly torch.nn.TransformerEncoderLayer"),
            (lambda: OwnLayer(16, 2, 32), "attention", "cannot be adapted"),
            (lambda: nn.Sequential(weight_norm(nn.Linear(8, 8))), ["0"], "computed at each forward by WeightNorm"),
            (lambda: nn.Sequential(nn.LayerNorm(8)), ["0"], "LayerNorm, not exactly torch.nn.Linear"),
        ],
    )
    def test_modules_that_are_not_called_as_a_linear(self, make, target, why):
        model = make()
        with pytest.raises(ValueError, match=why.replace(".", r"\.")):
            fastlora.inject(model, config(target_modules=target))
        assert not adapted_layers(model)

    def test_q_k_v_interleaved_by_head(self):
        from timm.models.tiny_vit import Attention

        model = nn.ModuleDict({"attn": Attention(16, 8, 2, resolution=(2, 2))})
        fastlora.inject(model, config(target_modules="qkv"))
        assert model["attn"].qkv.ranks() == {"q": 4, "k": 4, "v": 4} and model["attn"].qkv.slices.blocks == 2


def trainable(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad and ".lora_" not in n}


class TestFreezing:
    def test_adapters_only(self, build):
        model = fastlora.inject(build("bert"), config(target_modules="qkv"))
        assert trainable(model) == set()
        assert all(p.requires_grad for n, p in model.named_parameters() if ".lora_" in n)

    def test_modules_to_save(self, build):
        model = fastlora.inject(build("bert"), config(target_modules="qkv", modules_to_save=["classifier"]))
        assert trainable(model) == {"classifier.weight", "classifier.bias"}

    def test_bias_modes(self, build):
        base = build("bert")
        model = fastlora.inject(copy.deepcopy(base), config(target_modules="qkv", bias="all"))
        assert trainable(model) == {n for n, _ in base.named_parameters() if n.endswith(".bias")}
        model = fastlora.inject(copy.deepcopy(base), config(target_modules="qkv", bias="lora_only"))
        assert trainable(model) == {f"{n}.bias" for n in expected("bert", "qkv")}

    def test_a_trained_bias_gets_its_gradient(self, build):
        model = randomise(fastlora.inject(build("bert"), config(target_modules="qkv", bias="lora_only")))
        FAMILIES["bert"].run(model).square().sum().backward()
        assert model.bert.encoder.layer[1].attention.self.value.bias.grad.any()

    def test_what_was_frozen_stays_frozen(self, build, caplog):
        model = build("bert")
        model.classifier.requires_grad_(False)
        model.bert.pooler.dense.bias.requires_grad_(False)
        fields = dict(target_modules="qkv", bias="all", modules_to_save=["classifier", "pooler"])
        fastlora.inject(model, config(**fields))
        assert not trainable(model) & {"classifier.weight", "classifier.bias", "bert.pooler.dense.bias"}
        assert "bert.pooler.dense.weight" in trainable(model)
        assert "'classifier' was frozen before injection" in caplog.text and "'bert.pooler'" not in caplog.text

    @pytest.mark.parametrize("bias", ["all", "lora_only", "none"])
    def test_biases_that_stay_frozen_are_named(self, bias, caplog):
        def injected(frozen):
            model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.LayerNorm(4), nn.Linear(4, 2))
            model.requires_grad_(not frozen)[3].requires_grad_(True)
            return fastlora.inject(model, config(target_modules=["0", "1"], bias=bias, modules_to_save=["3"]))

        assert trainable(injected(True)) == {"3.weight", "3.bias"}
        named = {"all": "0.bias, 2.bias", "lora_only": "0.bias", "none": None}[bias]
        assert caplog.messages == ([f"bias: frozen before injection and stay frozen: {named}"] if named else [])
        caplog.clear()
        injected(False)
        assert caplog.text == ""


BIASES_APART = ("timm_beit", "timm_eva02", "timm_swinv2")
SAMPLES_FIRST = ("open_clip", "torch_encoder", "torch_transformer")
EVERY_IN_ZOO = pytest.mark.parametrize("name", ZOO)


def adapted(name: str, scale: float = 0.1, **fields):
    """Every linear adapted, q, k and v apart also where they are one matrix, and B not zero."""
    fields = {"target_modules": "all-linear", "split_qkv": True, "rank_pattern": ZOO[name].ranks, **fields}
    return randomise(fastlora.inject(build(name), config(**fields)), scale)


@EVERY_IN_ZOO
def test_counts_by_role(name):
    model = build(name)
    counts = tuple(len(role_targets(model, role)) for role in ("qkv", "attention", "mlp", "all-linear"))
    assert counts == ZOO[name].counts
    assert set(ROLES) == {"qkv", "attention", "mlp", "mixer", "experts", "all-linear"}
    fastlora.inject(model, config(target_modules="attention"))
    assert len(adapted_layers(model)) == counts[1]
    assert counts == tuple(len(role_targets(model, role)) for role in ("qkv", "attention", "mlp", "all-linear"))


def without_dropout(model):
    for module in model.modules():
        if "Drop" in type(module).__name__:
            module.eval()
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


@EVERY_IN_ZOO
def test_outputs_at_first_are_the_frozen_base_s_bit_for_bit(name, library_matmul):
    """In training, where torch has no fused path; timm's biases apart are rounded once more.

    Torch's attention puts tokens first and ours samples, and the bits of a row may depend on where it stands.
    """
    base = without_dropout(build(name).requires_grad_(False).train())
    model = without_dropout(fastlora.inject(build(name).train(), config(target_modules="all-linear", r=1)))
    for _ in range(2):
        torch.manual_seed(5)
        mine = ZOO[name].run(model)
        torch.manual_seed(5)
        theirs = ZOO[name].run(base)
        if name in (*BIASES_APART, *SAMPLES_FIRST):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
        else:
            assert torch.equal(mine, theirs)


@EVERY_IN_ZOO
def test_output_and_every_gradient_against_float64(name):
    base, run = build(name), ZOO[name].run
    model = adapted(name)
    exact, exact_grads = reference(base, model, run)
    plain, plain_grads = reference(base, model, run, torch.float32)
    assert not torch.allclose(run(base).double(), exact, rtol=1e-3, atol=1e-3 * exact.abs().max().item())
    for _ in range(2):  # the second pass runs with what the first one learned of groups
        model.zero_grad()
        y = run(model)
        y.square().sum().backward()
        assert_as_exact(y.detach(), plain, exact)
    grads = {n: p.grad for n, p in model.named_parameters() if ".lora_" in n}
    assert grads.keys() == exact_grads.keys()
    for key, grad in grads.items():
        assert grad is not None and grad.any(), key
        assert_as_exact(grad, plain_grads[key], exact_grads[key], key)


@EVERY_IN_ZOO
def test_what_the_modules_offer(name):
    run = ZOO[name].run
    model = adapted(name)
    with torch.no_grad():
        y = run(model)
        with fastlora.disable_adapters(model):
            torch.testing.assert_close(run(model), run(build(name)), rtol=1e-4, atol=1e-5)
        state = copy.deepcopy(model.state_dict())
        fastlora.merge(model)
        torch.testing.assert_close(run(model), y, rtol=1e-4, atol=1e-4 * y.abs().max().item())
        fastlora.unmerge(model)
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert torch.equal(run(copy.deepcopy(model)), run(model))
    layers, summary = adapted_layers(model), fastlora.summary(model)
    assert {row.key.partition("[")[0] for row in summary.rows} == set(layers)
    assert summary.adapter_params == sum(
        p.numel() for n, p in model.named_parameters() if ".lora_" in n and p.requires_grad
    )
    assert [row.path for row in fastlora.explain(model).rows] == list(layers)
    ranks = {row.key: min(1 + i % 3, row.in_features, row.out_features) for i, row in enumerate(summary.rows)}
    fastlora.set_ranks(model, ranks, reinit=True)
    assert {row.key: row.rank for row in fastlora.summary(model).rows} == ranks
    with torch.no_grad():
        torch.testing.assert_close(run(model), run(build(name)), rtol=1e-4, atol=1e-5)


@EVERY_IN_ZOO
def test_exact_statistics_are_those_of_the_full_gradient(name):
    base, run = build(name), ZOO[name].run
    kinds = ("grad_sq", "act_var") + (("fisher",) if ZOO[name].rows_are_samples else ())
    model = adapted(name, r=2)
    with fastlora.track(model, estimator="exact", statistics=kinds) as tracker:
        run(model).square().sum().backward()
        tracker.step()
    mine = tracker.scores("grad_sq")
    full = fastlora.inject(base.double(), config(target_modules="all-linear", split_qkv=True, r=2))
    state = {k: v.double() for k, v in model.state_dict().items()}
    full.load_state_dict(state)
    layers = adapted_layers(full)
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    run(full).square().sum().backward()
    for path, layer in layers.items():
        for part in layer.slices:
            key = path if part == "weight" else f"{path}[{part}]"
            grad = layer.weight.grad.T if isinstance(layer, fastlora.nn.Conv1D) else layer.weight.grad
            expected = grad[layer.slices.rows(part)].square().sum().item()
            assert math.isclose(mine[key], expected, rel_tol=1e-3), key
    assert all(v > 0 for kind in kinds for v in tracker.scores(kind).values())


@pytest.mark.parametrize("estimator", ["probe", "exact"])
def test_inputs_that_are_not_of_samples_have_no_fisher(estimator):
    """DeBERTa's relative positions pass through query and key once more."""
    model = fastlora.inject(build("deberta_v3"), config(target_modules="qkv"))
    with fastlora.track(model, estimator=estimator, statistics=("fisher",), every=1) as tracker:
        with pytest.raises(RuntimeError, match="fisher: calls of one .* saw"):
            ZOO["deberta_v3"].run(model).square().sum().backward()
            tracker.step()


class ResidualAttentionBlock(nn.Module):
    """The block of OpenAI's CLIP, which open_clip took over."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads)
        parts = [("c_fc", nn.Linear(width, 4 * width)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(4 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(parts))

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


def tower(width=768, layers=12, heads=12):
    return nn.ModuleDict({"resblocks": nn.Sequential(*[ResidualAttentionBlock(width, heads) for _ in range(layers)])})


def vit_b_32():
    clip = pytest.importorskip("open_clip")
    vision = clip.CLIPVisionCfg(layers=12, width=768, head_width=64, patch_size=32, image_size=224)
    text = clip.CLIPTextCfg(context_length=77, vocab_size=49408, width=512, heads=8, layers=12)
    return clip.CLIP(512, vision, text).visual


@pytest.mark.parametrize("make", [tower, vit_b_32])
def test_four_targets_at_rank_16(make):
    with torch.device("meta"):
        model = make()
    targets = ["in_proj", "out_proj", "mlp.c_fc", "mlp.c_proj"]
    fastlora.inject(model, fastlora.LoraConfig(r=16, target_modules=targets))
    summary = fastlora.summary(model)
    assert len(adapted_layers(model)) == 48
    assert summary.modules_by_role == {"attention": 24, "mlp": 24, "other": 0}
    assert summary.adapter_params == 12 * 16 * (768 + 2304 + 2 * 768 + 2 * (768 + 3072)) == 2_359_296
    assert "adapted modules: attention 24, mlp 24" in str(summary)


def test_the_name_of_the_attention_means_both_projections():
    model = fastlora.inject(tower(16, 2, 2), fastlora.LoraConfig(r=2, target_modules=["attn"]))
    names = [f"resblocks.{i}.attn.{part}" for i in range(2) for part in ("in_proj", "out_proj")]
    assert list(adapted_layers(model)) == names
    assert all(layer.ranks() == {"weight": 2} for layer in adapted_layers(model).values())
    fields = dict(r=2, target_modules="attention", exclude_modules=["0.attn"])
    assert list(adapted_layers(fastlora.inject(tower(16, 2, 2), fastlora.LoraConfig(**fields)))) == names[2:]
    fields = dict(r=2, target_modules="attention", rank_pattern={"1.attn": 3, "in_proj[k]": 1})
    rows = fastlora.summary(fastlora.inject(tower(16, 2, 2), fastlora.LoraConfig(**fields))).rows
    assert {row.key.removeprefix("resblocks."): row.rank for row in rows} == {
        "0.attn.in_proj[q]": 2, "0.attn.in_proj[k]": 1, "0.attn.in_proj[v]": 2, "0.attn.out_proj": 2,
        "1.attn.in_proj[q]": 3, "1.attn.in_proj[k]": 3, "1.attn.in_proj[v]": 3, "1.attn.out_proj": 3,
    }  # fmt: skip


def test_every_adapter_gets_a_gradient_and_the_backbone_stays():
    model = tower(16, 2, 2)
    fastlora.inject(model, fastlora.LoraConfig(r=2, target_modules="all-linear"))
    before = {n: p.clone() for n, p in model.named_parameters() if ".lora_" not in n}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model["resblocks"](torch.randn(5, 3, 16)).square().sum().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in trained)
    after = dict(model.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in before.items())
