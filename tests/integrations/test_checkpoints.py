"""Checkpoints of own loops, of Accelerate and of timm's scripts: what is trained alone, resumed bit for bit."""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import random

import numpy as np
import pytest
import torch
from support.trainer_help import assert_same, bert, images, shifted, still, trained, trained_parameters, vit
from torch import nn

import fastlora
from fastlora.integrations import (
    TrainingState,
    adapters_only,
    load_checkpoint,
    register_for_checkpointing,
    save_checkpoint,
)

DATA = images()
BATCHES = [
    (torch.stack([d["pixel_values"] for d in part]), torch.tensor([d["labels"] for d in part]))
    for part in (DATA[i : i + 4] for i in range(0, 24, 4))
]


def step(model, batch, optimizer, tracker):
    x, y = batch
    loss = model(x, y)["loss"] + tracker.penalty(0.1)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    tracker.step()
    return loss.item()


def loop(model, file, resume=False):
    """Six steps with dropout; a checkpoint after the third."""
    optimizer = torch.optim.AdamW(fastlora.param_groups(model, lr_lora=1e-2, lr_head=1e-2))
    schedule = fastlora.training.Cosine(optimizer, 6, freeze=1)
    tracker = fastlora.track(model.train(), every=1, warmup=5)
    losses, first = [], 0
    if resume:
        others = dict(optimizer=optimizer, schedule=schedule)
        values = load_checkpoint(file, model, tracker, **others)
        losses, first = values["losses"], values["step"]
    for i in range(first, 6):
        losses.append(step(model, BATCHES[i], optimizer, tracker))
        losses.append(random.random() + np.random.rand())
        schedule.step()
        if i == 2 and not resume:
            others = dict(optimizer=optimizer, schedule=schedule, step=i + 1, losses=list(losses))
            save_checkpoint(file, model, tracker, **others)
    tracker.close()
    return losses, tracker


def test_a_loop_resumes_bit_for_bit(tmp_path):
    models = vit(), shifted(vit())
    base = {name: p.detach().clone() for name, p in models[1].named_parameters() if not p.requires_grad}
    torch.manual_seed(5)
    whole, one = loop(models[0], tmp_path / "last.pt")
    torch.manual_seed(6)
    again, two = loop(models[1], tmp_path / "last.pt", resume=True)
    assert again == whole
    assert_same(trained(models[1]), trained(models[0]))
    assert torch.equal(one.importance, two.importance)
    assert_same(base, {name: p for name, p in models[1].named_parameters() if name in base})
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    assert saved["model"].keys() == trained(models[0]).keys()
    assert os.listdir(tmp_path) == ["last.pt"]


def test_wrapped_models_have_the_same_checkpoint(tmp_path):
    model = vit()
    save_checkpoint(tmp_path / "plain.pt", model)
    save_checkpoint(tmp_path / "compiled.pt", torch.compile(model, backend="eager"))
    one, two = (torch.load(tmp_path / name)["model"] for name in ("plain.pt", "compiled.pt"))
    assert_same(one, two)
    load_checkpoint(tmp_path / "plain.pt", torch.compile(shifted(model), backend="eager"))
    assert_same(trained(model), one)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    model = vit()
    save_checkpoint(tmp_path / "last.pt", model)
    before = (tmp_path / "last.pt").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path / "last.pt", shifted(model))
    assert (tmp_path / "last.pt").read_bytes() == before and os.listdir(tmp_path) == ["last.pt"]


