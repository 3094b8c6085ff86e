"""transformers.Trainer on small models: resumed bit for bit, penalty, freezing, and what must not get in the way."""

from __future__ import annotations

import importlib
import itertools
import os
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file
from support.trainer_help import assert_same, bert, factors, images, shifted, texts, trained, vit
from torch import nn

import fastlora
from fastlora.integrations.hf import STATE, FastLoraCallback

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

TRACK = {"every": 1, "warmup": 3}


def trainer(model, out, callback=None, data=None, optimizers=(None, None), compute_metrics=None, **options):
    options = {"max_steps": 6, "save_steps": 3, "logging_steps": 1, "learning_rate": 1e-2, **options}
    args = transformers.TrainingArguments(
        output_dir=str(out), per_device_train_batch_size=options.pop("batch", 4), report_to=[], use_cpu=True,
        disable_tqdm=True, **options,
    )  # fmt: skip
    data = texts() if data is None else data
    return transformers.Trainer(
        model=model, args=args, train_dataset=data, eval_dataset=data[:8], optimizers=optimizers,
        callbacks=[] if callback is None else [callback], compute_metrics=compute_metrics,
    )  # fmt: skip


def losses(t):
    return [entry["loss"] for entry in t.state.log_history if "loss" in entry]


def loaded_vit(folder):
    """A model that from_pretrained made: its checkpoints have the names of the hub."""
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8,
        num_labels=5,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    model = transformers.ViTForImageClassification.from_pretrained(folder)
    torch.manual_seed(0)
    config = fastlora.LoraConfig(r=4, target_modules="qkv", modules_to_save=["classifier"], lora_dropout=0.1)
    return fastlora.inject(model, config)


@pytest.mark.parametrize("kind", ["bert", "plain module", "from_pretrained"])
def test_resumes_bit_for_bit_from_what_was_trained(kind, tmp_path):
    make = {"bert": bert, "plain module": vit, "from_pretrained": lambda: loaded_vit(tmp_path / "base")}[kind]
    data = texts() if kind == "bert" else images()
    # Warmup ends after the checkpoint, so that the statistics go on; two batches a step.
    options = dict(data=data, gradient_accumulation_steps=2, max_grad_norm=0.05, max_steps=8, save_steps=4, batch=2)
    callbacks = [FastLoraCallback(track={"every": 1, "warmup": 6}, penalty=0.1) for _ in range(2)]
    whole = trainer(make(), tmp_path / "run", callbacks[0], **options)
    whole.train()
    again = trainer(shifted(make()), tmp_path / "run", callbacks[1], **options)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert len(losses(whole)) == 8 and losses(again) == losses(whole)
    assert_same(trained(again.model), trained(whole.model))
    assert torch.equal(callbacks[0].tracker.importance, callbacks[1].tracker.importance)
    assert dict(callbacks[0].tracker.scores()) == dict(callbacks[1].tracker.scores())


def test_a_checkpoint_holds_what_is_trained_and_is_an_adapter(tmp_path):
    t = trainer(bert(), tmp_path, FastLoraCallback())
    before = {name: p.detach().clone() for name, p in t.model.named_parameters() if not p.requires_grad}
    t.train()
    folder = tmp_path / "checkpoint-6"
    assert load_file(folder / "model.safetensors").keys() == trained(t.model).keys()
    other = bert(r=4)
    fastlora.load(other, folder)
    assert_same(trained(other), trained(t.model))
    # Afterwards a state dict is complete, and the base was not touched.
    state = t.model.state_dict()
    assert_same({name: state[name] for name in before}, before)


def test_from_pretrained_takes_a_checkpoint_for_an_adapter(tmp_path):
    pytest.importorskip("peft")
    model = loaded_vit(tmp_path / "base")
    trainer(model, tmp_path / "run", FastLoraCallback(), data=images(), max_steps=3).train()
    other = transformers.ViTForImageClassification.from_pretrained(tmp_path / "run" / "checkpoint-3").eval()
    x = torch.stack([sample["pixel_values"] for sample in images(4)])
    torch.testing.assert_close(other(x).logits, model.eval()(x).logits, rtol=1e-4, atol=1e-5)


