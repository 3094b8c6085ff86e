"""PEFT's AutoPeftModel classes find the base of our files, and make the same outputs of it."""

from __future__ import annotations

import json

import pytest
import torch
from support.helpers import randomise

import fastlora
import fastlora.testing

fastlora.testing.enable_torchvision()
peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")

SIZES = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32,
    max_position_embeddings=32, pad_token_id=0,
)  # fmt: skip
LLAMA, BERT = transformers.LlamaConfig, transformers.BertConfig
IDS = torch.randint(3, 32, (2, 6), generator=torch.Generator().manual_seed(0))
T5 = dict(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=32, decoder_start_token_id=0)
CASES = {
    "LlamaForCausalLM": (lambda: LLAMA(**SIZES), "AutoPeftModelForCausalLM", ["q_proj", "v_proj"], None),
    "BertForSequenceClassification": (
        lambda: BERT(**SIZES, num_labels=3), "AutoPeftModelForSequenceClassification", ["query"], ["classifier"],
    ),
    "BertForTokenClassification": (
        lambda: BERT(**SIZES, num_labels=3), "AutoPeftModelForTokenClassification", ["query"], ["classifier"],
    ),
    "BertForQuestionAnswering": (
        lambda: BERT(**SIZES), "AutoPeftModelForQuestionAnswering", ["query"], ["qa_outputs"],
    ),
    "T5ForConditionalGeneration": (
        lambda: transformers.T5Config(**T5), "AutoPeftModelForSeq2SeqLM", ["q", "v"], None,
    ),
    "BertModel": (lambda: BERT(**SIZES), "AutoPeftModel", ["query"], None),
}  # fmt: skip


def outputs(model):
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(input_ids=IDS, **more)[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_the_base_is_found_and_outputs_are_equal(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    make, auto, targets, saved = CASES[name]
    torch.manual_seed(0)
    getattr(transformers, name)(make()).save_pretrained(tmp_path / "base")
    model = getattr(transformers, name).from_pretrained(tmp_path / "base")
    fastlora.inject(model, fastlora.LoraConfig(r=2, target_modules=targets, modules_to_save=saved))
    expected = outputs(randomise(model))
    fastlora.save(model, tmp_path / "adapter")
    found = getattr(peft, auto).from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(outputs(found), expected, rtol=1e-4, atol=1e-5)
    ours = getattr(transformers, name).from_pretrained(tmp_path / "base")
    torch.testing.assert_close(outputs(fastlora.load(ours, tmp_path / "adapter")), expected, rtol=1e-4, atol=1e-5)


def test_a_model_of_ones_own_is_named_by_its_class(tmp_path):
    model = fastlora.inject(torch.nn.Sequential(torch.nn.Linear(4, 4)), fastlora.LoraConfig(r=2, target_modules=["0"]))
    fastlora.save(model, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["task_type"] is None
    assert written["auto_mapping"]["base_model_class"] == "Sequential"
