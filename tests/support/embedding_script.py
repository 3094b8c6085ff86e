"""What the embedding tests start in processes of their own: ``accelerate launch``, and FSDP1."""

from __future__ import annotations

import logging
import sys

import torch
from torch import nn

import fastlora


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        return self.o(torch.tanh(self.q(x) + self.k(x)) * self.v(x))


def model():
    torch.manual_seed(0)
    config = fastlora.LoraConfig(r=2, target_modules=["q", "k", "v", "o"])
    return fastlora.inject(nn.Sequential(Block(), Block(), nn.Linear(8, 3)), config)


def batch(step, rank):
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + rank))


def train(net, optimizer, batches, backward=lambda loss: loss.backward()):
    for x in batches:
        backward(net(x).square().mean())
        optimizer.step()
        optimizer.zero_grad()


def launched(folder):
    """Run by ``accelerate launch``."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    net = model()
    optimizer = torch.optim.SGD(fastlora.param_groups(net), lr=0.1)
    net, optimizer = accelerator.prepare(net, optimizer)
    train(net, optimizer, [batch(i, accelerator.process_index) for i in range(3)], accelerator.backward)
    fastlora.save(net, folder)


def fsdp1(rank, folder):
    """One of two processes under FullyShardedDataParallel; leaves what was logged, and the trained factors."""
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    from support.distributed_help import leave

    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("fastlora").addHandler(handler)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    net = FullyShardedDataParallel(
        model(), use_orig_params=True, device_id=torch.device("cpu"), auto_wrap_policy=ModuleWrapPolicy({Block})
    )
    trained = [p for p in net.parameters() if p.requires_grad]
    train(net, torch.optim.SGD(trained, lr=0.1), [batch(i, rank) for i in range(4)])
    with FullyShardedDataParallel.summon_full_params(net):
        full = {n.replace("_fsdp_wrapped_module.", ""): p.clone() for n, p in net.named_parameters() if "lora_" in n}
    torch.save((said, full), f"{folder}/rank{rank}.pt")
    leave()


def fsdp1_of_single(rank, folder):
    """As ``fsdp1``, around each adapted layer and around each factor; leaves what the first forward said."""
    import functools

    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

    from support.distributed_help import leave

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    said = []
    for kind in (fastlora.nn.Linear, type(model()[0].q.lora_A["default"])):
        chosen = functools.partial(lambda_auto_wrap_policy, lambda_fn=lambda module, kind=kind: type(module) is kind)
        net = FullyShardedDataParallel(
            model(), use_orig_params=True, device_id=torch.device("cpu"), auto_wrap_policy=chosen
        )
        try:
            net(batch(0, rank))
        except ValueError as error:
            said.append(str(error))
        dist.barrier()
    torch.save(said, f"{folder}/rank{rank}.pt")
    leave()


if __name__ == "__main__":
    launched(sys.argv[1])
