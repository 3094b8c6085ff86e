"""Embeddings that are frozen and in the files all the same, as where a vocabulary was resized: as PEFT, both ways."""

from __future__ import annotations

import logging
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import fastlora

TENSORS = "adapter_model.safetensors"
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
IDS = torch.tensor([[1, 41, 44]])
BOTH = {"model.embed_tokens.weight", "lm_head.weight"}


KINDS = ["untied", "tied"]


@pytest.fixture(params=KINDS)
def base(request, tmp_path) -> Path:
    """A checkpoint of a small model with 40 tokens."""
    config = transformers.LlamaConfig(**SIZES, vocab_size=40, tie_word_embeddings=request.param == "tied")
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def is_tied(base: Path) -> bool:
    return transformers.AutoConfig.from_pretrained(base).tie_word_embeddings


def resized(base: Path, seed: int = 1) -> transformers.LlamaForCausalLM:
    """A model of the checkpoint with five more tokens, whose rows are others at every seed."""
    model = transformers.LlamaForCausalLM.from_pretrained(base).eval()
    model.resize_token_embeddings(45, mean_resizing=False)
    torch.manual_seed(seed)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.weight.data[40:] = torch.randn(5, 16)
    return model


def trained(model: nn.Module) -> nn.Module:
    """Whatever a training changes is changed."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) / 8
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(IDS).logits


def theirs(base: Path, folder: Path, how: bool | str = "auto", **fields) -> None:
    """PEFT's files of a trained adapter."""
    model = peft.get_peft_model(resized(base), peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **fields}))
    trained(model).save_pretrained(folder, save_embedding_layers=how)


