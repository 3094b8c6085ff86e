"""What other libraries save of an adapted model has its adapters, or says that it will not; plain models come back."""

from __future__ import annotations

import copy

import pytest
import torch
from support.helpers import FAMILIES, config, randomise
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

import fastlora
from fastlora.model.eject import eject

transformers = pytest.importorskip("transformers")


def llama():
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    return randomise(fastlora.inject(model.eval(), config(target_modules="qkv", r=4)))


IDS = torch.arange(16).view(2, 8)


def test_transformers_is_refused_before_anything_is_written(tmp_path):
    model = llama()
    with pytest.raises(
        ValueError, match=r"from_pretrained would drop the adapter of 'model\.layers\.0.*fastlora\.save"
    ):
        model.save_pretrained(tmp_path / "new")
    assert not list(tmp_path.rglob("*.safetensors"))
    assert any("lora_A" in key for key in model.state_dict())  # of everybody else


@pytest.mark.parametrize("unload", [False, True])
def test_a_merged_model_saves_as_a_plain_one(unload, tmp_path):
    model = llama()
    expected = model(IDS).logits
    fastlora.merge(model, unload=unload)
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    assert not any("lora_" in key for key in load_file(tmp_path / "model.safetensors"))
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_an_ejected_model_is_not_watched(tmp_path):
    model = llama()
    assert len(model._state_dict_hooks) == 1
    eject(model)
    assert not model._state_dict_hooks and not hasattr(model, "fastlora_saving")
    model.save_pretrained(tmp_path)


def test_a_copy_is_watched_too(tmp_path):
    with pytest.raises(ValueError, match="would drop the adapter"):
        copy.deepcopy(llama()).save_pretrained(tmp_path)


def test_timm_warns(tmp_path, caplog):
    utils = pytest.importorskip("timm.utils")
    model = fastlora.inject(FAMILIES["timm_vit"].make(), config(target_modules="qkv"))
    optimizer = torch.optim.SGD(fastlora.param_groups(model), lr=0.1)
    utils.CheckpointSaver(model, optimizer, checkpoint_dir=str(tmp_path)).save_checkpoint(0, metric=1.0)
    assert "the file that is saved has adapters, which a plain model does not load" in caplog.text


@pytest.mark.parametrize("name", ["timm_vit", "bert", "t5"])
def test_unloaded_modules_are_exactly_the_base_s(name, build):
    base = build(name)
    kinds = {n: type(m) for n, m in base.named_modules()}
    model = randomise(fastlora.inject(build(name), config(target_modules="all-linear")), 0.1)
    run = FAMILIES[name].run
    adapted = run(model)
    assert fastlora.merge_and_unload(model) is model
    assert {n: type(m) for n, m in model.named_modules()} == kinds
    assert model.state_dict().keys() == base.state_dict().keys()
    for y, z in zip(_tensors(run(model)), _tensors(adapted), strict=True):
        torch.testing.assert_close(y, z, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="has no adapters"):
        fastlora.unmerge(model)


def _tensors(out):
    return [out] if isinstance(out, torch.Tensor) else [t for t in out.values() if isinstance(t, torch.Tensor)]


def test_unload_gives_the_base_back(build):
    base = build("bert")
    model = randomise(fastlora.inject(copy.deepcopy(base), config(target_modules="qkv")))
    assert fastlora.unload(model) is model
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), base.state_dict().values(), strict=True))
    assert all(type(m) is type(b) for m, b in zip(model.modules(), base.modules(), strict=True))


def test_a_failed_merge_unloads_nothing():
    model = llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.lora_B["default"].weight[0, 0] = torch.inf
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match="not finite"):
        fastlora.merge(model, unload=True)
    assert list(model.state_dict()) == keys


def sequential():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4))


@pytest.mark.parametrize("wrapper", [AveragedModel, nn.DataParallel, lambda m: AveragedModel(nn.DataParallel(m))])
def test_wrappers_leave_no_trace_in_files(wrapper, tmp_path):
    model = fastlora.inject(sequential(), config(target_modules=["0"], init_lora_weights=False))
    fastlora.save(wrapper(model), tmp_path)
    x = torch.randn(3, 16)
    torch.testing.assert_close(fastlora.load(sequential(), tmp_path)(x), model(x))


RECOMPUTED = {
    "WeightNorm": nn.utils.weight_norm,
    "SpectralNorm": nn.utils.spectral_norm,
    "L1Unstructured": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RECOMPUTED)
def test_a_weight_that_is_recomputed_is_refused_by_name(name):
    model = sequential()
    RECOMPUTED[name](model[0])
    match = rf"'0' cannot be adapted: its weight is computed at each forward by {name}"
    with pytest.raises(ValueError, match=match):
        fastlora.inject(model, config(target_modules=["0"]))
    model = fastlora.inject(sequential(), config(target_modules=["0"], init_lora_weights=False))
    RECOMPUTED[name](model[0])
    before = model.eval()(torch.ones(1, 16))
    with pytest.raises(
        ValueError, match=f"'0' cannot be merged into: its weight is computed at each forward by {name}"
    ):
        fastlora.merge(model)
    torch.testing.assert_close(model(torch.ones(1, 16)), before)


def test_tied_modules_to_save_are_refused_before_they_are_trained():
    tied = transformers.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
                                    vocab_size=64, tie_word_embeddings=True)  # fmt: skip
    model = transformers.LlamaForCausalLM(tied)
    with pytest.raises(ValueError, match=r"modules_to_save: a parameter is shared with 'lm_head\.weight'"):
        fastlora.inject(model, config(target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
