"""``inject`` on models of real families: what is adapted, frozen, equal at first, and reached by gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import FAMILIES, CountOps, config, lora_grads, randomise, ungrouped
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import fastlora
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
            (lambda: nn.Sequential(weight_norm(nn.Linear(8, 8))), ["0"], "ParametrizedLinear"),
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
        with pytest.raises(ValueError, match="split_qkv: 'attn.qkv' of timm.models.tiny_vit.Attention"):
            fastlora.inject(model, config(target_modules="qkv"))
        fastlora.inject(model, config(target_modules="qkv", split_qkv=False))
        assert model["attn"].qkv.ranks() == {"weight": 4}


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
