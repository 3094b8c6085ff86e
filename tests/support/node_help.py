"""A small attention, its gradients by the node in C++ and by the one in Python, and what compares them."""

import torch

import fastlora
from fastlora.nn import adapter
from fastlora.ops import bound

K = 24


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (torch.nn.Linear(K, n) for n in (16, 8, 8))

    def forward(self, x):
        return [self.q_proj(x), self.k_proj(x), self.v_proj(x)]


def model(dtype=torch.float32, **config):
    torch.manual_seed(0)
    built = Attention().to(dtype)
    fastlora.inject(built, fastlora.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], **config))
    with torch.no_grad():
        for name, p in built.named_parameters():
            if "lora_B" in name:
                p.normal_()
    return built


def inputs(dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(3, 5, K, dtype=dtype, requires_grad=True)


def gradients(built, x, run=None, times=3):
    """Of several steps: what the first ones learn is used by the others."""
    found = []
    for step in range(times):
        torch.manual_seed(step)
        x.grad = None
        built.zero_grad()
        (run or (lambda: sum(y.square().sum() for y in built(x)).backward()))()
        found += [x.grad, *[p.grad for p in built.parameters()]]
    return found


def in_python(monkeypatch):
    monkeypatch.setattr(bound, "NODE", None)
    monkeypatch.setattr(adapter, "NODE", None)


def same(monkeypatch, act):
    """What ``act`` gives with the node in C++ and in Python."""
    mine = act()
    in_python(monkeypatch)
    theirs = act()
    assert len(mine) == len(theirs) > 0
    for a, b in zip(mine, theirs, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))
