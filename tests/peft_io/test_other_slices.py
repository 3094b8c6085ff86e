"""A further adapter whose file slices a fused matrix otherwise than the layer: outputs are those of the file."""

import pytest
import torch
from support.model_state import assert_untouched, state_of
from support.peft_help import MODELS, assert_close, logits, make_vit, peft, run, train

import fastlora

TARGET = "blocks.0.attn.qkv"
FUSED = dict(r=3, lora_alpha=5, target_modules=["attn.qkv", "attn.proj"])


def split_model(**fields):
    config = fastlora.LoraConfig(r=2, lora_alpha=7, target_modules=["attn.qkv"], init_lora_weights=False, **fields)
    return fastlora.inject(make_vit(), config)


def dense_file(path, **fields):
    """What PEFT writes of a fused matrix, and its logits."""
    model = peft.get_peft_model(make_vit(), peft.LoraConfig(**{**FUSED, **fields}))
    train(model)
    model.save_pretrained(str(path))
    return logits(model)


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"lora_bias": True}, {"use_dora": True}], ids=str)
def test_dense_file_beside_a_split_adapter(tmp_path, fields):
    wanted = dense_file(tmp_path / "dense", **fields)
    ours = split_model(split_qkv=True)
    before = logits(ours)
    fastlora.load(ours, tmp_path / "dense", adapter="second")
    assert_close(logits(ours), before)
    layer = ours.get_submodule(TARGET)
    assert layer.ranks("second") == {"q": 3, "k": 3, "v": 3}
    with fastlora.use_adapters(ours, "second"):
        assert_close(logits(ours), wanted)
    fastlora.set_adapter(ours, "second")
    assert_close(logits(ours), wanted)
    fastlora.save(ours, tmp_path / "again", adapter="second")
    assert_close(logits(peft.PeftModel.from_pretrained(make_vit(), str(tmp_path / "again"))), wanted)
    assert_close(logits(fastlora.load(make_vit(), tmp_path / "again")), wanted)
    if "lora_bias" not in fields:
        assert_close(logits(fastlora.merge(ours)), wanted)


def test_rows_of_two_adapters_in_one_batch(tmp_path):
    wanted = dense_file(tmp_path / "dense")
    ours = split_model(split_qkv=True)
    first = logits(ours)
    fastlora.load(ours, tmp_path / "dense", adapter="second")
    with fastlora.use_adapters(ours, torch.tensor([0, 1, 0])), torch.no_grad():
        mixed = run(ours)
    assert_close(mixed, torch.stack([first[0], wanted[1], first[2]]))


def test_it_learns(tmp_path):
    dense_file(tmp_path / "dense")
    ours = fastlora.load(split_model(split_qkv=True), tmp_path / "dense", adapter="second")
    fastlora.set_adapter(ours, "second")
    run(ours).square().mean().backward()
    layer = ours.get_submodule(TARGET)
    A, B = layer.lora_A["second"], layer.lora_B["second"]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (*A.parameters(), *B.parameters()))
    assert A.q.data_ptr() != A.k.data_ptr()


@pytest.mark.parametrize("held", [False, {"layer.0.q": {"upper": 3, "lower": 5}}], ids=["dense", "other"])
def test_split_file_beside_other_slices(tmp_path, held):
    """Ours is block-diagonal in its file, which says what was split; a layer in other slices takes it as a matrix."""

    def adapted(split, **fields):
        config = fastlora.LoraConfig(r=2, lora_alpha=5, target_modules=["layer.0.q"], split_qkv=split, **fields)
        return fastlora.inject(MODELS["nested"](), config)

    ranks = {"layer.0.q[b]": 0, "layer.0.q[c]": 3}
    thirds = {"layer.0.q": {"a": 2, "b": 2, "c": 4}}
    theirs = adapted(thirds, init_lora_weights=False, rank_pattern=ranks, alpha_pattern={"layer.0.q[c]": 9})
    wanted = logits(theirs)
    fastlora.save(theirs, tmp_path / "split")
    ours = adapted(held)
    fastlora.load(ours, tmp_path / "split", adapter="second")
    fastlora.set_adapter(ours, "second")
    assert_close(logits(ours), wanted)
    assert set(ours.layer[0]["q"].ranks("second").values()) == {5}


def test_the_adapter_that_is_there_is_refused_with_a_way_out(tmp_path):
    wanted = dense_file(tmp_path / "dense", target_modules=["attn.qkv"])
    ours = split_model(split_qkv=True)
    before = state_of(ours)
    with pytest.raises(ValueError, match=r"qkv is split into q k v in the model and one matrix in the file.*adapter="):
        fastlora.load(ours, tmp_path / "dense")
    assert_untouched(ours, before)
    fastlora.load(ours, tmp_path / "dense", adapter="other")
    fastlora.set_adapter(ours, "other")
    assert_close(logits(ours), wanted)


def test_add_adapter_splits_as_the_first():
    """Unless told otherwise, in which case it says so."""
    ours = split_model(split_qkv=True)
    fastlora.add_adapter(ours, "second", fastlora.LoraConfig(r=1, target_modules=["attn.qkv"]))
    assert ours.get_submodule(TARGET).ranks("second") == {"q": 1, "k": 1, "v": 1}
    with pytest.raises(ValueError, match="leave split_qkv out"):
        fastlora.add_adapter(ours, "third", fastlora.LoraConfig(r=1, target_modules=["attn.qkv"], split_qkv=False))
