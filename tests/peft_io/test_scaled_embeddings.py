"""Embeddings that multiply by ``embed_scale``, in models of transformers that tie a head to them, beside PEFT."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from support.helpers import config
from support.peft_help import TENSORS, peft, transformers

import fastlora

pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.arange(10).view(2, 5) % 9 + 1
SMALL = dict(vocab_size=40, max_position_embeddings=32)


def bart():
    made = transformers.BartConfig(
        **SMALL, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_ffn_dim=24, scale_embedding=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, forced_eos_token_id=2,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(made)


def gemma():
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, head_dim=8)
    made = transformers.Gemma3TextConfig(**SMALL, **sizes, num_key_value_heads=1, tie_word_embeddings=True)
    return transformers.Gemma3ForCausalLM(made)


def llama():
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **sizes, tie_word_embeddings=True))


# The embeddings to adapt; BART's three share one weight.
MAKES = {"bart": (bart, ["encoder.embed_tokens"]), "gemma": (gemma, ["embed_tokens"])}


def base(name):
    torch.manual_seed(0)
    return MAKES[name][0]().double().eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def randomised(model):
    """Every factor random, in the order of names, which is that of both libraries."""
    generator = torch.Generator().manual_seed(1)
    for _, p in sorted((n, p) for n, p in model.named_parameters() if ".lora_" in n):
        p.data.copy_(torch.randn(p.numel(), generator=generator, dtype=p.dtype).view(p.shape) * 0.3)
    return model


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MAKES)
def test_as_peft_with_files_both_ways(name, tmp_path):
    targets = [*MAKES[name][1], "q_proj"]
    theirs = randomised(peft.get_peft_model(base(name), peft.LoraConfig(r=2, lora_alpha=5, target_modules=targets)))
    assert not torch.allclose(logits(theirs), logits(base(name)))
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours = fastlora.load(base(name), tmp_path / "theirs")
    close(logits(ours), logits(theirs))
    close(logits(fastlora.from_peft(theirs)), logits(theirs))
    close(logits(fastlora.to_peft(ours)), logits(theirs))
    fastlora.save(ours, tmp_path / "ours", save_embedding_layers=False)
    saved, given = (load_file(tmp_path / whose / TENSORS) for whose in ("ours", "theirs"))
    assert {k: v.shape for k, v in saved.items()} == {k: v.shape for k, v in given.items()}
    again = peft.PeftModel.from_pretrained(base(name), str(tmp_path / "ours"))
    close(logits(again), logits(theirs))
    twin = copy.deepcopy(ours)
    assert [type(m) for m in fastlora.unload(twin).modules()] == [type(m) for m in base(name).modules()]
    close(logits(twin), logits(base(name)))


def test_gradients_are_peft_s():
    settings = dict(r=2, target_modules=["embed_tokens"])
    ours = fastlora.inject(base("gemma"), fastlora.LoraConfig(**settings))
    theirs = peft.get_peft_model(base("gemma"), peft.LoraConfig(**settings))
    for model in (ours, theirs):
        randomised(model)(input_ids=IDS).logits.square().sum().backward()
    mine, its = ([p.grad for n, p in sorted(m.named_parameters()) if ".lora_" in n] for m in (ours, theirs))
    for a, b in zip(mine, its, strict=True):
        assert a.any()
        close(a, b.view(a.shape))


@pytest.mark.parametrize("make", [llama, gemma])
def test_a_tied_head_reads_the_frozen_weight(make):
    """A scaled embedding as any other: the head has no part in the adapter, and merging would give it one."""
    torch.manual_seed(0)
    model = fastlora.inject(make().eval(), config(target_modules=["embed_tokens"]))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(ValueError, match="share one weight and cannot be merged"):
        fastlora.merge(model)
    with pytest.raises(ValueError, match="ensure_weight_tying: .* share one weight"):
        fastlora.inject(make(), config(target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True))


def test_merged_where_the_head_is_its_own():
    model = base("gemma")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    fastlora.inject(model, config(target_modules=["embed_tokens"]))
    before = logits(randomised(model))
    close(logits(fastlora.merge(model)), before)
    close(logits(fastlora.unmerge(model)), before)
