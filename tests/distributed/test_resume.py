"""Training under fully_shard that goes on in another number of processes: adapters, optimiser and statistics."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support.distributed_help import assert_read, batch, optimiser, read, run_ranks
from support.tracker_help import loss_of, model
from support.trainer_help import shifted
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import fastlora
from fastlora._utils.distributed import whole
from fastlora.integrations import TrainingState, adapters_only, load_checkpoint, save_checkpoint

STEPS, CUT, SHARDS = 4, 2, 4
TRACK = dict(statistics=("grad_sq", "act_var"), every=1, warmup=3)


def sharded(m):
    for block in m[:-1]:
        fully_shard(block)
    return fully_shard(m)


def train(m, tracker, optimizer, rank, world, steps):
    """The same global batch in any number of processes: a rank takes its part of four unequal pieces."""
    mine = range(rank * SHARDS // world, (rank + 1) * SHARDS // world)
    for step in steps:
        for piece in mine:
            (loss_of(m, batch(step, 0, piece)) / len(mine)).backward()
        tracker.apply_penalty(0.1)
        tracker.step()
        optimizer.step()
        m.zero_grad()


def states(m, optimizer):
    """torch's checkpoints of a sharded model: without the frozen base, under names that no world size changes."""
    with adapters_only(m):
        found, optimised = get_state_dict(m, optimizer)
    return {"model": found, "optimizer": optimised}


def run(m, optimizer, rank, world, folder, resume=None, save=None):
    """Train a half, or the second half from what another number of processes left."""
    with fastlora.track(m, **TRACK) as tracker:
        if resume is not None:
            state = states(m, optimizer)
            dcp.load(state, checkpoint_id=f"{folder}/{resume}")
            with adapters_only(m):
                set_state_dict(m, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
            TrainingState(m, tracker).load_state_dict(torch.load(f"{folder}/{resume}.pt", weights_only=True))
        train(m, tracker, optimizer, rank, world, range(CUT, STEPS) if resume is not None else range(CUT))
        if save is not None:
            dcp.save(states(m, optimizer), checkpoint_id=f"{folder}/{save}")
            statistics = TrainingState(m, tracker).state_dict()
            if rank == 0:
                torch.save(statistics, f"{folder}/{save}.pt")
            dist.barrier()
        return {n: whole(p).detach().clone() for n, p in m.named_parameters() if p.requires_grad}, read(tracker)


def fresh():
    m = sharded(model())
    return m, optimiser(m)


def first_of_two(rank, world, folder):
    logging.disable(logging.WARNING)
    run(*fresh(), rank, world, folder, save="two")


def first_and_second_of_four(rank, world, folder):
    logging.disable(logging.WARNING)
    run(*fresh(), rank, world, folder, save="four")
    m, optimizer = fresh()
    shifted(m)
    return run(m, optimizer, rank, world, folder, resume="two"), refused(m, folder)


def second_of_two(rank, world, folder):
    logging.disable(logging.WARNING)
    return run(*fresh(), rank, world, folder, resume="four")


def refused(m, folder):
    said = []
    for call in (save_checkpoint, load_checkpoint):
        try:
            call(f"{folder}/none.pt", m)
        except ValueError as error:
            said.append(str(error))
    return said


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    run_ranks(first_of_two, 2, folder)
    (folder / "store").unlink()
    four = run_ranks(first_and_second_of_four, 4, folder)
    (folder / "store").unlink()
    return folder, {"2 to 4": [each[0] for each in four], "4 to 2": run_ranks(second_of_two, 2, folder)}, four[0][1]


@pytest.fixture(scope="module")
def alone():
    """One process from the first step to the last."""
    m = model()
    optimizer = optimiser(m)
    with fastlora.track(m, **TRACK) as tracker:
        train(m, tracker, optimizer, 0, 1, range(STEPS))
    return {n: p.detach() for n, p in m.named_parameters() if p.requires_grad}, read(tracker), tracker.importance


def assert_as_alone(got, alone):
    parameters, scores = got
    assert parameters.keys() == alone[0].keys()
    for name, want in alone[0].items():
        torch.testing.assert_close(parameters[name], want, rtol=1e-7, atol=1e-9)
    for kind, values in alone[1].items():
        assert scores[kind] == pytest.approx(values, rel=1e-6)


@pytest.mark.parametrize("how", ["2 to 4", "4 to 2"])
def test_another_number_of_processes_goes_on(found, alone, how):
    for rank in found[1][how]:
        assert_as_alone(rank, alone)
        assert_read(rank[1], found[1][how][0][1])


@pytest.mark.parametrize("saved", ["two", "four"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch: that there is no process group is meant
def test_one_process_goes_on(found, alone, saved):
    m = shifted(model())
    assert_as_alone(run(m, optimiser(m), 0, 1, found[0], resume=saved), alone)


def test_checkpoints_of_shards_hold_no_base(found):
    reader = dcp.FileSystemReader(found[0] / "four")
    names = [name for name in reader.read_metadata().state_dict_metadata if name.startswith("model.")]
    assert sorted(names) == sorted(f"model.{n}" for n, p in model().named_parameters() if p.requires_grad)


def test_one_file_for_shards_is_refused(found):
    said = found[2]
    assert len(said) == 2
    assert all("model: is sharded by fully_shard" in text and "torch.distributed.checkpoint" in text for text in said)
    assert not (found[0] / "none.pt").exists()
