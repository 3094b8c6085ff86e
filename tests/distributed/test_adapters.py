"""Adapters under data-parallel training: one that a rank lacks has zeros there, one that all lack stays as it is."""

from __future__ import annotations

import torch
import torch.multiprocessing as mp
from support.distributed_help import leave
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastlora
from fastlora import LoraConfig

# By step: the ids of each rank's four samples. "c" is absent from both in step 0, "b" from one in step 1.
IDS = [([0, 1, -1, 0], [1, 1, 0, 0]), ([2, 0, 2, 0], [1, 0, 2, 2]), ([0, 1, 2, 1], [0, 0, 0, 0])]


def model():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    fastlora.inject(m, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    for name in "bc":
        fastlora.add_adapter(m, name, LoraConfig(r=1, target_modules=["0"], init_lora_weights=False))
    return m


def data(step, rank):
    return torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * step + rank))


def optimiser(m):
    return torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)


def losses(m, base, step, rank):
    ids = torch.tensor(IDS[step][rank])
    with fastlora.use_adapters(base, ids):
        return fastlora.per_adapter_mean(m(data(step, rank)).square().sum(1), ids)


def work(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    m = model()
    parallel, optimizer = DistributedDataParallel(m), optimiser(m)
    fastlora.freeze_unused_adapters(m, optimizer)
    for step in range(len(IDS)):
        losses(parallel, m, step, rank).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save({n: p.detach() for n, p in m.named_parameters()}, f"{folder}/{rank}.pt")
    leave()


def test_two_ranks_equal_one_process(tmp_path):
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    m = model()
    optimizer = optimiser(m)
    for step in range(len(IDS)):
        (sum(losses(m, m, step, rank) for rank in range(2)) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, want in m.named_parameters():
        for got in ranks:
            torch.testing.assert_close(got[name], want.detach(), rtol=1e-12, atol=1e-12)