class TestMerged:
    @staticmethod
    def made(weights=False):
        """The base's bias is trained, and an adapter's bias is merged into it."""
        torch.manual_seed(0)
        fields = {"r": 2, "target_modules": ["0", "1"], "lora_bias": True, "bias": "lora_only"}
        config = fastlora.LoraConfig(**fields, init_lora_weights=False)
        model = fastlora.inject(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), config)
        for layer in model:
            layer.weight.requires_grad_(weights)
        return model

    @pytest.mark.parametrize("weights", [False, True])
    def test_a_checkpoint_is_of_the_model_before(self, weights, tmp_path):
        x, model, other = torch.randn(5, 4), shifted(self.made(weights)), self.made(weights)
        expected, before = model(x), copy.deepcopy(trained(model))
        fastlora.merge(model)
        save_checkpoint(tmp_path / "last.pt", model)
        load_checkpoint(tmp_path / "last.pt", other)
        assert torch.equal(other(x), expected)
        assert_same(trained(fastlora.unmerge(model)), before)
        fastlora.merge(model)
        with adapters_only(model):
            assert model.state_dict(keep_vars=True)["0.bias"] is model[0].bias
            if not weights:
                fastlora.save(model, tmp_path / "adapter")

    def test_loading_is_refused_until_it_is_unmerged(self, tmp_path):
        """What is loaded would not run, and ``unmerge`` would put back the old bias."""
        x, model = torch.randn(5, 4), self.made()
        save_checkpoint(tmp_path / "last.pt", model)
        expected, state = model(x), copy.deepcopy(trained(model))
        fastlora.merge(shifted(model))
        merged = model(x)
        with pytest.raises(ValueError, match="model: 'default' is merged into '0'; call fastlora.unmerge first"):
            load_checkpoint(tmp_path / "last.pt", model)
        with adapters_only(model), pytest.raises(ValueError, match="call fastlora.unmerge first"):
            model.load_state_dict(state)
        assert torch.equal(model(x), merged)
        load_checkpoint(tmp_path / "last.pt", fastlora.unmerge(model))
        assert torch.equal(model(x), expected)


