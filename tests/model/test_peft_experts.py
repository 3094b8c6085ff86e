"""A ``peft.LoraConfig`` on models whose experts transformers 5 has stacked: what PEFT takes old names for."""

from __future__ import annotations

import copy
import re
from collections import Counter

import pytest
import torch
from support.peft_help import assert_close, peft, transformers

import fastlora
from fastlora.nn.linear import adapted_layers

pytest.importorskip("peft.utils.transformers_weight_conversion")

SIZES = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=24,
    vocab_size=40,
)  # fmt: skip
ROUTED = dict(SIZES, moe_intermediate_size=8, num_experts_per_tok=2)
LATENT = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8)
IDS = torch.arange(12).view(2, 6)


def deepseek():
    groups = dict(n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1)
    return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**ROUTED, **LATENT, **groups))


def qwen3():
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**ROUTED, num_experts=4, head_dim=8))


def qwen2():
    shared = dict(num_experts=4, shared_expert_intermediate_size=8)
    return transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**ROUTED, **shared))


def mixtral():
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=4))


def trained(model):
    """How many numbers are trained beside each module; PEFT puts two parameters of experts around one another."""
    of = re.compile(r"(\.base_layer|\.\w+_proj_adapter)?\.lora_.*")
    found = Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[of.sub("", name.removeprefix("base_model.model."))] += parameter.numel()
    return found


def scales_of_peft(model):
    own = {}
    for n, m in model.named_modules():
        if isinstance(m, peft.tuners.lora.layer.LoraLayer):
            path = n.removeprefix("base_model.model.").removesuffix(".base_layer")
            own[path, getattr(m, "parameter_name", "weight")] = m.scaling["default"]
    return {name if leaf == "weight" else f"{name}.{leaf}": s for (name, leaf), s in own.items()}


MLP = ["gate_proj", "up_proj", "down_proj"]
CASES = [
    (deepseek, dict(target_modules=["o_proj", "down_proj"])),
    (deepseek, dict(target_modules=MLP)),
    (deepseek, dict(target_modules=r".*\.(o_proj|down_proj)")),
    (qwen3, dict(target_modules=r".*(o_proj|gate_proj|up_proj|down_proj)")),
    (qwen3, dict(target_modules=["q_proj", *MLP], lora_alpha=6, use_rslora=True)),
    (qwen3, dict(target_modules=["down_proj"], rank_pattern={"down_proj": 4}, alpha_pattern={"down_proj": 3})),
    (qwen3, dict(target_modules=["q_proj"], target_parameters=["experts.down_proj"])),
    (qwen3, dict(target_modules=["q_proj"])),
    (qwen2, dict(target_modules=["v_proj", "shared_expert_gate", *MLP])),
    (mixtral, dict(target_modules=["w1", "w2", "w3"])),
    (mixtral, dict(target_modules=["q_proj", "w2"])),
]


@pytest.mark.parametrize("make, fields", CASES)
def test_as_peft(make, fields, tmp_path):
    torch.manual_seed(0)
    base = make().eval()
    config = peft.LoraConfig(r=2, **copy.deepcopy(fields))
    theirs = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(config))
    ours = fastlora.inject(copy.deepcopy(base), config)
    assert trained(ours) == trained(theirs)
    found = {n: [*{*x.adapter_specs["default"].scale.values()}] for n, x in adapted_layers(ours).items()}
    assert found == {n: [pytest.approx(s)] for n, s in scales_of_peft(theirs).items()}
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.3)
        fastlora.save(ours, tmp_path)
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
        assert_close(again(input_ids=IDS).logits, ours(input_ids=IDS).logits)
    second = fastlora.inject(copy.deepcopy(base), fastlora.LoraConfig(r=1, target_modules=["o_proj"]), adapter="first")
    fastlora.add_adapter(second, "default", config)
    layers = adapted_layers(second).items()
    assert {n for n, layer in layers if "default" in layer.adapter_names} == {*adapted_layers(ours)}


@pytest.mark.parametrize(
    "make, fields, says",
    [
        (qwen3, dict(target_modules="all-linear"), "target_modules: PEFT takes 'all-linear' .* for gate.weight, too"),
        (
            qwen3,
            dict(target_modules=["q_proj", "gate"]),
            "target_modules: PEFT takes .* for gate.weight, too",
        ),
        (
            qwen3,
            dict(target_modules=["gate_proj"]),
            "target_modules: PEFT does not take it .*without also",
        ),
        (mixtral, dict(target_modules=["down_proj"]), "target_modules: expected suffixes .* got 'down_proj'"),
        (qwen3, dict(target_modules=["down_proj"], lora_dropout=0.1), "lora_dropout: expected 0 with experts"),
        (qwen3, dict(), r"target_modules: expected .* got \[\]"),
    ],
)
def test_what_has_no_adapter_here_is_named(make, fields, says):
    model = make()
    with pytest.raises(ValueError, match=says):
        fastlora.inject(model, peft.LoraConfig(r=2, **fields))
    assert not adapted_layers(model) and all(p.requires_grad for p in model.parameters())


def test_a_config_of_ours_keeps_its_names():
    model = fastlora.inject(deepseek(), fastlora.LoraConfig(r=2, target_modules=["down_proj"]))
    assert {*adapted_layers(model)} == {
        "model.layers.0.mlp.down_proj", "model.layers.1.mlp.shared_experts.down_proj",
    }  # fmt: skip


class Around(torch.nn.Module):
    """A module with a config of transformers, which PEFT does not take at all."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config = inner, inner.config


def test_names_are_as_they_are_in_what_is_no_model_of_transformers():
    model = fastlora.inject(Around(deepseek()), peft.LoraConfig(r=2, target_modules=["shared_experts.down_proj"]))
    assert {*adapted_layers(model)} == {"inner.model.layers.1.mlp.shared_experts.down_proj"}