def from_files(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The logits of files over other new rows, in PEFT and here."""
    return {
        "PEFT": logits(peft.PeftModel.from_pretrained(resized(base, seed=2), folder)),
        "here": logits(fastlora.load(resized(base, seed=2), folder)),
    }


def keys(folder: Path) -> set[str]:
    return {key.removeprefix("base_model.model.") for key in load_file(folder / TENSORS) if "lora_" not in key}


ALIKE = [
    {},
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"trainable_token_indices": [40, 44]},
    {"trainable_token_indices": [41], "bias": "all"},
]
UNTIED = [
    {"target_modules": ["q_proj", "lm_head"]},
    {"trainable_token_indices": {"embed_tokens": [40], "lm_head": [41, 42]}},
    {"modules_to_save": ["embed_tokens", "lm_head"]},
    {"modules_to_save": ["embed_tokens"]},
    {"modules_to_save": ["lm_head"], "trainable_token_indices": [40]},
]
TIED = [
    {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    {"trainable_token_indices": {"embed_tokens": [40, 41], "lm_head": [40, 41]}},
]
CASES = [*((kind, f) for kind in KINDS for f in ALIKE), *(("untied", f) for f in UNTIED), *(("tied", f) for f in TIED)]
each_case = pytest.mark.parametrize(("base", "fields"), CASES, ids=str, indirect=["base"])


@each_case
def test_files_of_peft_give_its_logits_and_lose_nothing_when_saved_again(base, tmp_path, fields):
    theirs(base, tmp_path / "theirs", how=True, **fields)
    model = fastlora.load(resized(base, seed=2), tmp_path / "theirs")
    # PEFT itself loses the head where the embedding is a target.
    torch.testing.assert_close(logits(model), from_files(base, tmp_path / "theirs")["PEFT"])
    model.config._name_or_path = ""  # nothing but the file says that these embeddings are no other's
    fastlora.save(model, tmp_path / "again")
    for kind, found in from_files(base, tmp_path / "again").items():
        torch.testing.assert_close(found, logits(model), msg=lambda m, kind=kind: f"{kind}: {m}")
    model = fastlora.load(fastlora.load(resized(base, seed=2), tmp_path / "again"), tmp_path / "again")
    model.config._name_or_path = ""
    fastlora.save(model, tmp_path / "b")
    assert keys(tmp_path / "b") == keys(tmp_path / "again")


@each_case
def test_our_files_hold_the_embeddings_of_a_resized_model(base, tmp_path, fields):
    config = fastlora.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **fields})
    model = trained(fastlora.inject(resized(base), config))
    fastlora.save(model, tmp_path / "ours")
    for kind, found in from_files(base, tmp_path / "ours").items():
        torch.testing.assert_close(found, logits(model), msg=lambda m, kind=kind: f"{kind}: {m}")


def test_what_a_file_brought_is_written_again_until_the_adapters_are_gone(base, tmp_path):
    theirs(base, tmp_path / "theirs")
    model = fastlora.load(resized(base), tmp_path / "theirs")
    model.config._name_or_path = ""
    fastlora.add_adapter(model, "b", fastlora.LoraConfig(r=2, target_modules=["q_proj"]))
    for adapter in ("default", "b"):  # which share the embeddings
        fastlora.save(model, tmp_path / adapter, adapter)
        # A weight that both have is written once.
        assert keys(tmp_path / adapter) == (BOTH - {"lm_head.weight"} if is_tied(base) else BOTH)
    fastlora.save(model, tmp_path / "without", save_embedding_layers=False)
    assert not keys(tmp_path / "without")
    again = fastlora.inject(fastlora.unload(model), fastlora.LoraConfig(r=2, target_modules=["q_proj"]))
    fastlora.save(again, tmp_path / "new")
    assert not keys(tmp_path / "new")


@pytest.mark.parametrize("how", ["auto", True, False])
@pytest.mark.parametrize("target", ["q_proj", "embed_tokens", "lm_head"])
def test_the_choice_means_what_it_means_in_peft(tmp_path, target, how):
    config = transformers.LlamaConfig(**SIZES, vocab_size=45)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")

    def model() -> nn.Module:
        return transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")

    fastlora.save(fastlora.inject(model(), fastlora.LoraConfig(r=2, target_modules=[target])), tmp_path / "ours",
                  save_embedding_layers=how)  # fmt: skip
    there = peft.get_peft_model(model(), peft.LoraConfig(r=2, target_modules=[target]))
    there.save_pretrained(tmp_path / "theirs", save_embedding_layers=how)
    assert keys(tmp_path / "ours") >= keys(tmp_path / "theirs")
    # Asked for both, PEFT writes the targeted one alone.
    assert how is True or keys(tmp_path / "ours") == keys(tmp_path / "theirs")
    peft.PeftModel.from_pretrained(model(), tmp_path / "ours")
    fastlora.load(model(), tmp_path / "ours")


def test_where_the_base_cannot_be_read_the_embeddings_are_named(tmp_path, caplog):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, vocab_size=45))
    fastlora.inject(model, fastlora.LoraConfig(r=2, target_modules=["q_proj"]))
    fastlora.save(model, tmp_path / "made")  # of no checkpoint
    assert not caplog.records
    model.config._name_or_path = str(tmp_path / "gone")
    with caplog.at_level(logging.WARNING, "fastlora"):
        fastlora.save(model, tmp_path / "auto")
    assert "model.embed_tokens.weight, lm_head.weight are left out" in caplog.text
    caplog.clear()
    for how in (True, False):
        fastlora.save(model, tmp_path / str(how), save_embedding_layers=how)
    assert not caplog.records
    assert not keys(tmp_path / "auto") and keys(tmp_path / "True") == BOTH and not keys(tmp_path / "False")


def test_a_model_of_text_in_several_parts(tmp_path):
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**SIZES, vocab_size=40),
        vision_config=transformers.CLIPVisionConfig(**SIZES, image_size=8, patch_size=4),
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
    fastlora.inject(model, fastlora.LoraConfig(r=2, target_modules=["q_proj"]))
    fastlora.save(model, tmp_path / "as it was")
    assert not keys(tmp_path / "as it was")
    fastlora.unload(model).resize_token_embeddings(45)
    fastlora.save(fastlora.inject(model, fastlora.LoraConfig(r=2, target_modules=["q_proj"])), tmp_path / "resized")
    assert keys(tmp_path / "resized") == {"model.language_model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize("base", ["untied"], indirect=True)
@pytest.mark.parametrize("fields", [*ALIKE, *UNTIED], ids=str)
def test_a_model_that_was_not_resized_is_to_be(base, tmp_path, fields):
    theirs(base, tmp_path / "theirs", how=True, **fields)
    with pytest.raises(ValueError, match=r"is \(40, 16\); call model.resize_token_embeddings\(45\) first"):
        fastlora.load(transformers.LlamaForCausalLM.from_pretrained(base), tmp_path / "theirs")


def test_no_embeddings_to_save(tmp_path):
    model = fastlora.inject(nn.Sequential(nn.Linear(4, 4)), fastlora.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match="save_embedding_layers: expected 'auto' or False for a Sequential"):
        fastlora.save(model, tmp_path, save_embedding_layers=True)


def test_two_values_of_one_weight_are_refused(tmp_path):
    config = transformers.LlamaConfig(**SIZES, vocab_size=45)
    untied = transformers.LlamaForCausalLM(config)
    fastlora.inject(untied, fastlora.LoraConfig(r=2, target_modules=["q_proj"]))
    fastlora.save(untied, tmp_path, save_embedding_layers=True)
    config.tie_word_embeddings = True
    with pytest.raises(ValueError, match="differs from that of '.*', whose weight it is"):
        fastlora.load(transformers.LlamaForCausalLM(config), tmp_path)


@pytest.mark.parametrize("base", ["untied"], indirect=True)
def test_a_weight_of_which_a_part_became_factors_has_no_place(base, tmp_path):
    model = resized(base)
    fastlora.inject(model, fastlora.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights="pissa_niter_4"))
    with pytest.raises(ValueError, match="model: 'lm_head.weight' is what init_lora_weights left of it"):
        fastlora.save(model, tmp_path / "no")
    fastlora.save(model, tmp_path / "ours", save_embedding_layers=False)
    found = logits(fastlora.load(resized(base), tmp_path / "ours"))
    torch.testing.assert_close(found, logits(model), rtol=1e-3, atol=1e-4)


def test_to_and_from_peft(base):
    model = trained(fastlora.inject(resized(base), fastlora.LoraConfig(r=2, target_modules=["q_proj"])))
    handed = fastlora.to_peft(model)
    torch.testing.assert_close(logits(handed), logits(model))
    torch.testing.assert_close(logits(fastlora.from_peft(handed)), logits(model))


def test_a_further_adapter_with_other_embeddings_is_refused(base, tmp_path):
    theirs(base, tmp_path / "theirs")
    model = fastlora.inject(resized(base, seed=2), fastlora.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="differs from the model's, which its adapters share"):
        fastlora.load(model, tmp_path / "theirs", "b")


def test_biases_of_older_files_of_peft(tmp_path):
    """PEFT to 0.20 wrote every key with "bias" in it, and trained what it names."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.attn, self.other = nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2)
            self.bias_table, self.fc, self.head = nn.Embedding(3, 8), nn.Linear(8, 8), nn.MultiheadAttention(8, 2)

        def forward(self, x):
            x = self.bias_table(torch.arange(3)) + self.fc(x)
            for attention in (self.attn, self.other, self.head):
                x = x + attention(x, x, x, need_weights=False)[0]
            return x

    config = peft.LoraConfig(r=2, target_modules=["fc", "attn"], bias="all", modules_to_save=["head"])
    model = peft.get_peft_model(Model(), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name and "head" not in name:
                parameter += torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "theirs")
    file, x = tmp_path / "theirs" / TENSORS, torch.randn(3, 8)
    biases = {k.replace(".default", ""): v.clone() for k, v in model.state_dict().items() if "bias" in k}
    save_file({**load_file(file), **biases}, file)
    ours = fastlora.load(Model().eval(), tmp_path / "theirs")
    with torch.no_grad():
        expected = peft.PeftModel.from_pretrained(Model(), tmp_path / "theirs").eval()(x)
        torch.testing.assert_close(ours(x), expected)
        fastlora.save(ours, tmp_path / "again")
        torch.testing.assert_close(fastlora.load(Model(), tmp_path / "again").eval()(x), expected)
        again = peft.PeftModel.from_pretrained(Model(), tmp_path / "again").eval()
        torch.testing.assert_close(again(x), expected)


def test_tables_of_relative_positions(tmp_path):
    def model() -> nn.Module:
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        torch.manual_seed(0)
        return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, vocab_size=40)).eval()

    there = peft.get_peft_model(model(), peft.LoraConfig(r=2, target_modules=["q"], bias="all"))
    there.save_pretrained(tmp_path)
    tables = {k: v + 1 for k, v in there.state_dict().items() if "bias" in k}
    save_file({**load_file(tmp_path / TENSORS), **tables}, tmp_path / TENSORS)
    for path, parameter in fastlora.load(model(), tmp_path).named_parameters():
        if "bias" in path:
            assert torch.equal(parameter, tables[f"base_model.model.{path}"]) and not parameter.requires_grad


def test_numbers_that_are_none_are_no_difference(base, tmp_path):
    """A broken run is loaded as it was saved, to be looked at."""
    model = fastlora.inject(resized(base), fastlora.LoraConfig(r=2, target_modules=["q_proj"]))
    model.get_input_embeddings().weight.data[3] = torch.nan
    fastlora.save(model, tmp_path)
    assert fastlora.load(resized(base), tmp_path).get_input_embeddings().weight[3].isnan().all()
