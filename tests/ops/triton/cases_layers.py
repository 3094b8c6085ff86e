"""Whole layers on the Triton backend against float64: the node, plans that are repeated, what a tracker counts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.triton_help import DEVICE, assert_replayed
from torch import nn

import fastlora
from fastlora.ops import backends, native, node
from fastlora.ops.backends import plan

# On a GPU a call is met, recorded, and then repeated by its plan.
STEPS = 2 if DEVICE == "cpu" else 5
WIDTH = 32 if DEVICE == "cpu" else 768
STATISTICS = ("grad_sq", "act_var")
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@pytest.fixture(autouse=True)
def _exact(monkeypatch):
    """Exact fp32 products; in the interpreter the backend without its refusal of the CPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if DEVICE == "cpu":
        own = dataclasses.replace(backends.BACKENDS["triton"], unsupported_reason=lambda device, dtype: None)
        monkeypatch.setitem(backends.BACKENDS, "triton", own)


class Attention(nn.Module):
    """q, k and v of one input, in one matrix or three of unequal sizes."""

    def __init__(self, fused: bool):
        super().__init__()
        sizes = {"qkv": 3 * WIDTH} if fused else {"q_proj": WIDTH, "k_proj": WIDTH // 4, "v_proj": WIDTH // 4}
        for name, size in sizes.items():
            setattr(self, name, nn.Linear(WIDTH, size))

    def forward(self, x):
        return torch.cat([layer(x) for layer in self.children()], -1)


def attention(fused: bool):
    return nn.Sequential(Attention(fused)), (3, 11, WIDTH), {"target_modules": "qkv", "split_qkv": True}


def convolution():
    layers = nn.Sequential(nn.Conv2d(3, WIDTH, 4, stride=4), nn.Flatten(2), nn.Linear(4, WIDTH))
    return layers, (5, 3, 8, 8), {"target_modules": ["0", "2"], "r": 4}


def experts():
    pytest.importorskip("transformers")
    from support.experts_zoo import moe

    model = moe(dtype=torch.float32)

    class OnEmbeddings(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(inputs_embeds=x).logits

    return OnEmbeddings(), (2, 9, 32), {"target_modules": "experts"}


MODELS = {
    "separate": lambda: attention(False),
    "fused": lambda: attention(True),
    "convolution": convolution,
    "experts": experts,
}


def made(name: str, backend: str, dtype: torch.dtype, device: str, dropout: float = 0.0):
    """(the adapted model, the shape of its input), the same numbers whatever it is made for."""
    torch.manual_seed(1)
    model, shape, fields = MODELS[name]()
    config = fastlora.LoraConfig(**{"r": 8, "lora_alpha": 16, **fields}, lora_dropout=dropout, backend=backend)
    model = fastlora.inject(model.requires_grad_(False), config, check="off")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return model.to(device, dtype), shape


def trained(name: str, backend: str, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    """Outputs and gradients of some steps, by step, and what the tracker counted in all of them."""
    model, shape = made(name, backend, dtype, device)
    adapters = {path: p for path, p in model.named_parameters() if p.requires_grad}
    optimizer, found = torch.optim.SGD(adapters.values(), lr=1e-2), {}
    with fastlora.track(model, statistics=STATISTICS, probes=8, seed=3) as tracker:
        for step in range(STEPS):
            torch.manual_seed(100 + step)
            x = torch.randn(shape).to(device, dtype).requires_grad_()
            y = model(x)
            optimizer.zero_grad()
            y.backward(torch.randn(y.shape).to(device, dtype))
            found |= {f"{step} y": y.detach(), f"{step} dx": x.grad}
            found |= {f"{step} {path}": p.grad.clone() for path, p in adapters.items() if p.grad is not None}
            optimizer.step()
            tracker.step()
        scores = {kind: dict(tracker.scores(kind)) for kind in STATISTICS}
    found |= {f"{k} {path}": torch.tensor(v) for k, each in scores.items() for path, v in each.items()}
    return found


@pytest.mark.parametrize("name", MODELS)
def test_steps_of_a_layer_and_their_statistics(name):
    found, wanted = trained(name, "auto", torch.float32, DEVICE), trained(name, "reference", torch.float64, "cpu")
    assert found.keys() == wanted.keys() and any("grad_sq" in key for key in found)

    def errors(given):
        return {k: float((given[k].double().cpu() - v).norm() / v.norm().clamp_min(1e-30)) for k, v in wanted.items()}

    # The same formula in fp32; sums may go in another order.
    limit = 4 * max(errors(trained(name, "reference", torch.float32, "cpu")).values())
    for key, off in errors(found).items():
        assert off <= limit, f"{key}: relative error {off:.1e}, at most {limit:.1e}"


@on_gpu
def test_launches_are_native_and_the_node_is_in_cpp():
    assert native.available() and node.NODE is not None, (native.reason(), node.REASON)
    assert plan.launcher() == ("native", None)
    for name in ("penalty", "output_variances", "philox_signs_"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastlora::{name}", "CUDA"), name


@on_gpu
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", ["separate", "fused"])
def test_both_launchers_give_the_same_bits(name, dropout, monkeypatch):
    """What a plan repeats with other tensors is what Triton launches for them."""
    x = [torch.randn(4, 128, WIDTH, device=DEVICE, dtype=torch.bfloat16) for _ in range(STEPS)]
    results = {}
    for launcher in plan.LAUNCHERS:
        monkeypatch.setattr(plan, "_wanted", lambda launcher=launcher: launcher)
        model, _ = made(name, "auto", torch.bfloat16, DEVICE, dropout)
        torch.manual_seed(9)
        for step, given in enumerate(x):
            y = model(given)
            model.zero_grad()
            y.backward(torch.ones_like(y))
            own = {path: p.grad.clone() for path, p in model.named_parameters() if p.grad is not None}
            results[launcher, step] = {"y": y.detach(), **own}
    for step in range(STEPS):
        first, second = (results[launcher, step] for launcher in plan.LAUNCHERS)
        assert first.keys() == second.keys() and len(first) > 6
        assert [key for key in first if not torch.equal(first[key], second[key])] == [], step


@on_gpu
def test_a_captured_step_of_a_layer_is_an_eager_one():
    model, _ = made("separate", "auto", torch.bfloat16, DEVICE)
    x = torch.randn(4, 128, WIDTH, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]

    def step():
        for leaf in leaves:
            leaf.grad = None
        y = model(x)
        y.backward(torch.ones_like(y))

    assert_replayed(step, leaves)
