"""What a step moves between devices: nothing waits on a device, and what the host reads has arrived there.

The device without values stands for a GPU; what comes from it is zero here.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora._utils.distributed import ProcessGroupInfo
from fastlora.nn.experts import Segments
from fastlora.nn.plain import Conv1d
from fastlora.nn.probe import token_mask
from fastlora.nn.routing import Route
from fastlora.ops.layout import AdapterBatch
from fastlora.tracking.all_reduce import averaged

CPU, META = torch.device("cpu"), torch.device("meta")


class Copies(TorchDispatchMode):
    """Whether each copy from one device to another waits, by the device that it goes to."""

    def __init__(self):
        super().__init__()
        self.waits = {"cpu": [], "meta": []}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten.nonzero.default and args[0].is_meta:
            return torch.empty(0, 1, dtype=torch.int64, device=META)
        to = kwargs.get("device")
        if func is torch.ops.aten._to_copy.default and to is not None and to != args[0].device:
            self.waits[to.type].append(not kwargs.get("non_blocking", False))
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=to)
        return func(*args, **kwargs)


def numbers(device, *shape):
    return torch.zeros(shape or (4,), dtype=torch.int64, device=device)


def way(device):
    return Route(True, "a", AdapterBatch(["a"], numbers(device)), torch.ones(4, 3, dtype=torch.bool, device=device))


WAYS = {
    "rows of a batch": lambda source, x: way(source).batch.rows(x),
    "entries of an adapter": lambda source, x: way(source).batch.select("a", x),
    "keys of rows": lambda source, x: AdapterBatch(["a"], numbers(x.device), numbers(source)).keys(x, x[0, 0, 0], 1),
    "a mask of tokens": lambda source, x: token_mask(x, way(source)),
    "ids of a convolution": lambda source, x: Conv1d.ids_of(nn.Conv1d(3, 3, 1), x, way(source)),
    "ids of experts": lambda source, x: Segments(numbers(CPU), numbers(CPU), 4, 2, way(source)),
    "gradients of ranks": lambda source, x: averaged(
        {"a": torch.zeros(2, device=source)}, {"a": (2,)}, ProcessGroupInfo((), 1.0), x.device
    ),
}


@pytest.mark.parametrize("name", WAYS)
def test_the_host_waits_for_what_comes_from_a_device(name):
    with Copies() as copies:
        WAYS[name](META, torch.zeros(4, 3, 8))
    assert copies.waits["cpu"] and all(copies.waits["cpu"]) and not copies.waits["meta"]


@pytest.mark.parametrize("name", [name for name in WAYS if not name.endswith(("experts", "ranks"))])
def test_nothing_waits_for_what_goes_to_a_device(name):
    with Copies() as copies:
        WAYS[name](CPU, torch.zeros(4, 3, 8, device=META))
    assert copies.waits["meta"] and not any(copies.waits["meta"]) and not copies.waits["cpu"]
