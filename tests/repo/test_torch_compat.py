"""torch's private names: whichever is taken away, layers train with right numbers, and the doctor says what is gone."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from support.distributed_help import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastlora
from fastlora._utils import torch_compat
from fastlora._utils.distributed import private_names, ranks_of
from fastlora.cli import doctor

TESTS = pathlib.Path(__file__).parent.parent
NAMES = [n.name for n in torch_compat.NAMES] + ["OptimizedModule._orig_mod", "GradScaler._scale"]


@pytest.fixture(scope="module")
def found():
    """What ``removed_names.py`` says of every name, and of none."""
    path = os.pathsep.join([str(pathlib.Path(fastlora.__file__).parent.parent), str(TESTS)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, TESTS / "support" / "removed_names.py", "", *NAMES]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=500)
    assert run.returncode == 0, run.stderr[-3000:]
    return {line["name"]: line for line in map(json.loads, run.stdout.splitlines())}


@pytest.mark.parametrize("name", ["", *NAMES])
def test_layers_train_without_it(found, name):
    assert found[name]["wrong"] is None, found[name]["wrong"]
    assert found[name]["gone"] == ([name] if name else [])


def test_the_doctor_lists_every_name():
    listed = doctor.report()["private_names"]
    assert [n["name"] for n in listed] == [*NAMES, *(n.name for n in private_names())]
    assert all(n["there"] and n["when_gone"] for n in listed)


def test_the_doctor_says_what_is_gone(monkeypatch):
    gone = torch_compat.PrivateName("torch._gone", False, "one launch a tensor")
    monkeypatch.setattr(torch_compat, "NAMES", [gone])
    assert "torch's torch._gone is gone; without it: one launch a tensor" in list(doctor.lines(doctor.report()))


def test_an_operator_says_when_no_guard_is_left(monkeypatch):
    with pytest.raises(RuntimeError, match="has neither .*_AutoDispatchBelowAutograd nor .*_ExcludeDispatchKeyGuard"):
        torch_compat._no_guard()


def sharded_and_wrapped(rank, world, folder):
    """Who trains together, with DDP's and fully_shard's private names and without."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    told, inner = {}, nn.Linear(4, 4)
    wrapped = DistributedDataParallel(inner)
    inner.register_forward_pre_hook(lambda *_: told.update(ddp=ranks_of(inner)))
    wrapped(torch.ones(1, 4))
    del DistributedDataParallel._get_active_ddp_module
    told["ddp searched"], told["another"] = ranks_of(inner), ranks_of(nn.Linear(4, 4))
    model = fully_shard(nn.Sequential(nn.Linear(4, 4)))
    told["shards"] = ranks_of(model)
    del FSDPModule._get_fsdp_state
    told["shards' mesh"] = ranks_of(model)
    return {name: who and (who.size, who.rank, who.divisor) for name, who in told.items()}


def test_who_trains_together_without_private_names(tmp_path):
    for rank, told in enumerate(run_ranks(sharded_and_wrapped, 2, tmp_path)):
        assert told.pop("another") is None
        assert told == dict.fromkeys(("ddp", "ddp searched", "shards", "shards' mesh"), (2, rank, 2.0))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", [bool, float])
def test_the_encoder_layer_without_private_methods(norm_first, kind):
    """Attention and feed-forward of the adapted layer are those of torch's, with masks, and of nested tensors."""
    torch.manual_seed(0)
    base = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=norm_first)
    x, blocked = torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
    blocked[1, 3:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    mask, padding = (
        (causal.isinf(), blocked) if kind is bool else (causal, torch.zeros(3, 5).masked_fill(blocked, -1e4))
    )
    expected = base(x, mask, padding)
    config = fastlora.LoraConfig(r=2, target_modules=["linear1", "linear2", "self_attn.out_proj"])
    model = fastlora.inject(nn.Sequential(base), config)[0]
    torch.testing.assert_close(model(x, mask, padding), expected)
    nested = torch.nested.nested_tensor([x[0], x[1, :3], x[2, :4]])
    with torch.no_grad():
        y = model.eval()(nested)
        assert y.is_nested and [tuple(t.shape) for t in y.unbind()] == [(5, 8), (3, 8), (4, 8)]
        torch.testing.assert_close(y.unbind()[1], model(x[1:2, :3])[0])
    with pytest.raises(ValueError, match="src_mask: expected a boolean or floating mask, got torch.int64"):
        model(x, mask.long() if kind is bool else mask.isinf().long())


def test_attention_names_inputs_that_do_not_fit():
    layer = fastlora.nn.MultiheadAttention(8, 2, batch_first=True, r=2)
    x = torch.randn(3, 5, 8)
    for given, says in (
        ((x[0, 0],) * 3, r"query: expected \[L, E\] or \[L, N, E\], got torch\.float32 \(8,\)"),
        ((x, x[0], x), r"key: expected 3 dimensions as query has, got torch\.float32 \(5, 8\)"),
    ):
        with pytest.raises(ValueError, match=says):
            layer(*given)
    with pytest.raises(ValueError, match="attn_mask: expected a boolean or floating mask, got torch.int32"):
        layer(x, x, x, attn_mask=torch.zeros(5, 5, dtype=torch.int32))


def test_kernels_where_torch_does_not_tell(monkeypatch):
    monkeypatch.setattr(torch_compat, "_registrations", None)
    assert torch_compat.kernels_of("fastlora", "cpu", ["wgrad"]) == ["wgrad"]
    assert torch_compat.kernels_of("fastlora", "cuda", ["wgrad"]) == []


def test_a_view_is_copied_where_torch_cannot_relabel_it(monkeypatch):
    monkeypatch.setattr(torch_compat, "_unsafe_view", None)
    x = torch.ones(2, 3, requires_grad=True)
    y = torch_compat.as_no_view(F.relu(x)[1:])
    y.add_(1).sum().backward()  # a view would have refused this
    assert x.grad.tolist() == [[0.0] * 3, [1.0] * 3]
