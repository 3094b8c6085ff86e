"""lightning.Trainer on a small timm model."""

from __future__ import annotations

import pytest
import torch
from support.trainer_help import Images, assert_same, factors, images, shifted, still, trained, trained_parameters, vit
from torch import nn

import fastlora

lightning = pytest.importorskip("lightning")

from fastlora.integrations.lightning import FastLoraCallback  # noqa: E402


class Module(lightning.LightningModule):
    def __init__(self, model=None, lr=1e-2):
        super().__init__()
        self.net, self.lr, self.losses = vit() if model is None else model, lr, []
        self.extra = nn.Linear(2, 2).requires_grad_(False)

    def training_step(self, batch, index):
        loss = self.net(batch["pixel_values"], batch["labels"])["loss"]
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(trained_parameters(self), lr=self.lr)


def fit(module, folder, callback, resume=None, epochs=4, checkpoint=None, **options):
    loader = torch.utils.data.DataLoader(images(), batch_size=4)
    checkpoint = checkpoint or lightning.pytorch.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    t = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[callback, checkpoint], default_root_dir=folder, **options,
    )  # fmt: skip
    lightning.seed_everything(3, verbose=False)
    t.fit(module, loader, ckpt_path=resume)
    return t


TRACK = {"every": 1, "warmup": 9}


def test_resumes_bit_for_bit_from_what_was_trained(tmp_path):
    options = dict(accumulate_grad_batches=2, gradient_clip_val=0.05)
    # Without dropout: Lightning's checkpoints do not hold the random number generators.
    modules = [Module(still(vit())), shifted(Module(still(vit())))]
    callbacks = [FastLoraCallback(track=TRACK, penalty=0.1) for _ in range(2)]
    fit(modules[0], tmp_path, callbacks[0], **options)
    fit(modules[1], tmp_path / "again", callbacks[1], str(tmp_path / "epoch=1.ckpt"), **options)
    assert len(modules[0].losses) == 24 and modules[1].losses == modules[0].losses[12:]
    assert_same(trained(modules[1]), trained(modules[0]))
    assert torch.equal(callbacks[0].tracker.importance, callbacks[1].tracker.importance)
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == trained(modules[0]).keys()
    assert "net.model.patch_embed.proj.weight" in modules[0].state_dict()


def test_the_penalty_is_clipped_with_the_loss(tmp_path):
    """Against a loop by hand: two micro-batches a step, SGD, clipping that binds."""
    weight, data = 5.0, images()

    class Sgd(Module):
        def configure_optimizers(self):
            return torch.optim.SGD(trained_parameters(self), lr=0.05)

    def start():
        model = still(vit())
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.copy_(torch.linspace(-0.3, 0.3, p.numel()).view_as(p))
        return model

    callback = FastLoraCallback(track={"every": 1, "warmup": 2}, penalty=weight)
    module = Sgd(start())
    options = dict(accumulate_grad_batches=2, gradient_clip_val=0.5)
    fit(module, tmp_path, callback, epochs=2, **options)
    other = start()
    optimizer = torch.optim.SGD(trained_parameters(other), lr=0.05)
    with fastlora.track(other, every=1, warmup=2) as tracker:
        for _ in range(2):
            for i in range(0, 24, 8):
                for batch in (data[i : i + 4], data[i + 4 : i + 8]):
                    x, y = torch.stack([b["pixel_values"] for b in batch]), torch.tensor([b["labels"] for b in batch])
                    ((other.train()(x, y)["loss"] + tracker.penalty(weight)) / 2).backward()
                nn.utils.clip_grad_norm_(other.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
                tracker.step()
    torch.testing.assert_close(callback.tracker.importance, tracker.importance, rtol=1e-4, atol=0)
    mine, theirs, first = trained(module.net), trained(other), trained(start())
    for name in mine:
        moved = (theirs[name] - first[name]).abs().max()
        assert moved == 0 or (mine[name] - theirs[name]).abs().max() < 1e-3 * moved, name


def test_adapters_stand_still_at_first(tmp_path):
    module = Module()
    start, seen = factors(module.net), []
    module.on_train_batch_end = lambda *args: seen.append(factors(module.net))
    fit(module, tmp_path, FastLoraCallback(freeze=3), epochs=1)
    for step in range(3):
        assert_same(seen[step], start)
    assert all(not torch.equal(seen[3][name], start[name]) for name in start if "lora_B" in name)


def test_the_best_checkpoint_loads_strictly(tmp_path):
    module = Module()
    best = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, "best", monitor="score", mode="max")
    module.on_train_epoch_end = lambda: module.log("score", -float(module.current_epoch))
    fit(module, tmp_path, FastLoraCallback(), checkpoint=best)
    saved = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    other = Module()
    other.load_state_dict(module.state_dict())
    with fastlora.integrations.adapters_only(other):
        other.load_state_dict(saved)
    assert_same({name: other.state_dict()[name] for name in saved}, saved)


def test_bf16_autocast(tmp_path):
    found = []
    for precision in ("32-true", "bf16-mixed"):
        callback = FastLoraCallback(track={"every": 1, "probes": 64, "ema": None})
        fit(Module(still(vit()), lr=1e-4), tmp_path / precision, callback, epochs=1, precision=precision)
        found.append(callback.tracker.scores())
    for key, value in found[0].items():
        assert found[1][key] == pytest.approx(value, rel=0.1)


