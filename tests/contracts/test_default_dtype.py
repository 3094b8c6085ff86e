"""Results do not depend on ``torch.set_default_dtype``."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

import fastlora
from fastlora import LoraConfig


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def results(dtype, backend, options):
    """Outputs, gradients, statistics, scores and merged weights of a model whose own dtype is ``dtype``."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48, dtype=dtype), nn.Tanh(), nn.Linear(48, 16, dtype=dtype))
    fresh = {"init_lora_weights": False, "lora_dropout": 0.1, "backend": backend}
    fastlora.inject(model, LoraConfig(r=4, target_modules=["0", "2"], **fresh))
    fastlora.add_adapter(model, "b", LoraConfig(r=2, target_modules=["0"], **fresh))
    x = torch.randn(40, 32, dtype=torch.float32, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = {}
    with fastlora.track(model, every=1, **options) as tracker:
        with fastlora.use_adapters(model, ["default", "b", None, "default"] * 10):
            y = model(x)
        y.double().square().sum().backward()
        tracker.step()
        found["y"] = y.detach()
        del y  # of the graph that was run
        found |= {
            f"score of {key}": torch.tensor(value, dtype=torch.float64) for key, value in tracker.scores().items()
        }
        found["penalty"] = tracker.penalty(1.0).detach()
    found |= {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    fastlora.set_ranks(model, {"0": 3, "2": 0}, keep=True)
    found["other ranks"] = model.eval()(x).detach()
    fastlora.merge(model)
    found["merged"] = model[0].weight.clone()
    return found


@pytest.mark.parametrize("options", [{"estimator": "probe"}, {"estimator": "exact"}], ids=lambda o: o["estimator"])
@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("other", [torch.bfloat16, torch.float16, torch.float64])
def test_another_default(other, own, backend, options):
    want = results(own, backend, options)
    with default_dtype(other):
        got = results(own, backend, options)
    assert got.keys() == want.keys() and len(want) > 10
    for name, value in want.items():
        assert got[name].dtype == value.dtype, name
        assert torch.equal(got[name], value), name
