"""Several processes on this machine, and one process that does what they do together."""

from __future__ import annotations

import contextlib
import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from support.tracker_help import data, loss_of


def run_ranks(work, world, folder, *args):
    """``work(rank, world, folder, *args)`` in ``world`` gloo processes; what each returned."""
    mp.spawn(_rank, (work, world, str(folder), args), nprocs=world)
    return [torch.load(f"{folder}/rank{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(rank, work, world, folder, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save(work(rank, world, folder, *args), f"{folder}/rank{rank}.pt")
    dist.barrier()
    leave()


def leave():
    """End a process of several that has done its work.

    What still holds the group (FSDP1's hooks, until a backward frees them) keeps gloo's threads alive, and one that
    lets go of a tensor while the interpreter is taken down aborts the process.
    """
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def batch(step, micro, rank):
    """Ranks see other samples, other numbers of them and other lengths."""
    seed = 1000 * step + 100 * micro + rank
    return data(samples=3 + rank + micro, tokens=4 + rank, seed=seed)


def optimiser(m):
    return torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.02)


def train_rank(parallel, tracker, rank, steps, micros=2, optimizer=None, sync=None):
    """One rank's part: gradients are accumulated, and reduced with the last micro-batch only."""
    losses = []
    for step in steps:
        total = 0.0
        for micro in range(micros):
            last = micro == micros - 1
            with contextlib.nullcontext() if last or sync is None else sync():
                loss = loss_of(parallel, batch(step, micro, rank)) / micros
                loss.backward()
            total += float(loss.detach())
        _step(parallel, tracker, optimizer)
        losses.append(total)
    return losses


def train_alone(m, tracker, world, steps, micros=2, optimizer=None):
    """All ranks' micro-batches one after the other; losses by rank."""
    losses = []
    for step in steps:
        totals = [0.0] * world
        for micro in range(micros):
            for rank in range(world):
                loss = loss_of(m, batch(step, micro, rank)) / micros
                (loss / world).backward()
                totals[rank] += float(loss.detach())
        _step(m, tracker, optimizer)
        losses.append(totals)
    return [list(column) for column in zip(*losses, strict=True)]


def _step(m, tracker, optimizer):
    if tracker is not None:
        tracker.step()
    if optimizer is not None:
        optimizer.step()
    m.zero_grad()


def trained(m):
    return {n: p.detach().clone() for n, p in m.named_parameters() if p.requires_grad}


def read(tracker):
    """Everything that a tracker knows."""
    found = {kind: dict(tracker.scores(kind)) for kind in tracker.kinds}
    return found | {kind: tracker.covariances(kind) for kind in tracker._covariances.kinds}


def assert_read(got, want):
    assert got.keys() == want.keys()
    for kind, values in want.items():
        assert list(got[kind]) == list(values)
        for key, value in values.items():
            other = torch.as_tensor(got[kind][key], dtype=torch.float64)
            value = torch.as_tensor(value, dtype=torch.float64)
            torch.testing.assert_close(other, value, rtol=1e-9, atol=1e-15, msg=f"{kind} {key}")
