"""What comes too late or is not implemented under parallel training is refused by name, with the model as it was."""

from __future__ import annotations

import copy
import tempfile

import pytest
import torch
import torch.distributed as dist
from support.helpers import said
from support.tracker_help import data, loss_of, model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fastlora
from fastlora._utils.distributed import ranks_of
from fastlora.integrations import adapters_only

CONFIG = fastlora.LoraConfig(r=2, target_modules=["0"])


@pytest.fixture(autouse=True)
def group(tmp_path):
    """A group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def plain():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def refused(m, call, match):
    kinds = {n: type(x) for n, x in m.named_modules()}
    before = {n: (id(p), p.requires_grad) for n, p in m.named_parameters()}
    with pytest.raises(ValueError, match=match):
        call(m)
    assert kinds == {n: type(x) for n, x in m.named_modules()}
    assert before == {n: (id(p), p.requires_grad) for n, p in m.named_parameters()}


TOO_LATE = {
    "inject": (lambda m: fastlora.inject(m, CONFIG), plain),
    "set_ranks": (lambda m: fastlora.set_ranks(m, {"0": 1}), lambda: fastlora.inject(plain(), CONFIG)),
    "add_adapter": (lambda m: fastlora.add_adapter(m, "b", CONFIG), lambda: fastlora.inject(plain(), CONFIG)),
    "delete_adapter": (lambda m: fastlora.delete_adapter(m, "default"), lambda: fastlora.inject(plain(), CONFIG)),
}
WRAPPED = {
    "fully_shard": (fully_shard, "is sharded by fully_shard"),
    "fully_shard of a part": (lambda m: (fully_shard(m[0]), m)[1], "is sharded by fully_shard"),
    "ddp": (DistributedDataParallel, "is wrapped by DistributedDataParallel"),
    "compiled ddp": (lambda m: torch.compile(DistributedDataParallel(m)), "is wrapped by DistributedDataParallel"),
}


@pytest.mark.parametrize("wrapped", WRAPPED)
@pytest.mark.parametrize("name", TOO_LATE)
def test_new_parameters_come_too_late(name, wrapped):
    call, make = TOO_LATE[name]
    wrap, message = WRAPPED[wrapped]
    m = make()
    if name == "inject":
        m[2].requires_grad_(True)
    refused(wrap(m), call, f"model: {message}.*; call fastlora.{name} before DistributedDataParallel, fully_shard and")


def test_reallocate_comes_too_late():
    m = DistributedDataParallel(fastlora.inject(plain(), CONFIG))
    refused(m, lambda m: fastlora.reallocate(m, {"0": 1.0}), "call fastlora.set_ranks before")


def test_loading_needs_adapters_in_a_sharded_model(tmp_path):
    fastlora.save(fastlora.inject(plain(), CONFIG), tmp_path)
    refused(fully_shard(plain()), lambda m: fastlora.load(m, tmp_path), "call fastlora.load before")


def test_a_sharded_model_is_not_merged():
    refused(
        fully_shard(fastlora.inject(plain(), CONFIG)), fastlora.merge, "is sharded by fully_shard; save the adapter"
    )


TENSOR_PARALLEL = {
    "inject": (plain, lambda m: fastlora.inject(m, CONFIG)),
    "track": (lambda: fastlora.inject(plain(), CONFIG), fastlora.track),
    "calibrate": (
        lambda: fastlora.inject(plain(), CONFIG),
        lambda m: fastlora.calibrate(m, [torch.ones(1, 4)], lambda m, x: m(x).sum(), steps=1),
    ),
}


@pytest.mark.parametrize("name", TENSOR_PARALLEL)
def test_tensor_parallel_weights_are_refused(name):
    make, call = TENSOR_PARALLEL[name]
    m = make()
    mesh = init_device_mesh("cpu", (1,))
    parallelize_module(m[2], mesh, ColwiseParallel())
    refused(m, call, r"model: '2.weight' is a DTensor with placements .*Shard.*; tensor parallelism is not implemented")


def test_tensor_parallel_beside_shards_is_refused():
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))
    m = fastlora.inject(plain(), CONFIG)
    parallelize_module(m[2], mesh["tp"], ColwiseParallel())
    fully_shard(m, mesh=mesh["dp"])
    refused(
        m, fastlora.track, "model: '2.weight' is a DTensor with placements .*; tensor parallelism is not implemented"
    )


def test_a_tensor_parallel_plan_is_refused():
    m = plain()
    m._tp_size = 2
    refused(m, lambda m: fastlora.inject(m, CONFIG), r"split by a tensor-parallel plan \(tp_plan\) over 2 processes")


def test_flattened_parameters_are_refused(monkeypatch):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = plain()

    Flat.__name__ = FullyShardedDataParallel.__name__
    refused(Flat(), lambda m: fastlora.inject(m, CONFIG), r"FullyShardedDataParallel \(FSDP1\).*use .*fully_shard")


def partition(m, chosen):
    """As DeepSpeed's ZeRO-3 leaves parameters between their uses."""
    for name, p in m.named_parameters():
        if chosen in name:
            p.ds_id, p.ds_shape, p.ds_numel, p.ds_status = 0, p.shape, p.numel(), "NOT_AVAILABLE"
            p.data = p.new_empty(0)
    return m


def adapters_of(m):
    with adapters_only(m):
        m.state_dict()