def test_fp16_takes_the_loss_scale_out(tmp_path):
    """With Lightning's own plugin; fp16 on a CPU needs to be asked for like that."""
    found = []
    for enabled in (False, True):
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1, enabled=enabled)
        plugin = lightning.pytorch.plugins.MixedPrecision("16-mixed", "cpu", scaler)
        callback = FastLoraCallback(track={"every": 1}, penalty=0.1)
        module = Module(still(vit()), lr=1e-4)
        fit(module, tmp_path / str(enabled), callback, epochs=1, plugins=[plugin])
        found.append(callback.tracker.scores())
    for key, value in found[0].items():
        # Gradients are rounded to fp16 with and without the scale.
        assert found[1][key] == pytest.approx(value, rel=0.05)


def test_a_schedule_with_frozen_groups(tmp_path):
    class Scheduled(Module):
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(fastlora.param_groups(self.net, lr_lora=1e-2, lr_head=1e-2))
            schedule = fastlora.training.Cosine(optimizer, 24, freeze=9)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    whole, again, start, seen = Scheduled(still(vit())), Scheduled(still(vit())), factors(vit()), []
    whole.on_train_batch_end = lambda *args: seen.append(factors(whole.net))
    fit(whole, tmp_path, FastLoraCallback())
    fit(again, tmp_path / "again", FastLoraCallback(), str(tmp_path / "epoch=0.ckpt"))
    assert_same(seen[8], start)
    assert not torch.equal(seen[10]["model.blocks.0.attn.qkv.lora_B.default.q"], start["model.blocks.0.attn.qkv.lora_B.default.q"])  # fmt: skip  # noqa: E501
    assert again.losses == whole.losses[6:]
    assert_same(trained(again), trained(whole))


def test_a_model_that_is_adapted_in_configure_model(tmp_path):
    class Late(Module):
        def __init__(self):
            super().__init__(nn.Identity())

        def configure_model(self):
            if isinstance(self.net, nn.Identity):
                self.net = vit()

    whole, again = Late(), Late()
    fit(whole, tmp_path, FastLoraCallback())
    fit(again, tmp_path / "again", FastLoraCallback(), str(tmp_path / "epoch=3.ckpt"))
    assert_same(trained(again), trained(whole))
    with pytest.raises(ValueError, match=r"model.blocks.0.attn.qkv\[q\] has rank 8 in the model and 4 in the checkpoi"):
        fit(Module(vit(r=8)), tmp_path / "other", FastLoraCallback(), str(tmp_path / "epoch=3.ckpt"))


def test_only_the_optimiser_with_adapters_counts(tmp_path):
    class Two(Module):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.extra.requires_grad_(True)

        def training_step(self, batch, index):
            loss = self.net(batch["pixel_values"], batch["labels"])["loss"] + self.extra.weight.square().sum()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self):
            return [torch.optim.SGD(m.parameters(), lr=0.1) for m in (self.extra, self.net)]

    callback = FastLoraCallback()
    fit(Two(), tmp_path, callback, epochs=1)
    assert callback.tracker.steps == 6


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="model: has no adapters; call fastlora.inject first"):
        fit(Module(Images()), tmp_path, FastLoraCallback())
    callback = FastLoraCallback()
    fit(Module(), tmp_path, callback, epochs=1)
    with pytest.raises(ValueError, match=r"checkpoint: version 99 is newer than 1; update fastlora"):
        FastLoraCallback().load_state_dict({**callback.state_dict(), "version": 99})
    # Tracked otherwise than before.
    with pytest.raises(ValueError, match="state: expected the probes 2, got 4"):
        fit(Module(), tmp_path / "a", FastLoraCallback(track={"probes": 2}), str(tmp_path / "epoch=0.ckpt"))


class Alone(Module):
    def __init__(self):
        super().__init__()
        del self.extra


class Narrow(Alone):
    """The same module with other ranks."""

    def __init__(self):
        super().__init__()
        fastlora.set_ranks(self.net, {row.key: 1 for row in fastlora.summary(self.net).rows}, reinit=True)


def test_load_from_checkpoint(tmp_path, caplog):
    """Strict as to adapters, the head and whatever else the module has; the base stays as ``__init__`` made it."""
    module = Alone()
    checkpoint = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, "last")
    fit(module, tmp_path, FastLoraCallback(), epochs=1, checkpoint=checkpoint)
    other = Alone.load_from_checkpoint(checkpoint.best_model_path)
    assert_same(other.net.state_dict(), module.net.state_dict())
    assert caplog.text.count("which stays as the module's __init__ made it") == 1
    caplog.clear()
    with pytest.raises(ValueError, match="checkpoint: does not fit the model: .* has rank 1 in the model and"):
        Narrow.load_from_checkpoint(checkpoint.best_model_path)
    saved = torch.load(checkpoint.best_model_path, weights_only=False)
    with pytest.raises(RuntimeError, match="Missing key"):
        Alone().load_state_dict(saved["state_dict"])  # elsewhere a missing base is an error, as ever
    with pytest.raises(RuntimeError, match=r"Missing key.*: \"extra.weight\", \"extra.bias\"\. $"):
        Module.load_from_checkpoint(checkpoint.best_model_path)
    saved["state_dict"].pop(next(key for key in saved["state_dict"] if "lora_A" in key))
    torch.save(saved, tmp_path / "less.ckpt")
    with pytest.raises(ValueError, match="does not fit the model"):
        Alone.load_from_checkpoint(tmp_path / "less.ckpt")