class TestRefusals:
    @pytest.fixture
    def file(self, tmp_path):
        model = vit()
        with fastlora.track(model) as tracker:
            save_checkpoint(tmp_path / "last.pt", model, tracker)
        return tmp_path / "last.pt"

    def test_other_ranks_change_nothing(self, file):
        model = vit(r=8)
        before, state = trained(model), torch.get_rng_state()
        optimizer = torch.optim.SGD(trained_parameters(model), lr=0.1)
        with pytest.raises(ValueError, match=r"blocks.0.attn.qkv\[q\] has rank 8 in the model and 4 in the checkpoint"):
            load_checkpoint(file, model)
        with pytest.raises(ValueError, match=r"has no state of \['optimizer'\], only of \[\]"):
            load_checkpoint(file, vit(), optimizer=optimizer)
        assert_same(trained(model), before)
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("alpha", [8, 32])
    def test_other_scales(self, alpha, tmp_path):
        """Of an adapter that was loaded, whose ``lora_alpha`` is not that of the script."""

        def made(alpha):
            torch.manual_seed(0)
            config = fastlora.LoraConfig(r=4, lora_alpha=alpha, target_modules=["0"], init_lora_weights=False)
            return fastlora.inject(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), config)

        fastlora.save(made(alpha), tmp_path / "adapter")
        model, again = fastlora.load(made(8), tmp_path / "adapter"), made(8)
        save_checkpoint(tmp_path / "last.pt", model)
        if alpha == 8:
            load_checkpoint(tmp_path / "last.pt", again)
            return
        before = trained(shifted(again))
        with pytest.raises(ValueError, match="not fit the model: 0 has scale 2.0 in the model and 8.0 in the checkpoi"):
            load_checkpoint(tmp_path / "last.pt", again)
        assert_same(trained(again), before)
        load_checkpoint(tmp_path / "last.pt", fastlora.load(again, tmp_path / "adapter"))
        assert torch.equal(again(torch.ones(1, 8)), model(torch.ones(1, 8)))
        older = torch.load(tmp_path / "last.pt")
        del older["scales"]
        torch.save(older, tmp_path / "older.pt")
        load_checkpoint(tmp_path / "older.pt", made(8))

    @pytest.mark.parametrize("trains", [["0"], ["0", "2"], ["1"], ["0", "1", "2"]])
    def test_some_base_weights_are_trained(self, file, trains):
        """Of the adapted 0 and 2, and of 1."""

        def made(seed):
            torch.manual_seed(seed)
            model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
            fastlora.inject(model, fastlora.LoraConfig(r=2, target_modules=["0", "2"]))
            for name in trains:
                model.get_parameter(f"{name}.weight").requires_grad_(True)
            return shifted(model)

        first, second = made(0), made(1)
        save_checkpoint(file, first)
        frozen = {n: p.clone() for n, p in second.named_parameters() if not p.requires_grad}
        load_checkpoint(file, second)
        assert_same(trained(second), trained(first))
        assert len(trained(first)) == 4 + len(trains)
        assert_same({n: p for n, p in second.named_parameters() if n in frozen}, frozen)
        second.load_state_dict(first.state_dict())
        assert_same(second.state_dict(), first.state_dict())
        for missing in ("0.weight", "1.weight", "2.weight"):
            whole = first.state_dict()
            del whole[missing]
            with pytest.raises((RuntimeError, ValueError), match=r"\.weight"):
                second.load_state_dict(whole)

    def test_what_an_optimizer_refuses_changes_nothing(self, tmp_path):
        model, optimizer = vit(), torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        with fastlora.track(model, every=1) as tracker:
            step(model, BATCHES[0], optimizer, tracker)
            save_checkpoint(tmp_path / "last.pt", model, tracker, optimizer=optimizer)
            for batch in BATCHES[1:4]:
                step(shifted(model), batch, optimizer, tracker)
            before, scores, state = trained(model), dict(tracker.scores()), torch.get_rng_state()
            other = torch.optim.SGD(trained_parameters(model), lr=0.1)
            with pytest.raises(ValueError, match="parameter group"):
                load_checkpoint(tmp_path / "last.pt", model, tracker, optimizer=other)
            assert tracker.steps == 4 and dict(tracker.scores()) == scores
            assert torch.equal(torch.get_rng_state(), state)
            assert_same(trained(model), before)

    @pytest.mark.parametrize("why, says", [("probes", "expected the probes"), ("closed", "expected frozen importance")])
    def test_what_a_tracker_refuses_leaves_the_optimizer(self, file, why, says):
        model, other = vit(), vit()
        optimizers = [torch.optim.SGD(trained_parameters(m), lr=lr) for m, lr in ((model, 0.1), (other, 0.2))]
        save_checkpoint(file, model, fastlora.track(model, warmup=4), optimizer=optimizers[0])
        tracker = fastlora.track(other, warmup=4, probes=2 if why == "probes" else "auto")
        if why == "closed":
            tracker.close()
        with pytest.raises(ValueError, match=f"state: {says}"):
            load_checkpoint(file, other, tracker, optimizer=optimizers[1])
        assert optimizers[1].param_groups[0]["lr"] == 0.2

    def test_merged_models_change_nothing(self, file):
        model = fastlora.merge(shifted(vit()))
        before, own = copy.deepcopy(model.state_dict()), trained(vit())
        outer = nn.ModuleDict({"first": nn.Linear(2, 2), "student": model})
        within = {f"student.{name}": tensor for name, tensor in own.items()}
        merged = "'default' is merged into 'model.blocks.0.attn.qkv'; call fastlora.unmerge first"
        with pytest.raises(ValueError, match=merged):
            load_checkpoint(file, model)
        with adapters_only(outer), pytest.raises(ValueError, match=merged.replace("model.", "student.model.")):
            outer.load_state_dict(within)
        with pytest.raises(ValueError, match=merged):
            model.load_state_dict(own, strict=False)
        assert_same(model.state_dict(), before)
        model.load_state_dict(before)  # the weights come along

    def test_other_trackers(self, file):
        model = vit()
        with (
            fastlora.track(model, probes=2) as tracker,
            pytest.raises(ValueError, match="state: expected the probes 2, got 4"),
        ):
            load_checkpoint(file, shifted(model), tracker)
        assert not torch.equal(trained(model)["model.head.bias"], trained(vit())["model.head.bias"])

    def test_tracked_only_before_or_only_now(self, file, caplog):
        load_checkpoint(file, vit())
        assert "nothing is tracked now" in caplog.text
        save_checkpoint(file, vit())
        model = vit()
        with fastlora.track(model) as tracker:
            load_checkpoint(file, model, tracker)
        assert "the tracker starts anew" in caplog.text

    def test_newer_torn_and_foreign_files(self, file):
        state = torch.load(file)
        torch.save({**state, "version": 2}, file)
        with pytest.raises(ValueError, match=r"last.pt: version 2 is newer than 1; update fastlora"):
            load_checkpoint(file, vit())
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(ValueError, match=r"last.pt: torn, or not a checkpoint"):
            load_checkpoint(file, vit())
        torch.save({"model": {}}, file)
        with pytest.raises(ValueError, match=r"last.pt: is no state of fastlora's"):
            load_checkpoint(file, vit())
        with pytest.raises(FileNotFoundError):
            load_checkpoint(file.with_name("none.pt"), vit())

    def test_models_without_adapters(self, tmp_path):
        with pytest.raises(ValueError, match="model: has no adapters"):
            save_checkpoint(tmp_path / "last.pt", nn.Linear(2, 2))
        with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got '"):
            adapters_only("model")


