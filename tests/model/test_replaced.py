"""An adapted layer that a plain module replaces: said at once, and never saved as if it were there."""

from __future__ import annotations

import copy
import logging
import pickle
import subprocess
import sys

import pytest
import torch
from support.helpers import config
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import fastlora


def adapted():
    return fastlora.inject(
        nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 3)),
        config(r=2, target_modules=["0", "1.0", "2"]),
    )


def put(model, module):
    model[1][0] = module(model[1][0])


@pytest.mark.parametrize("how", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_it_is_said_and_save_refuses(how, caplog, tmp_path):
    model = how(adapted())
    fastlora.add_adapter(model, "b", config(r=2, target_modules=["0"]))
    model(torch.randn(2, 4)).sum().backward()
    with caplog.at_level(logging.WARNING):
        put(model, lambda _: nn.Linear(4, 4))
    assert "has replaced '1.0', and the adapters on it are gone" in caplog.text
    for copied in (model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match=r"model: another module has replaced '1\.0'"):
            fastlora.save(copied, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_the_embeddings_of_a_language_model_are_resized(caplog, tmp_path):
    transformers = pytest.importorskip("transformers")
    size = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, tie_word_embeddings=False))
    fastlora.inject(model, config(r=2, target_modules=["q_proj", "lm_head"]))
    with caplog.at_level(logging.WARNING):
        model.resize_token_embeddings(70)
    assert "has replaced 'lm_head'" in caplog.text
    with pytest.raises(ValueError, match="replaced 'lm_head'.*resize_token_embeddings"):
        fastlora.save(model, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: put(m, checkpoint_wrapper),
        lambda m: put(m, nn.Sequential),
        lambda m: put(m, lambda _: nn.Identity()),
        lambda m: m.__delitem__(1),
        lambda m: m[1].__delitem__(0),
        lambda m: m.append(nn.Linear(3, 3).requires_grad_(False)),
    ],
)
def test_wrapped_and_removed_layers_are_no_matter(change, caplog, tmp_path):
    model = adapted()
    with caplog.at_level(logging.WARNING):
        change(model)
    assert "has replaced" not in caplog.text
    fastlora.save(model, tmp_path)


def test_a_model_that_is_ejected_or_dropped_says_nothing(caplog):
    model = adapted()
    with caplog.at_level(logging.WARNING):
        fastlora.unload(model)
        model[0] = nn.Linear(4, 4)
        model = adapted()
        del model
    assert "has replaced" not in caplog.text
    assert not hasattr(fastlora.unload(adapted()), "fastlora_places")


_LATE = """
import torch, fastlora
from torch import nn
model = fastlora.inject(nn.Sequential(nn.Linear(4, 4)), fastlora.LoraConfig(r=2, target_modules=["0"]))
nn.parallel.kept = lambda: model
"""


def test_an_interpreter_that_ends_says_nothing():
    """Models that others hold die after the names of this library's files."""
    ended = subprocess.run([sys.executable, "-c", _LATE], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