def test_full_checkpoints_on_request(tmp_path):
    t = trainer(bert(), tmp_path, FastLoraCallback(checkpoints="full"), max_steps=3)
    t.train()
    names = {path.name for path in (tmp_path / "checkpoint-3").iterdir()}
    assert STATE in names and "adapter_config.json" not in names
    assert load_file(tmp_path / "checkpoint-3" / "model.safetensors").keys() == t.model.state_dict().keys()


@pytest.mark.parametrize("make", [bert, vit])
def test_the_best_model_is_loaded_at_the_end(make, tmp_path):
    scores = itertools.count(0, -1)
    t = trainer(
        make(), tmp_path, FastLoraCallback(), data=texts() if make is bert else images(), eval_strategy="steps",
        eval_steps=2, save_steps=2, load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True,
        compute_metrics=lambda prediction: {"score": float(next(scores))},
    )  # fmt: skip
    t.train()
    assert t.state.best_model_checkpoint.endswith("checkpoint-2") and t.state.global_step == 6
    best, last = (load_file(tmp_path / f"checkpoint-{n}" / "model.safetensors") for n in (2, 6))
    assert_same(trained(t.model), best)
    assert not torch.equal(next(iter(best.values())), next(iter(last.values())))


def by_hand(model, data, steps, micro, clip, weight, lr):
    """The loop of the README, with the batches in the same order."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    with fastlora.track(model, **TRACK) as tracker:
        for step in range(steps):
            for i in range(micro):
                batch = data[(step * micro + i) * 4 :][:4]
                tokens = torch.stack([entry["input_ids"] for entry in batch])
                labels = torch.tensor([entry["labels"] for entry in batch])
                loss = model(input_ids=tokens, labels=labels).loss
                # The Trainer does not divide losses of models that take further keyword arguments.
                (loss + tracker.penalty(weight) / micro).backward()
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            tracker.step()
    return tracker


def test_the_penalty_is_clipped_with_the_loss(tmp_path):
    data, weight = texts(48), 5.0
    model = bert(dropout=0.0, init_lora_weights=False)
    callback = FastLoraCallback(track=TRACK, penalty=weight)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    t = trainer(
        model, tmp_path, callback, data=data, optimizers=(optimizer, None), max_grad_norm=0.5, save_strategy="no",
        gradient_accumulation_steps=2, lr_scheduler_type="constant", train_sampling_strategy="sequential",
    )  # fmt: skip
    t.train()
    other = bert(dropout=0.0, init_lora_weights=False)
    tracker = by_hand(other, data, 6, 2, 0.5, weight, 0.05)
    torch.testing.assert_close(callback.tracker.importance, tracker.importance, rtol=1e-4, atol=0)
    mine, theirs = trained(model), trained(other)
    start = trained(bert(dropout=0.0, init_lora_weights=False))
    for name in mine:
        # Both round in fp32; what is compared are the changes, which are much larger.
        moved = (theirs[name] - start[name]).abs().max()
        assert moved == 0 or (mine[name] - theirs[name]).abs().max() < 1e-3 * moved, name
    # The clipped norm includes the penalty: without it there would be nothing to clip.
    norms = [entry["grad_norm"] for entry in t.state.log_history if "grad_norm" in entry]
    assert min(norms[3:]) > 2 * max(norms[:3])


class Watch(transformers.TrainerCallback):
    def __init__(self):
        self.factors, self.heads = [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.factors.append(factors(model))
        self.heads.append(model.classifier.weight.detach().clone())


def test_adapters_stand_still_at_first(tmp_path):
    model, watch = bert(), Watch()
    start = factors(model)
    t = trainer(model, tmp_path, FastLoraCallback(freeze=4), save_steps=3)
    t.add_callback(watch)
    t.train()
    for step in range(4):
        assert_same(watch.factors[step], start)
    assert all(not torch.equal(watch.factors[4][n], start[n]) for n in start if "lora_B" in n)
    assert all(not torch.equal(one, two) for one, two in itertools.pairwise(watch.heads))
    assert all(n in load_file(tmp_path / "checkpoint-3" / "model.safetensors") for n, _ in model.named_parameters() if "lora" in n)  # fmt: skip  # noqa: E501
    # Resumed while frozen: they are let go at the same step.
    again = Watch()
    t = trainer(bert(), tmp_path, FastLoraCallback(freeze=4), save_steps=3)
    t.add_callback(again)
    t.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for mine, theirs in zip(again.factors, watch.factors[3:], strict=True):
        assert_same(mine, theirs)


def test_a_schedule_with_frozen_groups(tmp_path):
    def run(model, watch, resume=None):
        optimizer = torch.optim.AdamW(fastlora.param_groups(model, lr_lora=1e-2, lr_head=1e-2))
        schedule = fastlora.training.Cosine(optimizer, 6, freeze=2)
        t = trainer(model, tmp_path, FastLoraCallback(), optimizers=(optimizer, schedule))
        t.add_callback(watch)
        t.train(resume_from_checkpoint=resume)
        return t

    watches = [Watch(), Watch()]
    whole = run(bert(), watches[0])
    again = run(shifted(bert()), watches[1], str(tmp_path / "checkpoint-3"))
    assert_same(watches[0].factors[1], factors(bert()))
    assert not torch.equal(watches[0].heads[0], watches[0].heads[1])
    assert losses(whole) == losses(again)
    assert_same(trained(whole.model), trained(again.model))


def test_a_batch_that_does_not_fit_is_tried_again_smaller(tmp_path):
    model, callback, seen = bert(), FastLoraCallback(track={"every": 1}), []

    def full(module, args, kwargs):
        seen.append(kwargs["input_ids"].shape[0])
        if seen[-1] > 4:
            raise RuntimeError("CUDA out of memory.")

    model.register_forward_pre_hook(full, with_kwargs=True)
    t = trainer(model, tmp_path, callback, batch=5, auto_find_batch_size=True, max_steps=3)
    t.train()
    assert seen[0] == 5 and max(seen[-3:]) <= 4
    assert callback.tracker.steps == t.state.global_step == 3
    assert not any(layer.probes for layer in fastlora.nn.linear.adapted_layers(model).values())


def test_bf16_autocast_gives_the_statistics_of_fp32(tmp_path):
    found = []
    for bf16 in (False, True):
        callback = FastLoraCallback(track={"every": 1, "probes": 64, "ema": None})
        t = trainer(bert(dropout=0.0), tmp_path, callback, bf16=bf16, max_steps=3, save_strategy="no")
        t.train()
        found.append(callback.tracker.scores())
    for key, value in found[0].items():
        # Three products in bf16 (2^-9 each) in a norm that is squared, over steps that drift apart.
        assert found[1][key] == pytest.approx(value, rel=0.1)


@pytest.mark.parametrize("warmup, says", [(6, True), (5, False)])
def test_a_warmup_that_training_does_not_outlast_is_said_before_and_after(warmup, says, tmp_path, caplog):
    callback = FastLoraCallback(track={"every": 1, "warmup": warmup}, penalty=0.1)
    trainer(bert(), tmp_path, callback, save_strategy="no").train()
    before = f"track: warmup={warmup} is too long for 6 steps of training: the penalty is 0 to the end"
    after = "track: closed, and the penalty was 0 each time (6 calls): importance was frozen after the last one"
    found = [r.getMessage() for r in caplog.records if r.name.startswith("fastlora.") and "track:" in r.getMessage()]
    assert found == ([before, after] if says else [])


def test_a_loss_scale_is_taken_out_of_statistics_and_put_into_the_penalty():
    """The events as the Trainer calls them under fp16, which needs a GPU."""
    data, results = texts(4), []
    tokens, labels = torch.stack([d["input_ids"] for d in data]), torch.tensor([d["labels"] for d in data])
    for scaled in (False, True):
        model = bert(dropout=0.0, init_lora_weights=False)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        scaler = optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1, enabled=scaled)
        callback = FastLoraCallback(track={"every": 1, "warmup": 2}, penalty=3.0)
        callback.session.begin(model)
        state = type("State", (), {"global_step": 0})
        for state.global_step in range(4):
            callback.on_step_begin(None, state, None, optimizer=optimizer)
            scaler.scale(model(input_ids=tokens, labels=labels).loss).backward()
            scaler.unscale_(optimizer)
            callback.on_pre_optimizer_step(None, state, None, optimizer=optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        results.append((trained(model), callback.tracker.importance))
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-5, atol=0)
    for name, value in results[0][0].items():
        torch.testing.assert_close(results[1][0][name], value, rtol=1e-4, atol=1e-6)


def test_compiled_by_the_trainer(tmp_path):
    found = []
    for compiled in (False, True):
        callback = FastLoraCallback(track={"every": 1})
        extra = dict(torch_compile=True, torch_compile_backend="eager") if compiled else {}
        t = trainer(bert(dropout=0.0), tmp_path / str(compiled), callback, max_steps=2, save_steps=2, **extra)
        t.train()
        found.append((losses(t), callback.tracker.scores()))
        assert (
            load_file(tmp_path / str(compiled) / "checkpoint-2" / "model.safetensors").keys() == trained(t.model).keys()
        )
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4)
    for key, value in found[0][1].items():
        assert found[1][1][key] == pytest.approx(value, rel=1e-3)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer(bert(), folder, FastLoraCallback(), max_steps=3).train()
    return folder


class TestRefusals:
    def resume(self, model, run, callback, tmp_path, copied="checkpoint-3", given=None):
        shutil.copytree(run / "checkpoint-3", tmp_path / copied)
        t = trainer(model, tmp_path, callback)
        t.train(resume_from_checkpoint=str(tmp_path / copied if given is None else given))
        return t

    def test_a_model_without_adapters(self, tmp_path):
        plain = transformers.BertForSequenceClassification(bert().config)
        with pytest.raises(ValueError, match=r"model: has no adapters; call fastlora.inject before the Trainer"):
            trainer(plain, tmp_path, FastLoraCallback())

    @pytest.mark.parametrize(
        "options, said",
        [
            (dict(r=8), r"attention.self.query has rank 8 in the model and 4 in the checkpoint"),
            (dict(targets=["query"]), r"layer.0.attention.self.key has rank 0 in the model and 4 in the checkpoint"),
            (dict(targets="attention"), r"output.dense has rank 4 in the model and 0 in the checkpoint"),
            (dict(modules_to_save=None), r"classifier.weight is trained in the checkpoint and frozen in the model"),
        ],
    )
    def test_other_ranks_or_targets(self, run, tmp_path, options, said):
        model = bert(**options)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        with pytest.raises(ValueError, match=said):
            self.resume(model, run, FastLoraCallback(), tmp_path)
        assert_same(dict(model.named_parameters()), before)

    def test_a_newer_version(self, run, tmp_path):
        shutil.copytree(run / "checkpoint-3", tmp_path / "checkpoint-3")
        state = torch.load(tmp_path / "checkpoint-3" / STATE)
        torch.save({**state, "version": 99}, tmp_path / "checkpoint-3" / STATE)
        with pytest.raises(ValueError, match=r"fastlora_training.pt: version 99 is newer than 1; update fastlora"):
            trainer(bert(), tmp_path, FastLoraCallback()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))

    def test_a_torn_state(self, run, tmp_path):
        shutil.copytree(run / "checkpoint-3", tmp_path / "checkpoint-3")
        path = tmp_path / "checkpoint-3" / STATE
        path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(ValueError, match=r"fastlora_training.pt: torn, or not a checkpoint"):
            trainer(bert(), tmp_path, FastLoraCallback()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))

    def test_a_full_disk(self, run, tmp_path, monkeypatch):
        """Training stops with the system's words; what was half written is not resumed from, what was whole is."""
        shutil.copytree(run / "checkpoint-3", tmp_path / "checkpoint-3")

        def full(descriptor):
            raise OSError(28, "No space left on device")

        model, callback = bert(), FastLoraCallback()
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left on device"):
            model.register_forward_pre_hook(lambda *_: patch.setattr(os, "fsync", full))
            t = trainer(model, tmp_path, callback)
            t.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        callback.close()
        assert not (tmp_path / "checkpoint-6" / STATE).exists()
        with pytest.raises(ValueError, match=rf"no {STATE} with step 6"):
            trainer(bert(), tmp_path, FastLoraCallback()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
        trainer(bert(), tmp_path, FastLoraCallback()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert (tmp_path / "checkpoint-6" / STATE).exists()

    def test_a_folder_that_cannot_be_known(self, run, tmp_path):
        with pytest.raises(ValueError, match=r"no fastlora_training.pt with step 3 .*resume_from"):
            self.resume(bert(), run, FastLoraCallback(), tmp_path, "elsewhere")
        callback = FastLoraCallback(resume_from=tmp_path / "elsewhere")
        t = trainer(bert(), tmp_path / "new", callback)
        t.train(resume_from_checkpoint=str(tmp_path / "elsewhere"))
        assert callback.tracker.steps == 6

    def test_the_state_of_another_run_is_not_taken(self, run, tmp_path):
        trainer(shifted(bert()), tmp_path, FastLoraCallback(), max_steps=3).train()
        with pytest.raises(ValueError, match=r"the weights that were loaded"):
            trainer(bert(), tmp_path, FastLoraCallback()).train(resume_from_checkpoint=str(run / "checkpoint-3"))

    def test_what_has_no_place_in_an_adapter_is_said_at_the_start(self, tmp_path):
        model = bert()
        model.bert.pooler.requires_grad_(True)
        with pytest.raises(ValueError, match=r"bert.pooler.dense.*name their modules in modules_to_save"):
            trainer(model, tmp_path, FastLoraCallback()).train()

    @pytest.mark.parametrize(
        "options, kind, said",
        [
            (dict(track="yes"), TypeError, "track: expected True, False or options"),
            (dict(penalty="1"), TypeError, "penalty: expected a number"),
            (dict(penalty=1.0, track=False), ValueError, "penalty: is weighed by statistics"),
            (dict(freeze=-1), ValueError, "freeze: expected a number of optimizer steps"),
            (dict(checkpoints="none"), ValueError, "checkpoints: expected one of"),
        ],
    )
    def test_options(self, options, kind, said):
        with pytest.raises(kind, match=said):
            FastLoraCallback(**options)

    def test_an_unknown_adapter(self, tmp_path):
        with pytest.raises(ValueError, match=r"adapter: expected one of \['default'\], got 'other'"):
            trainer(bert(), tmp_path, FastLoraCallback(track=False, freeze=1, adapter="other")).train()

    def test_freezing_all_there_is(self, tmp_path):
        with pytest.raises(ValueError, match="freeze: nothing else would learn in the first 2 steps"):
            trainer(bert(modules_to_save=None), tmp_path, FastLoraCallback(freeze=2)).train()


@pytest.mark.parametrize("module, library", [("hf", "transformers"), ("lightning", "lightning")])
def test_a_missing_library_is_named(module, library, monkeypatch):
    name = f"fastlora.integrations.{module}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    for missing in (library, f"{library}.pytorch"):
        monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"{name} needs {library}: pip install 'fastlora-kernels\[{module}\]'"):
        importlib.import_module(name)


def test_a_library_that_fails_to_import_is_not_called_missing(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "fastlora.integrations.lightning", raising=False)
    for loaded in [name for name in sys.modules if name.split(".")[0] == "lightning"]:
        monkeypatch.delitem(sys.modules, loaded)
    (tmp_path / "lightning").mkdir()
    (tmp_path / "lightning" / "__init__.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_dependency'"):
        importlib.import_module("fastlora.integrations.lightning")
