"""fully_shard: two and four ranks with unequal data and sharded weights do what one process does with all of it."""

from __future__ import annotations

import logging

import pytest
import torch
from support.distributed_help import assert_read, batch, optimiser, read, run_ranks, train_alone, train_rank, trained
from support.tracker_help import data, loss_of, model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fastlora
from fastlora._utils.distributed import whole
from fastlora.nn.linear import adapted_layers

STEPS = range(3)
BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def by_block(m, **kwargs):
    for block in m[:-1]:
        fully_shard(block, **kwargs)
    return fully_shard(m, **kwargs)


def by_linear(m, **kwargs):
    for layer in adapted_layers(m).values():
        fully_shard(layer, **kwargs)
    return fully_shard(m, **kwargs)


SHARDING = {
    "root": fully_shard,
    "by block": by_block,
    "by linear": by_linear,
    "kept whole": lambda m: by_block(m, reshard_after_forward=False),
}


def gathered(m):
    return {n: whole(p).detach().clone() for n, p in m.named_parameters() if p.requires_grad}


def training(rank, how, track_first):
    """Losses, parameters and statistics of training with a penalty, its gradient by hand or by autograd."""
    m = model()
    if track_first:
        tracker = fastlora.track(m, statistics=("grad_sq", "act_var"))
        SHARDING[how](m)
    else:
        SHARDING[how](m)
        tracker = fastlora.track(m, statistics=("grad_sq", "act_var"))
    optimizer = optimiser(m)
    optimizer.register_step_pre_hook(lambda *_: with_penalty(tracker, by_hand=not track_first))
    losses = train_rank(m, tracker, rank, STEPS, optimizer=optimizer)
    tracker.close()
    return losses, gathered(m), read(tracker)


def with_penalty(tracker, by_hand):
    if by_hand:
        tracker.apply_penalty(0.01)
    else:
        tracker.penalty(0.01).backward()


def divided(rank, world):
    """Gradients are summed, not averaged: so are the statistics."""
    m = fully_shard(model())
    m.set_gradient_divide_factor(1.0)
    with fastlora.track(m, statistics=("grad_sq", "act_var")) as tracker:
        train_rank(m, tracker, rank, STEPS)
    with fastlora.track(m, estimator="exact", statistics=("fisher", "act_cov", "grad_cov")) as exact:
        train_rank(m, exact, rank, STEPS)
    return read(tracker), read(exact)


def replicated(rank, world):
    """Shards over pairs, replicas over the others."""
    m = by_block(model(), mesh=init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("replicate", "shard")))
    with fastlora.track(m, estimator="exact", statistics=("grad_sq", "fisher")) as tracker:
        train_rank(m, tracker, rank, STEPS)
    return read(tracker)


def low_precision(rank, world):
    """The base and what runs are bfloat16, the adapters' masters and what is measured float32."""
    m = by_block(model(dtype=torch.float32), mp_policy=BFLOAT16)
    with fastlora.track(m, statistics=("grad_sq", "act_var")) as tracker:
        x, y = data(dtype=torch.float32, seed=rank)
        loss_of(m, (x, y)).backward()
        tracker.step()
    grads = [p.grad for p in m.parameters() if p.requires_grad]
    return read(tracker), [g.dtype for g in grads], [bool(whole(g).isfinite().all()) for g in grads]


def not_finite(rank, world):
    m = by_block(model())
    with fastlora.track(m) as tracker:
        x, y = batch(0, 0, rank)
        loss_of(m, (x * torch.inf if rank == 1 else x, y)).backward()
        tracker.step()
    return tracker.skipped


def calibrated(rank, world):
    found = {}
    for method in ("fw", "fim"):
        m = at_start()
        by_block(m)
        batches = [batch(step, 0, rank) for step in range(2)]
        found[method] = dict(fastlora.calibrate(m, batches, loss_of, steps=2, method=method, progress=False))
    return found


def at_start():
    m = model()
    with torch.no_grad():
        for layer in adapted_layers(m).values():
            for b in layer.lora_B.parameters():
                b.zero_()
    return m


def base(seed):
    torch.manual_seed(seed)
    m = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh())
    m.add_module("head", nn.Linear(5, 3))
    return m