class TestAdaptersOnly:
    def test_inside_an_other_module_and_with_several_adapters(self):
        inner = vit()
        fastlora.add_adapter(inner, "b", fastlora.LoraConfig(r=2, target_modules=["fc1"]))
        outer = nn.ModuleDict({"student": inner, "teacher": nn.Linear(2, 2)})
        outer["teacher"].register_buffer("count", torch.ones(()))
        with adapters_only(outer):
            state = copy.deepcopy(outer.state_dict())
        assert state.keys() == {*trained(outer), "teacher.count"}
        assert any(".b.weight" in name for name in state)
        shifted(outer).load_state_dict(state)
        assert_same(trained(outer), {name: tensor for name, tensor in state.items() if name != "teacher.count"})
        del state["student.model.head.bias"]
        with pytest.raises(ValueError, match="student.model.head.bias is trained in the model and not in the checkpoi"):
            outer.load_state_dict(state, strict=False)

    def test_full_state_dicts_load_as_ever(self):
        model = vit()
        full = copy.deepcopy(model.state_dict())
        with adapters_only(model):
            model.load_state_dict(full)
        with pytest.raises(RuntimeError, match="Missing key"):
            model.load_state_dict({k: v for k, v in full.items() if "fc1" not in k})
        # A state dict of the base has no adapters and is not judged.
        base = {k: v for k, v in full.items() if "lora" not in k}
        assert all("lora" in key for key in model.load_state_dict(base, strict=False).missing_keys)

    def test_what_belongs_to_a_quantised_weight_goes_with_it(self):
        model = vit()
        scales = lambda module, state, prefix, metadata: state.update({f"{prefix}weight.absmax": torch.ones(2)})  # noqa: E731
        model.model.blocks[0].mlp.fc1.register_state_dict_post_hook(scales)
        assert "model.blocks.0.mlp.fc1.weight.absmax" in model.state_dict()
        with adapters_only(model):
            assert model.state_dict().keys() == trained(model).keys()

    def test_copies_and_pickles(self):
        model = vit()
        full = model.state_dict().keys()
        with adapters_only(model):
            for other in (copied := copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                state = model.state_dict()
                assert other.state_dict().keys() == (state.keys() if other is copied else full)
                shifted(other).load_state_dict(state)
                assert_same(trained(other), trained(model))

    def test_opened_twice_and_closed_once(self):
        model = vit()
        full = model.state_dict().keys()
        with adapters_only(model):
            with adapters_only(model):
                pass
            assert model.state_dict().keys() == trained(model).keys()
        assert model.state_dict().keys() == full


def accelerated(model, folder, resume=None, precision="no"):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=precision)
    optimizer = torch.optim.AdamW(fastlora.param_groups(model, lr_lora=1e-2, lr_head=1e-2))
    schedule = fastlora.training.Cosine(optimizer, 3)
    loader = torch.utils.data.DataLoader(DATA, batch_size=4)
    prepared, optimizer, loader, schedule = accelerator.prepare(model.train(), optimizer, loader, schedule)
    losses = []
    with fastlora.track(model, every=1, warmup=2) as tracker, register_for_checkpointing(accelerator, model, tracker):
        first = 0
        if resume:
            accelerator.load_state(folder / resume)
            first = 2
        for i, batch in enumerate(loader):
            if i < first:
                continue
            with accelerator.accumulate(prepared):
                loss = prepared(**batch)["loss"] + tracker.penalty(0.1)
                losses.append(loss.item())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    tracker.step(accelerator.scaler)
                    accelerator.clip_grad_norm_(prepared.parameters(), 0.5)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if i == 1 and not resume:
                accelerator.save_state(folder / "state")
    return losses, tracker


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_saves_and_resumes_what_is_trained(precision, tmp_path):
    # Without dropout: the loader of a resumed epoch draws a seed that the one of the whole epoch drew before.
    models = still(vit()), shifted(still(vit()))
    whole, one = accelerated(models[0], tmp_path, None, precision)
    again, two = accelerated(models[1], tmp_path, "state", precision)
    assert again == whole[2:] and len(whole) == 6
    assert_same(trained(models[1]), trained(models[0]))
    assert torch.equal(one.importance, two.importance) and one.steps == two.steps
    from safetensors.torch import load_file

    assert load_file(tmp_path / "state" / "model.safetensors").keys() == trained(models[0]).keys()
    with pytest.raises(ValueError, match=r"has rank 8 in the model and 4 in the checkpoint"):
        accelerated(vit(r=8), tmp_path, "state")


