"""transformers.Trainer: runs that end by an error or Ctrl-C, and optimizers that were built too early."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from support.trainer_help import bert, texts

import fastlora
from fastlora.integrations.hf import FastLoraCallback
from fastlora.model.eject import eject
from fastlora.nn.linear import adapted_layers

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


def trainer(model, out, callback=None, optimizers=(None, None), **options):
    options = {"max_steps": 6, "save_steps": 3, "learning_rate": 1e-2, **options}
    args = transformers.TrainingArguments(
        output_dir=str(out), per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True, **options
    )
    callbacks = [] if callback is None else [callback]
    return transformers.Trainer(
        model=model, args=args, train_dataset=texts(), optimizers=optimizers, callbacks=callbacks
    )


@pytest.mark.parametrize("early", ["before set_ranks", "before inject"])
def test_an_optimizer_that_was_built_too_early_is_told(early, tmp_path, caplog):
    model = bert(dropout=0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    if early == "before inject":
        model = eject(model).requires_grad_()
        optimizer = torch.optim.AdamW(model.parameters())
        fastlora.inject(model, fastlora.LoraConfig(r=4, target_modules="qkv", modules_to_save=["classifier"]))
        trainer(model, tmp_path, optimizers=(optimizer, None), save_strategy="no").train()
        assert "build it after fastlora.inject" in caplog.text
        return
    fastlora.set_ranks(model, {row.key: 2 for row in fastlora.summary(model).rows})
    with pytest.raises(RuntimeError, match="optimizer: holds the factors that others have replaced"):
        trainer(model, tmp_path, optimizers=(optimizer, None), save_strategy="no").train()


class _Stops(transformers.TrainerCallback):
    def __init__(self, error, event):
        self.error, self.event = error, event
        setattr(self, event, self.stop)

    def stop(self, args, state, control, **kwargs):
        if state.global_step >= (self.event != "on_epoch_begin"):
            raise self.error


EVENTS = ["on_epoch_begin", "on_step_begin", "on_pre_optimizer_step", "on_save", "on_step_end"]


def _whole(t, keys):
    layers = adapted_layers(t.model).values()
    assert list(t.model.state_dict()) == keys
    assert not any(layer.probes for layer in layers)
    assert all(p.requires_grad for layer in layers for f in (layer.lora_A, layer.lora_B) for p in f.parameters())


@pytest.mark.parametrize("added", [False, True], ids=["made with it", "added"])
@pytest.mark.parametrize(
    "event", ["on_epoch_begin", "on_step_begin", "on_pre_optimizer_step", "on_save", "on_step_end"]
)
def test_a_training_that_is_interrupted_leaves_the_model_whole(event, added, tmp_path):
    """A callback that was added to a Trainer is not told that it is made; its first training tells it."""
    model, error = bert(), KeyboardInterrupt() if added else RuntimeError("out")
    keys = list(model.state_dict())
    callback = FastLoraCallback(freeze=5, penalty=0.1)
    t = trainer(model, tmp_path, None if added else callback, save_steps=1)
    if added:
        t.add_callback(callback)
    t.add_callback(_Stops(error, event))
    with pytest.raises(type(error)):
        t.train()
    _whole(t, keys)
    t.remove_callback(_Stops)
    t.train()  # again, by the same Trainer
    _whole(t, keys)
    trainer(model, tmp_path, FastLoraCallback(freeze=1)).train()
    _whole(t, keys)


@pytest.mark.parametrize("added", [False, True], ids=["made with it", "added"])
@pytest.mark.parametrize("where", ["the data", "the forward"])
def test_an_error_outside_of_callbacks(where, added, tmp_path, monkeypatch):
    model, callback = bert(), FastLoraCallback(freeze=5)
    keys = list(model.state_dict())
    t = trainer(model, tmp_path, None if added else callback)
    if added:
        t.add_callback(callback)

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    if where == "the data":
        monkeypatch.setattr(t, "get_batch_samples", fail)
    else:
        model.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        t.train()
    _whole(t, keys)


def test_a_run_takes_over_from_a_dead_one(tmp_path):
    """Where nothing says that a run has died."""
    model = bert()
    keys = list(model.state_dict())
    dead = FastLoraCallback(freeze=5)
    dead.session.begin(model)
    dead.session.hold(0)
    trainer(model, tmp_path, FastLoraCallback(track={"warmup": 2}, freeze=1)).train()
    assert list(model.state_dict()) == keys and not any(layer.probes for layer in adapted_layers(model).values())
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)


def test_the_making_of_a_trainer_hides_nothing(tmp_path, caplog):
    model = bert()
    keys = set(model.state_dict())
    t = trainer(model, tmp_path, FastLoraCallback())
    t.save_model(str(tmp_path / "whole"))
    assert load_file(tmp_path / "whole" / "model.safetensors").keys() == keys
    assert caplog.text.count("has adapters, which from_pretrained does not load") == 1
    t.train()
    assert caplog.text.count("does not load") == 1  # nothing about checkpoints
    t.save_model(str(tmp_path / "after"))
    assert load_file(tmp_path / "after" / "model.safetensors").keys() == keys
