"""``trainable_token_indices`` of output layers, with a weight of their own or the embedding's, as in PEFT."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support.peft_fields import assert_same_first_step, both, forward, make_llama, plain_names, tokens, trained_by_peft
from support.peft_help import TENSORS, assert_close, assert_same, peft, snapshot

import fastlora
from fastlora.nn.token_rows import token_rows

ROWS = [int(tokens()[0, 0]), 33, int(tokens()[1, 2]), 7]
BASE = dict(r=2, target_modules=["q_proj"])


def make_tied():
    return make_llama(tie_word_embeddings=True)


def injected(make, **rows):
    model = fastlora.inject(make().double(), fastlora.LoraConfig(**BASE, trainable_token_indices=rows))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    return model


CASES = {
    "head": (make_llama, dict(lm_head=ROWS)),
    "both": (make_llama, dict(lm_head=ROWS[:2], embed_tokens=[1, 3, ROWS[0]])),
    "an inner linear": (make_llama, {"layers.1.mlp.down_proj": [0, 5]}),
    "tied, the same rows": (make_tied, dict(embed_tokens=ROWS, lm_head=ROWS)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tying", [False, True])
def test_names_outputs_first_step_and_files_are_those_of_peft(case, tying, tmp_path):
    make, rows = CASES[case]
    fields = dict(**BASE, trainable_token_indices=rows, ensure_weight_tying=tying)
    theirs, ours = both(make, **fields)
    assert plain_names(ours) == plain_names(theirs)
    assert_same_first_step(theirs, ours)
    _, wanted = trained_by_peft(make, tmp_path / "theirs", **fields)
    ours = fastlora.load(make().double(), tmp_path / "theirs")
    assert_close(forward(ours), wanted)
    fastlora.save(ours, tmp_path / "ours")
    mine, given = (load_file(tmp_path / name / TENSORS) for name in ("ours", "theirs"))
    assert mine.keys() == given.keys() and all(torch.equal(mine[k], given[k]) for k in given)
    assert_close(forward(peft.PeftModel.from_pretrained(make().double(), str(tmp_path / "ours"))), wanted)
    assert_close(forward(fastlora.load(make().double(), tmp_path / "ours")), wanted)


def test_the_gradient_is_that_of_the_weights_rows():
    ours, plain = injected(make_llama, lm_head=ROWS), make_llama().double()
    rows = token_rows(ours)["lm_head"].rows("default")
    with torch.no_grad():
        plain.lm_head.weight[ROWS] = rows
        for name, p in ours.named_parameters():
            if ".lora_B." in name:
                p.zero_()
    forward(ours).square().mean().backward()
    forward(plain).square().mean().backward()
    assert_close(forward(ours), forward(plain))
    assert_close(rows.grad, plain.lm_head.weight.grad[ROWS])
    assert ours.lm_head.weight.grad is None


def test_merged_and_back_unloaded_and_mixed():
    model = injected(make_llama, lm_head=ROWS)
    before, wanted = snapshot(model), forward(model)
    assert_close(forward(fastlora.merge(model)), wanted)
    assert_same(before, snapshot(fastlora.unmerge(model)))
    with fastlora.use_adapters(model, ["default", None, "default"]), torch.no_grad():
        mixed = forward(model)
    base = forward(make_llama().double())
    assert_close(mixed, torch.stack([wanted[0], base[1], wanted[2]]))
    assert torch.equal(forward(fastlora.unload(model)), base)
    assert not model.lm_head._forward_hooks


REFUSED = {
    "tied, alone": (make_tied, dict(lm_head=ROWS), {}, "has the weight of 'model.embed_tokens', whose rows it follows"),
    "tied, others": (make_tied, dict(embed_tokens=ROWS, lm_head=ROWS[:1]), {}, "'model.embed_tokens', whose rows it"),
    "too large": (make_llama, dict(lm_head=[40]), {}, r"rows of 'lm_head' below 40, got \[40\]"),
    "a target": (make_llama, dict(lm_head=[1]), dict(target_modules=["q_proj", "lm_head"]), "'lm_head' is also a targ"),
    "saved": (make_llama, dict(lm_head=[1]), dict(modules_to_save=["lm_head"]), "is in modules_to_save, too"),
    "a bias": (lambda: make_llama(attention_bias=True), dict(o_proj=[1]), {}, "has a bias, which PEFT leaves out"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_model_as_it_was(case):
    make, rows, fields, says = REFUSED[case]
    model = make()
    before, names = snapshot(model), [n for n, _ in model.named_modules()]
    with pytest.raises(ValueError, match=says):
        fastlora.inject(model, fastlora.LoraConfig(**{**BASE, **fields}, trainable_token_indices=rows))
    assert_same(before, snapshot(model))
    assert names == [n for n, _ in model.named_modules()] and all(p.requires_grad for p in model.parameters())


def test_a_file_whose_rows_are_none_of_the_head(tmp_path):
    fastlora.save(injected(make_llama, lm_head=ROWS), tmp_path)
    config = tmp_path / "adapter_config.json"
    told = {**json.loads(config.read_text()), "trainable_token_indices": {"lm_head": ROWS[:2]}}
    config.write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"trainable_tokens_delta' has shape \(4, 16\)"):
        fastlora.load(make_llama().double(), tmp_path)