def timm_script(model, folder, resume=False):
    """The parts of timm's train.py: its optimiser, scheduler, scaler and saver."""
    from timm.models import resume_checkpoint
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from timm.utils import CheckpointSaver, dispatch_clip_grad

    optimizer = create_optimizer_v2(fastlora.param_groups(model, lr_lora=1e-2, lr_head=1e-2), opt="adamw", lr=1e-2)
    scheduler = CosineLRScheduler(optimizer, t_initial=4, warmup_t=1)
    losses, first = [], 0
    with fastlora.track(model.train(), every=1, warmup=8) as tracker, adapters_only(model):
        state = TrainingState(model, tracker)
        saver = CheckpointSaver(model, optimizer, checkpoint_dir=str(folder), recovery_dir=str(folder))
        if resume:
            first = resume_checkpoint(model, str(folder / "last.pth.tar"), optimizer)
            state.load_state_dict(torch.load(folder / "fastlora.pt"))
        for epoch in range(first, 4):
            scheduler.step(epoch)
            for x, y in BATCHES[:3]:
                loss = model(x, y)["loss"] + tracker.penalty(0.1)
                losses.append(loss.item())
                loss.backward()
                dispatch_clip_grad(model.parameters(), 0.5)
                tracker.step()
                optimizer.step()
                optimizer.zero_grad()
            if epoch < 2 and not resume:
                saver.save_checkpoint(epoch, metric=-losses[-1])
                torch.save(state.state_dict(), folder / "fastlora.pt")
    return losses, tracker


def test_timms_saver_holds_what_is_trained(tmp_path):
    models = still(vit()), shifted(still(vit()))
    whole, one = timm_script(models[0], tmp_path)
    again, two = timm_script(models[1], tmp_path, resume=True)
    assert again == whole[6:] and len(whole) == 12
    assert_same(trained(models[1]), trained(models[0]))
    assert torch.equal(one.importance, two.importance)
    assert torch.load(tmp_path / "last.pth.tar")["state_dict"].keys() == trained(models[0]).keys()


def test_statistics_under_timms_scaler():
    from timm.utils import NativeScaler

    found = []
    for scaled in (False, True):
        model = still(vit()).train()
        optimizer = torch.optim.SGD(trained_parameters(model), lr=0.1)
        native = NativeScaler(device="cpu")
        native._scaler = scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1, enabled=scaled)
        with fastlora.track(model, every=1) as tracker:
            optimizer.register_step_pre_hook(lambda *_: tracker.step(scaler))  # noqa: B023
            for x, y in BATCHES[:3]:
                native(model(x, y)["loss"], optimizer, clip_grad=0.5, parameters=model.parameters())
                optimizer.zero_grad()
        assert tracker.steps == 3
        found.append(dict(tracker.scores()))
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_a_bert_of_several_dtypes(tmp_path):
    model = bert(adapter_dtype=torch.bfloat16)
    save_checkpoint(tmp_path / "last.pt", model)
    other = shifted(bert(adapter_dtype=torch.bfloat16))
    load_checkpoint(tmp_path / "last.pt", other)
    assert_same(trained(other), trained(model))


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("options", [{}, {"foreach": False}, {"exclude_buffers": True}])
def test_timms_averages_pair_the_same_values(inside, options):
    utils = pytest.importorskip("timm.utils")
    model = still(vit())
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with adapters_only(model) if inside else contextlib.nullcontext():
        averages = utils.ModelEmaV3(model, decay=0.9, **options)
    with adapters_only(model):
        with torch.no_grad():
            for p in trained_parameters(model):
                p.add_(1.0)
        averages.update(model)
    for name, value in model.state_dict().items():
        expected = before[name] + 0.1 * (value - before[name])
        torch.testing.assert_close(dict(averages.module.named_parameters()).get(name, expected), expected)
