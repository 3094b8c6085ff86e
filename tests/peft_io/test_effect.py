"""PEFT's outputs equal ours, or a warning names what PEFT does not run."""

from __future__ import annotations

import copy

import peft
import pytest
import timm
import torch
import transformers
from support.helpers import config
from torch import nn

import fastlora

MOE = dict(
    vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, num_experts_per_tok=2,
)  # fmt: skip
MLP = ["gate_proj", "up_proj", "down_proj"]


def deepseek():
    latent = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
    routed = dict(n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1)
    return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**MOE, **latent, **routed))


def qwen_next():
    linear = dict(linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
    experts = dict(num_experts=4, shared_expert_intermediate_size=16, head_dim=16)
    kinds = ["linear_attention", "full_attention"]
    made = transformers.Qwen3NextConfig(**MOE, **linear, **experts, layer_types=kinds)
    return transformers.Qwen3NextForCausalLM(made)


def qwen():
    made = transformers.Qwen2MoeConfig(**MOE, num_experts=4, shared_expert_intermediate_size=16)
    return transformers.Qwen2MoeForCausalLM(made)


def siglip():
    made = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    return transformers.SiglipVisionModel(made)


def eva():
    return timm.create_model("eva02_tiny_patch14_224", img_size=28, embed_dim=32, depth=1, num_heads=2, num_classes=5)


def encoder():
    return nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))


IDS, IMAGE, SEQUENCE = torch.arange(10).view(2, 5), torch.randn(2, 3, 28, 28), torch.randn(2, 5, 16)
# The targets, and what the warning names; None where PEFT runs as fastlora does.
CASES = {
    "deepseek": (deepseek, IDS, MLP, "model.layers.1.mlp.shared_experts.gate_proj"),
    "deepseek attention": (deepseek, IDS, ["o_proj"], None),
    "qwen3-next": (qwen_next, IDS, MLP, "model.layers.1.mlp.shared_expert.gate_proj"),
    "qwen2": (qwen, IDS, MLP, None),
    "encoder": (encoder, SEQUENCE, ["linear1", "linear2"], "0.linear1"),
    "encoder's attention": (encoder, SEQUENCE, ["in_proj"], "0.self_attn.in_proj"),
    "siglip's pool": (siglip, IMAGE, ["head.attention"], "head.attention.out_proj"),
    "siglip's mlp": (siglip, IMAGE, ["fc1"], None),
    "eva": (eva, IMAGE, ["qkv"], "blocks.0.attn.qkv"),
    "eva's output": (eva, IMAGE, ["attn.proj"], None),
}


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.name.startswith("fastlora") and "PEFT" in r.getMessage()]


@pytest.mark.parametrize("case", CASES)
def test_peft_runs_the_files_as_here_or_a_warning_names_them(case, tmp_path, caplog):
    make, given, targets, named = CASES[case]
    torch.manual_seed(0)
    base = make().eval()
    model = fastlora.inject(copy.deepcopy(base), config(target_modules=targets)).eval()
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.5)
    fastlora.save(model, tmp_path)
    assert [named in text for text in warnings_of(caplog)] == ([] if named is None else [True])
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval().base_model.model
    with torch.no_grad():
        ours, theirs = (_tensor(m(given)) for m in (model, loaded))
    same = torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5 * ours.abs().max().item())
    assert same == (named is None)  # a warning where PEFT is right would be wrong, too