ALONE = fastlora.LoraConfig(r=3, target_modules=["0", "2"], init_lora_weights=False)


def with_head(seed):
    config = fastlora.LoraConfig(
        r=3, target_modules=["0", "2"], init_lora_weights=False, modules_to_save=["head"], bias="lora_only"
    )
    return fastlora.inject(base(seed), config)


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def files(rank, world, folder):
    """Save from shards, load into shards; the outermost ones are whole after a forward without backward."""
    m = with_head(seed=1)
    fully_shard(m[0])
    fully_shard(m)
    with torch.no_grad():
        before = m(X)
        fastlora.load(m, f"{folder}/plain")
        after = m(X)
        fastlora.save(m, f"{folder}/from{world}")
    sharded = all(isinstance(p, DTensor) for p in m.parameters())
    messages = []
    for path in (f"{folder}/file/below", f"{folder}/plain/adapter_config.json"):
        try:
            fastlora.save(m, path)
        except ValueError as error:
            messages.append(str(error))
    return before, after, sharded, messages


def files_of_whole(rank, world, folder):
    """As ``files``, with adapters alone and every parameter whole at the time."""
    m = fully_shard(fastlora.inject(base(seed=1), ALONE))
    with torch.no_grad():
        m(X)
        fastlora.load(m, f"{folder}/adapter")
        after = m(X)
        # What is whole for the moment is of the precision that runs.
        m = fully_shard(fastlora.inject(base(seed=0), ALONE), mp_policy=BFLOAT16)
        m(X)
        fastlora.save(m, f"{folder}/whole{rank}")
    return after


def ddp_files(rank, world, folder):
    """Every rank calls save, or the first alone."""
    parallel = DistributedDataParallel(with_head(seed=0))
    fastlora.save(parallel, f"{folder}/rank{rank}")
    try:
        fastlora.load(DistributedDataParallel(base(seed=0)), f"{folder}/plain")
    except ValueError as error:
        return str(error)


