"""Fixtures of the module layer's tests."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable

import pytest
import torch
from support.helpers import built
from torch import nn

from fastlora.ops.matmul import ENGINES
from fastlora.testing import enable_torchvision

pytest_plugins = ["support.processes"]

# On import torchao says what it has no use for here: kernels of GPUs and an interface of torch that will change.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)

# timm, peft and transformers import torchvision, whose build may not load beside a torch without CUDA.
enable_torchvision()

# Outputs equal the base model's bit for bit when the matmul is F.linear; ops/test_matmul.py covers the others.
os.environ["FASTLORA_CPU_ENGINE"] = "linear"


@pytest.fixture
def build() -> Callable[[str], nn.Module]:
    """A fresh copy, in eval mode, of the family's model."""
    return lambda name: copy.deepcopy(built(name))


@pytest.fixture
def library_matmul(monkeypatch) -> None:
    """F.linear as the matmul: with another engine outputs equal the base's up to rounding only."""
    monkeypatch.setattr(ENGINES, "override", "linear")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
