"""fully_shard under Hugging Face's Trainer and under Lightning, for ``torchrun``. Argument: a folder."""

from __future__ import annotations

import os
import sys
import warnings

import torch
import torch.distributed as dist

from fastlora.testing import enable_torchvision

enable_torchvision()

import accelerate.utils  # noqa: E402
import lightning  # noqa: E402
import transformers  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from lightning.pytorch.strategies import ModelParallelStrategy  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402

from fastlora._utils.distributed import whole  # noqa: E402
from fastlora.integrations.hf import FastLoraCallback  # noqa: E402
from fastlora.integrations.lightning import FastLoraCallback as LightningCallback  # noqa: E402
from support.distributed_help import leave  # noqa: E402
from support.trainer_help import bert, images, shifted, still, texts, trained_parameters, vit  # noqa: E402

TRACK = {"every": 1, "warmup": 3}
OPTIONS = dict(
    max_steps=4, save_steps=2, logging_steps=1, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True,
    max_grad_norm=0.1, average_tokens_across_devices=False,
)  # fmt: skip


def gathered(m):
    return {n: whole(p).detach().clone() for n, p in m.named_parameters() if p.requires_grad}


def fsdp_on_a_cpu():
    """Accelerate turns FSDP on for accelerators only; its code is the same on a CPU."""
    plain = AcceleratorState.__init__

    def forced(self, *args, fsdp_plugin=None, **kwargs):
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            kind = accelerate.utils.DistributedType.FSDP
            AcceleratorState._shared_state.update(distributed_type=kind, fsdp_plugin=fsdp_plugin)

    AcceleratorState.__init__ = forced


def in_hf(model, folder, resume=None, ram=False):
    """A run of the Trainer; with ``ram`` Accelerate shards a model on the meta device and fills it."""
    config = {
        "version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"], "cpu_ram_efficient_loading": ram,
        "state_dict_type": "SHARDED_STATE_DICT", "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    }  # fmt: skip
    args = transformers.TrainingArguments(
        output_dir=folder, per_device_train_batch_size=4, fsdp=True, fsdp_config=config, **OPTIONS
    )
    callback = FastLoraCallback(track=TRACK, penalty=0.1)
    trainer = transformers.Trainer(model=model, args=args, train_dataset=texts(), callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, gathered(trainer.model), dict(callback.tracker.scores()), callback.tracker.importance


class Module(lightning.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.net, self.losses = model, []

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for block in self.net.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def training_step(self, batch, index):
        loss = self.net(batch["pixel_values"], batch["labels"])["loss"]
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(trained_parameters(self), lr=1e-2)


def in_lightning(model, folder, resume=None):
    callback = LightningCallback(track=TRACK, penalty=0.1)
    checkpoint = lightning.pytorch.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", devices=2, strategy=strategy, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback, checkpoint], use_distributed_sampler=False,
    )  # fmt: skip
    module, data = Module(model), images()
    sampler = torch.utils.data.DistributedSampler(data, shuffle=False)
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4, sampler=sampler), ckpt_path=resume)
    return module.losses, gathered(module.net), dict(callback.tracker.scores()), callback.tracker.importance


def main(folder):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    lightnings = f"{folder}/lightning"
    found = {
        "lightning": in_lightning(still(vit()), lightnings),
        "lightning, resumed": in_lightning(shifted(still(vit())), f"{folder}/again", f"{lightnings}/epoch=0.ckpt"),
    }
    fsdp_on_a_cpu()
    found["hf"] = in_hf(bert(dropout=0.0), f"{folder}/hf", ram=True)
    found["hf, resumed"] = in_hf(shifted(bert(dropout=0.0)), f"{folder}/hf", f"{folder}/hf/checkpoint-2")
    torch.save(found, os.path.join(folder, f"rank{rank}.pt"))
    dist.barrier()
    leave()


if __name__ == "__main__":
    main(sys.argv[1])
