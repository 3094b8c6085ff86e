"""Experts that are one parameter [E, N, K] under DDP and fully_shard: what one process does with all of the data."""

from __future__ import annotations

import pytest
import torch
from support.distributed_help import assert_read, read, run_ranks, trained
from support.experts_zoo import moe, ranks_of
from support.helpers import config, randomise
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastlora
from fastlora._utils.distributed import whole

STEPS = range(3)


def model(name="Mixtral"):
    m = moe(name)
    names = fastlora.model.modules.role_targets(m, "experts")
    fastlora.inject(m, config(r=2, target_modules="experts", rank_pattern=ranks_of(m, names)))
    torch.manual_seed(1)
    return randomise(m).train()


def loss_of(m, step, rank):
    """Few tokens, so that some experts have no rows on one rank and others on none."""
    ids = torch.randint(3, 64, (1, 2), generator=torch.Generator().manual_seed(10 * step + rank))
    logits = m(input_ids=ids).logits
    return (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).square().mean()


def sharded(m):
    for layer in m.model.layers:
        fully_shard(layer)
    return fully_shard(m)


def checkpointed(m):
    m.gradient_checkpointing_enable({"use_reentrant": False})
    return m


def compiled(m):
    m.compile(backend=GRAPHS)
    return m


GRAPHS = CompileCounterWithBackend("aot_eager")
WRAPS = {
    "ddp": lambda m: DistributedDataParallel(m, find_unused_parameters=True),
    "ddp, checkpointed": lambda m: DistributedDataParallel(checkpointed(m), find_unused_parameters=True),
    "fully_shard": sharded,
    "fully_shard, checkpointed": lambda m: sharded(checkpointed(m)),
    "ddp, compiled": lambda m: compiled(DistributedDataParallel(m, find_unused_parameters=True)),
    "fully_shard, compiled": lambda m: compiled(sharded(m)),
}


def work(rank, world, folder):
    found = {}
    for how, wrap in WRAPS.items():
        GRAPHS.clear()
        m = model()
        parallel = wrap(m)
        optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)
        with fastlora.track(parallel, every=1, ema=None) as tracker:
            for step in STEPS:
                loss_of(parallel, step, rank).backward()
                tracker.step()
                optimizer.step()
                optimizer.zero_grad()
        parameters = {n: whole(p).detach().clone() for n, p in m.named_parameters() if p.requires_grad}
        found[how] = parameters, read(tracker)
        assert ("compiled" in how) is bool(GRAPHS.frame_count), GRAPHS.frame_count
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(work, 2, tmp_path_factory.mktemp("experts"))


@pytest.fixture(scope="module")
def alone():
    m = model()
    optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)
    absent = []
    with fastlora.track(m, every=1, ema=None) as tracker:
        for step in STEPS:
            for rank in range(2):
                (loss_of(m, step, rank) / 2).backward()
            absent.append(sum(p.grad is None for p in m.parameters() if p.requires_grad))
            tracker.step()
            optimizer.step()
            optimizer.zero_grad()
    assert any(absent)
    return trained(m), read(tracker)


@pytest.mark.parametrize("how", WRAPS)
def test_parameters_and_statistics_are_those_of_one_process(ranks, alone, how):
    parameters, statistics = alone
    before = trained(model())
    assert any(not torch.equal(before[n], p) for n, p in parameters.items())
    for found in ranks:
        got, read_there = found[how]
        torch.testing.assert_close(got, parameters, rtol=1e-9, atol=1e-12)
        assert_read(read_there, statistics)


def test_experts_spread_over_processes_are_refused_by_name():
    m = moe()
    m.model.layers[1].mlp.experts._is_expert_parallel = True
    kinds = [type(x) for x in m.modules()]
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts.*its experts are spread over processes"):
        fastlora.inject(m, config(r=2, target_modules="experts"))
    assert kinds == [type(x) for x in m.modules()] and all(p.requires_grad for p in m.parameters())
    late = model()
    late.model.layers[1].mlp.experts._is_expert_parallel = True
    with pytest.raises(ValueError, match="spread over processes .expert parallel., where adapters do not run"):
        loss_of(late, 0, 0)
