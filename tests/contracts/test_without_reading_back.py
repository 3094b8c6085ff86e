"""Whole training steps through the Triton backend on a device without values: what runs between two launches.

A step that waits for a value fails there. Copies from the host are found too: one that does not say ``non_blocking``
waits for the GPU.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")
from support.without_values import META, record_launches  # noqa: E402

import fastlora  # noqa: E402

QKV = ["q", "k", "v"]


@pytest.fixture
def launched(monkeypatch):
    return record_launches(monkeypatch)


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(64, width) for width in (64, 64, 24))
        self.head = torch.nn.Linear(64, 5)

    def forward(self, x):
        return self.head(torch.cat([self.q(x) + self.k(x), self.v(x)], -1)[..., 24:])


class WaitingCopies(TorchFunctionMode):
    """Names the calls that move host values to the device and wait for it."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if isinstance(out, torch.Tensor) and out.device == META and not (kwargs or {}).get("non_blocking"):
            made = func in (torch.tensor, torch.as_tensor) and all(t.device != META for t in given)
            if made or any(t.device != META and t.dim() for t in given):
                self.found.append(func.__name__)
        return out


def build(dropout, adapters, dtype=torch.float32):
    with META:
        model = Attention().to(dtype)
    config = {"target_modules": QKV, "lora_dropout": dropout}
    fastlora.inject(model, fastlora.LoraConfig(r=4, modules_to_save=["head"], **config))
    for name in adapters:
        fastlora.add_adapter(model, name, fastlora.LoraConfig(r=2, **config))
    return model


def steps(model, tracker, launched, ids=None, count=3, shape=(8, 5, 64)):
    """Names of waiting copies and of launches of the last step; the first ones may fill caches."""
    optimizer = torch.optim.AdamW(fastlora.param_groups(model, lr_lora=1e-3))
    for _ in range(count):
        x = torch.empty(shape, dtype=model.q.weight.dtype, device=META)
        launched.clear()
        with WaitingCopies() as copies:
            with contextlib.nullcontext() if ids is None else fastlora.use_adapters(model, ids):
                loss = model(x).square().mean()
            if tracker is not None and tracker.estimator == "probe":
                loss = loss + tracker.penalty(1e-3).to(loss.dtype)
            loss.backward()
            if tracker is not None:
                tracker.step()
        optimizer.step()
        optimizer.zero_grad()
    return copies.found, list(launched)


PROBES = [("grad_sq",), ("grad_sq", "act_var"), ("fisher",), ("fisher", "act_var")]
IDS = {"one adapter": None, "ids on the device": META, "ids on the host": torch.device("cpu")}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("whose", IDS)
@pytest.mark.parametrize("statistics", PROBES, ids="+".join)
def test_a_step_with_probes_reads_nothing_back(launched, statistics, whose, dropout):
    model = build(dropout, [] if IDS[whose] is None else ["b", "c"])
    ids = None if IDS[whose] is None else torch.zeros(8, dtype=torch.int64, device=IDS[whose])
    with fastlora.track(model, statistics=statistics) as tracker:
        copies, kernels = steps(model, tracker, launched, ids)
    assert not copies
    assert {"shrink_kernel", "linear_kernel", "wgrad_kernel"} <= set(kernels)
    # P of all layers, and under fisher a sign for each sample.
    assert kernels.count("signs_kernel") == 1 + ("fisher" in statistics)


@pytest.mark.parametrize("statistics", [("grad_sq", "grad_abs"), ("fisher",)], ids="+".join)
@pytest.mark.parametrize("whose", IDS)
def test_a_step_with_columns_reads_nothing_back(launched, statistics, whose):
    model = build(0.0, [] if IDS[whose] is None else ["b", "c"])
    ids = None if IDS[whose] is None else torch.zeros(8, dtype=torch.int64, device=IDS[whose])
    with fastlora.track(model, statistics=statistics, probe_kind="columns") as tracker:
        # Of two dimensions: on this device F.linear would give a view of its result for more.
        copies, _ = steps(model, tracker, launched, ids, count=10, shape=(8, 64))
    assert not copies


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_step_under_a_mask_reads_nothing_back(launched, device):
    model, mask = build(0.0, []), torch.ones(8, 5, dtype=torch.bool, device=device)
    with fastlora.track(model, statistics=("grad_sq", "act_var")) as tracker, tracker.mask(mask):
        copies, _ = steps(model, tracker, launched)
    assert not copies


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_fisher_of_an_adapter_and_a_layer_without_gradient_reads_nothing_back(launched, reduction):
    model = build(0.0, ["b"])
    model.head.register_forward_pre_hook(
        lambda layer, args: (torch.cat([args[0][..., :40] * 0 + 1, args[0][..., 40:]], -1),)
    )
    ids = torch.zeros(8, dtype=torch.int64, device=META)
    with fastlora.track(model, statistics=("fisher",), loss_reduction=reduction) as tracker:
        copies, _ = steps(model, tracker, launched, ids)
    assert not copies