PARTITIONED = {
    "forward": lambda m: m(torch.randn(3, 4)),
    "summary": fastlora.summary,
    "explain": fastlora.explain,
    "param_groups": fastlora.param_groups,
    "to_peft": fastlora.to_peft,
    "reallocate": lambda m: fastlora.reallocate(m, {"0": 1.0}),
    "calibrate": lambda m: fastlora.calibrate(m, [torch.ones(1, 4)], lambda m, x: m(x).sum(), steps=1),
    "save": lambda m: fastlora.save(m, tempfile.mkdtemp()),
    "merge": fastlora.merge,
    "unload": fastlora.unload,
    "track": fastlora.track,
    "adapters_only": adapters_of,
    **{name: call for name, (call, _) in TOO_LATE.items() if name != "inject"},
}


@pytest.mark.parametrize("warm", [False, True], ids=["at first", "after a forward"])
@pytest.mark.parametrize("chosen", ["0.weight", "0.lora_A", "0.lora_B"])
@pytest.mark.parametrize("name", PARTITIONED)
def test_partitioned_parameters_are_refused(name, chosen, warm):
    m = fastlora.inject(plain(), CONFIG)
    if warm:
        m(torch.randn(3, 4))
    match = rf"model: '[\w.]*{chosen[2:]}[\w.]*' is partitioned by DeepSpeed's ZeRO-3, which gathers it in"
    refused(partition(m, chosen), PARTITIONED[name], match)


def test_partitioned_parameters_are_not_unmerged():
    """The weight would get the shape of what was kept, or the copy fail after other layers were changed."""
    m = fastlora.merge(fastlora.inject(plain(), fastlora.LoraConfig(r=2, target_modules=["0", "2"])))
    first = m[0].weight.detach().clone()
    refused(partition(m, "2.weight"), fastlora.unmerge, "'2.weight' is partitioned by DeepSpeed's")
    assert torch.equal(m[0].weight, first) and m[0].merged


def test_partitioned_parameters_are_not_adapted():
    refused(partition(plain(), ""), lambda m: fastlora.inject(m, CONFIG), "'0.weight' is partitioned by DeepSpeed's")
    layers = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4))
    m = partition(fastlora.inject(layers, CONFIG), "lora_A")
    refused(m, lambda m: m(torch.tensor([1])), "'lora_A.default.weight' is partitioned")


def test_fsdp1_warns_of_nothing_and_is_not_saved(tmp_path, caplog):
    """Between forwards a process holds parts of the matrices as views, and of other processes' matrices nothing."""
    m = fastlora.inject(plain(), CONFIG)
    for p in m[0].lora_A.parameters():
        p.data = p.new_empty(0)
    for p in m[0].lora_B.parameters():
        p.data = p.data.flatten()[:2]
    m.fastlora_learning.ran.add("")
    m[0].called = True
    head = nn.Parameter(torch.ones(1))
    m.register_parameter("head", head)
    head.grad = torch.ones(1)
    m.fastlora_learning.examine()
    assert not said(caplog)
    refused(m, lambda m: fastlora.save(m, tmp_path / "a"), r"a factor of '0' is \[.*FullyShardedDataParallel \(FSDP1\)")


@pytest.mark.parametrize("given", ["auto", "none", "world"])
def test_one_process_reduces_nothing(monkeypatch, given):
    monkeypatch.setattr(dist, "all_reduce", lambda *args, **kwargs: pytest.fail("one process has nothing to reduce"))
    m = model()
    parallel, group = DistributedDataParallel(m), {"auto": "auto", "none": None, "world": dist.group.WORLD}[given]
    plain_model = copy.deepcopy(m)
    found = []
    for each, options in ((parallel, {"process_group": group}), (plain_model, {})):
        with fastlora.track(each, every=1, **options) as tracker:
            loss_of(each, data()).backward()
            tracker.step()
        found.append(dict(tracker.scores()))
    assert found[0] == found[1]
    assert ranks_of(parallel, group) is None


def test_a_process_group_that_is_none():
    with pytest.raises(ValueError, match="process_group: expected 'auto', None or a process group, got 'all'"):
        fastlora.track(model(), process_group="all")


def several():
    m = fastlora.inject(plain(), CONFIG)
    return fastlora.add_adapter(m, "resting", CONFIG)


def freeze_resting(m):
    for name, p in m.named_parameters():
        if ".resting." in name:
            p.requires_grad_(False)
    return m


def three_steps(parallel):
    for _ in range(3):
        parallel(torch.randn(4, 4)).square().mean().backward()


def test_a_trainable_adapter_that_rests_under_ddp_is_refused(caplog):
    m = several()
    for other in (m, copy.deepcopy(m)):
        with pytest.raises(RuntimeError, match=r"'default' runs alone.*\['resting'\].*find_unused_parameters=True"):
            three_steps(DistributedDataParallel(other))
    assert all(p.grad is None for p in m.parameters())
    three_steps(m)
    with torch.no_grad():
        DistributedDataParallel(m)(torch.randn(4, 4))
    fastlora.set_adapter(m, "resting")
    with pytest.raises(RuntimeError, match="'resting' runs alone"):
        three_steps(DistributedDataParallel(m))
    assert not hasattr(fastlora.unload(m), "fastlora_resting")
    three_steps(m.requires_grad_(True))


def test_what_its_message_says_works(caplog):
    three_steps(DistributedDataParallel(freeze_resting(several())))
    three_steps(DistributedDataParallel(several(), find_unused_parameters=True))
    assert "runs alone" not in caplog.text


def test_two_adapters_that_run_one_after_the_other_are_warned_of_and_run(caplog):
    m, x = several(), torch.randn(4, 4)
    parallel, total = DistributedDataParallel(m), 0.0
    for name in ("default", "resting"):
        with fastlora.use_adapters(m, name):
            total = total + parallel(x).square().mean()
    total.backward()
    assert all((p.grad is not None) == p.requires_grad for p in m.parameters())
    assert caplog.text.count("runs alone") == 2