def passed_by(rank, world):
    """An adapter whose owner reads the weight is found in a sharded model, too."""

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.read = "two"

        def forward(self, x):
            return nn.functional.linear(self.one(x), getattr(self, self.read).weight)

    m = nn.Sequential(Reads(), nn.Tanh())
    fastlora.inject(m, fastlora.LoraConfig(r=1, target_modules=["one", "two"]))
    fully_shard(m[0])
    fully_shard(m)
    optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad])
    try:
        for _ in range(3):
            m(torch.ones(2, 4)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    except RuntimeError as error:
        return str(error)


def work(rank, world, folder):
    logging.disable(logging.WARNING)
    found = {"training": {how: training(rank, how, how in ("root", "by block")) for how in SHARDING}}
    for scenario in (divided, low_precision, not_finite, calibrated, passed_by, *([replicated] if world == 4 else [])):
        found[scenario.__name__] = scenario(rank, world)
    for scenario in (files, files_of_whole, ddp_files):
        found[scenario.__name__] = scenario(rank, world, folder)
    return found


@pytest.fixture(scope="module", params=[2, 4])
def ran(request, tmp_path_factory):
    """What each rank found, and the folder with the files."""
    folder = tmp_path_factory.mktemp("fsdp")
    fastlora.save(with_head(seed=0), folder / "plain")
    fastlora.save(fastlora.inject(base(seed=0), ALONE), folder / "adapter")
    (folder / "file").write_text("")
    return run_ranks(work, request.param, folder), folder


@pytest.fixture
def ranks(ran):
    return ran[0]


@pytest.mark.parametrize("how", SHARDING)
def test_losses_parameters_and_statistics_are_those_of_one_process(ranks, how):
    m = model()
    optimizer = optimiser(m)
    with fastlora.track(m, every=1, statistics=("grad_sq", "act_var")) as tracker:
        optimizer.register_step_pre_hook(lambda *_: tracker.apply_penalty(0.01))
        losses = train_alone(m, tracker, len(ranks), STEPS, optimizer=optimizer)
    for rank, found in enumerate(ranks):
        got, parameters, scores = found["training"][how]
        torch.testing.assert_close(got, losses[rank], rtol=1e-9, atol=0)
        for name, want in trained(m).items():
            torch.testing.assert_close(parameters[name], want, rtol=1e-7, atol=1e-9)
        assert_read(scores, read(tracker))


def alone(world, **kwargs):
    m = model()
    with fastlora.track(m, every=1, **kwargs) as tracker:
        train_alone(m, tracker, world, STEPS)
    return read(tracker)


def test_statistics_follow_the_factor_that_divides_gradients(ranks):
    world = len(ranks)
    probed = alone(world, statistics=("grad_sq", "act_var"))
    exact = alone(world, estimator="exact", statistics=("fisher", "act_cov", "grad_cov"))
    probed["grad_sq"] = {key: value * world**2 for key, value in probed["grad_sq"].items()}
    exact["grad_cov"] = {key: value * world**2 for key, value in exact["grad_cov"].items()}
    for found in ranks:
        assert_read(found["divided"][0], probed)
        assert_read(found["divided"][1], exact)


def test_shards_with_replicas(ranks):
    if len(ranks) < 4:
        pytest.skip("takes four ranks")
    for found in ranks:
        assert_read(found["replicated"], alone(len(ranks), estimator="exact", statistics=("grad_sq", "fisher")))


def test_mixed_precision_measures_in_float32(ranks):
    for found in ranks:
        statistics, dtypes, finite = found["low_precision"]
        assert all(value > 0 for kind in statistics for value in statistics[kind].values())
        assert set(dtypes) == {torch.float32} and all(finite)
        assert statistics == ranks[0]["low_precision"][0]


def test_a_step_that_is_not_finite_on_one_rank_is_left_out_on_all(ranks):
    assert [found["not_finite"] for found in ranks] == [1] * len(ranks)


@pytest.mark.parametrize("method", ["fw", "fim"])
def test_calibration_of_a_sharded_model(ranks, method):
    world = len(ranks)

    def loss(m, step):
        return sum(loss_of(m, batch(step, 0, rank)) for rank in range(world)) / world

    want = fastlora.calibrate(at_start(), range(2), loss, steps=2, method=method, progress=False)
    for found in ranks:
        assert found["calibrated"][method] == pytest.approx(dict(want), rel=1e-9)


def test_files_of_a_sharded_model_are_whole(ran):
    ranks, folder = ran
    with torch.no_grad():
        for before, after, sharded, messages in (found["files"] for found in ranks):
            torch.testing.assert_close(before, with_head(seed=1)(X))
            torch.testing.assert_close(after, with_base(with_head(seed=1), with_head(seed=0))(X))
            assert sharded
            assert len(messages) == 2 and all("path: expected a folder" in m for m in messages)
    world = len(ranks)
    for name in ("adapter_model.safetensors", "adapter_config.json", "fastlora.json"):
        assert (folder / f"from{world}" / name).read_bytes() == (folder / "plain" / name).read_bytes()


def test_loading_while_parameters_are_whole_is_not_lost_and_one_rank_writes(ran):
    ranks, folder = ran
    with torch.no_grad():
        want = with_base(fastlora.inject(base(seed=1), ALONE), fastlora.inject(base(seed=0), ALONE))(X)
    for found in ranks:
        torch.testing.assert_close(found["files_of_whole"], want)
    name = "adapter_model.safetensors"
    assert (folder / "whole0" / name).read_bytes() == (folder / "adapter" / name).read_bytes()
    assert not (folder / "whole1").exists()


def with_base(base, adapter):
    """The adapter of one model in another."""
    trained_ = {n: p for n, p in adapter.named_parameters() if p.requires_grad}
    base.load_state_dict(trained_, strict=False)
    return base


def test_one_rank_writes_under_ddp(ran):
    ranks, folder = ran
    name = "adapter_model.safetensors"
    assert (folder / "rank0" / name).read_bytes() == (folder / "plain" / name).read_bytes()
    assert not (folder / "rank1").exists()
    for found in ranks:
        assert "call fastlora.load before DistributedDataParallel" in found["ddp_files"]


def test_an_adapter_that_is_passed_by_is_found_in_a_sharded_model(ranks):
    for found in ranks:
        assert "do not learn: 0.two" in found["passed_by"]