class Counted(TorchDispatchMode):
    """How many operations that start something on a device; views and memory do not."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view and "empty" not in func.name() and "detach" not in func.name()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("probe_kind", ["rademacher", "columns"])
@pytest.mark.parametrize("statistics", PROBES, ids="+".join)
def test_a_step_of_the_tracker_takes_the_same_launches_for_any_number_of_layers(launched, statistics, probe_kind):
    found = []
    for layers in (2, 9):
        with META:
            model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(layers)))
        fastlora.inject(model, fastlora.LoraConfig(r=4, target_modules=[str(i) for i in range(layers)]))
        shape = (8, 64) if probe_kind == "columns" else (8, 5, 64)  # as above
        with fastlora.track(model, statistics=statistics, probe_kind=probe_kind) as tracker:
            for _ in range(2):
                model(torch.empty(shape, device=META)).square().mean().backward()
                launched.clear()
                with Counted() as counted:
                    tracker.step()
        found.append((counted.count, list(launched)))
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_adapters_take_the_launches_of_one(launched, dtype):
    _, one = steps(build(0.0, [], dtype), None, launched)
    several = build(0.0, ["b", "c", "d"], dtype)
    _, many = steps(several, None, launched, torch.zeros(8, dtype=torch.int64, device=META))
    # h for q, k, v; their outputs; dh; both weight gradients and their sums; x needs no gradient.
    apart = ["shrink_kernel", "linear_kernel", "shrink_kernel", "wgrad_kernel", "reduce_kernel"]
    # In half precision one adapter's h comes out of the matmul of so small a layer.
    assert many == apart and one == (apart if dtype == torch.float32 else ["shrink_linear_kernel", *apart[2:]])


def test_tables_of_many_layers_are_made_once(launched):
    """Layers of different ranks, with several adapters: what kernels look up is copied in the first step alone."""
    with META:
        model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(160)))
    ranks = {"default": {str(i): 1 + i % 40 for i in range(160)}, "b": {str(i): 1 + i // 40 for i in range(160)}}
    configs = {n: fastlora.LoraConfig(target_modules=[*own], rank_pattern=own) for n, own in ranks.items()}
    fastlora.add_adapter(fastlora.inject(model, configs["default"]), "b", configs["b"])
    ids, found = torch.zeros(8, dtype=torch.int64, device=META), []
    for _ in range(2):
        with WaitingCopies() as copies, fastlora.use_adapters(model, ids):
            model(torch.empty(8, 64, device=META)).square().mean().backward()
        found.append(copies.found.count("tensor"))
    assert found[0] > 256 and found[1] == 0


@pytest.mark.parametrize("statistics", [("grad_sq", "grad_abs", "act_cov", "grad_cov"), ("fisher", "act_var")])
def test_an_exact_step_of_one_adapter_reads_nothing_back(launched, statistics):
    model = build(0.0, [])
    with fastlora.track(model, statistics=statistics, estimator="exact") as tracker:
        copies, kernels = steps(model, tracker, launched)
    assert not copies
    assert any(name.startswith("gradstat") for name in kernels)


def test_a_value_that_is_read_back_is_seen(launched):
    model = build(0.0, [])
    model.q.register_forward_hook(lambda layer, args, y: y * float(y.detach().sum()))
    with pytest.raises(RuntimeError, match="meta"):
        steps(model, None, launched)


def test_a_copy_that_waits_is_seen(launched):
    model = build(0.0, [])
    model.q.register_forward_hook(lambda layer, args, y: y * torch.tensor(2.0, device=META))
    copies, _ = steps(model, None, launched)
    assert copies == ["tensor"]