class Around(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


# A convolution, and whether PEFT runs its adapter as fastlora does.
CONVOLUTIONS = {
    "padded": (lambda: nn.Conv2d(4, 6, 3, padding=1), True),
    "circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), False),
    "circular without padding": (lambda: nn.Conv2d(4, 6, 3, padding_mode="circular"), True),
    "replicated around a kernel of 1": (lambda: nn.Conv2d(4, 6, 1, padding=2, padding_mode="replicate"), False),
    "reflected in one dimension": (lambda: nn.Conv2d(4, 6, 3, padding=(0, 1), padding_mode="reflect"), False),
    "dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=2), False),
    "dilated to the same size": (lambda: nn.Conv2d(4, 6, 3, dilation=2, padding="same"), False),
    "dilated with a kernel of 1": (lambda: nn.Conv2d(4, 6, 1, dilation=2), True),
}


def same_outputs(ours, theirs, x):
    try:
        return torch.allclose(theirs(x), ours(x), atol=1e-5)
    except RuntimeError:  # with a dilation the outputs of A and of the base are of two sizes
        return False


@torch.no_grad()
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_a_convolution_is_as_peft_merges_it_and_a_warning_says_where_it_runs_otherwise(case, tmp_path, caplog):
    make, same = CONVOLUTIONS[case]
    torch.manual_seed(0)
    base, x = Around(make()), torch.randn(2, 4, 7, 7)
    fields = dict(r=2, target_modules=["layer"], init_lora_weights=False)
    ours = fastlora.inject(copy.deepcopy(base), fastlora.LoraConfig(**fields)).eval()
    fastlora.save(ours, tmp_path)
    handed = fastlora.to_peft(ours)
    assert ["of layer as here" in text for text in warnings_of(caplog)] == ([] if same else [True, True])
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    assert same_outputs(ours, theirs, x) == same_outputs(ours, handed, x) == same
    caplog.clear()
    torch.testing.assert_close(fastlora.from_peft(theirs).eval()(x), ours(x))
    assert [text.startswith("peft_model: ") for text in warnings_of(caplog)] == ([] if same else [True])
    caplog.clear()
    (tmp_path / "fastlora.json").unlink()
    foreign = fastlora.load(Around(make()), tmp_path)
    torch.testing.assert_close(foreign.layer.delta(), ours.layer.delta())
    assert ["so that outputs are those of the merged model" in text for text in warnings_of(caplog)] == [True] * (
        not same
    )
    theirs.merge_adapter()
    torch.testing.assert_close(theirs(x), ours(x), rtol=1e-4, atol=1e-5)


def test_a_convolution_that_has_learned_nothing_is_as_peft_s(caplog):
    base = Around(CONVOLUTIONS["circular"][0]())
    fastlora.from_peft(peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["layer"])))
    assert not warnings_of(caplog)


@pytest.mark.parametrize("name", ["falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h", "bamba"])
def test_targets_that_peft_refuses_in_mambas(name, tmp_path, caplog):
    from benchmarks.families.models import families

    family = next(f for f in families() if f.name == name)
    model = fastlora.inject(family.make(), fastlora.LoraConfig(r=2, target_modules=["out_proj"]))
    fastlora.save(model, tmp_path)
    told = [f"PEFT refuses targets of this name in {name}" in text for text in warnings_of(caplog)]
    assert told == ([] if name == "bamba" else [True])
    if told:
        with pytest.raises(ValueError, match="incompatible with Mamba-based models"):
            peft.PeftModel.from_pretrained(family.make(), str(tmp_path))
    else:
        peft.PeftModel.from_pretrained(family.make(), str(tmp_path))


def test_to_peft_says_so(caplog):
    model = fastlora.inject(encoder(), config(target_modules=["linear1"]))
    fastlora.to_peft(model)
    assert "0.linear1" in caplog.text


def _tensor(output):
    if isinstance(output, torch.Tensor):
        return output
    return output.logits if "logits" in output else output.pooler_output


@pytest.mark.parametrize("name", ["ernie4_5_moe", "laguna"])
def test_to_peft_refuses_what_peft_puts_elsewhere(name):
    from benchmarks.families.models import families

    family = next(f for f in families() if f.name == name)
    model = fastlora.inject(family.make(), fastlora.LoraConfig(r=2, target_modules="mlp"))
    with pytest.raises(ValueError, match="PEFT puts the adapters of .* elsewhere"):
        fastlora.to_peft(model)
    taken = fastlora.inject(family.make(), fastlora.LoraConfig(r=2, target_modules="qkv"))
    fastlora.to_peft(taken)
