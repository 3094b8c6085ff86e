"""A model that loads, trains and breaks in milliseconds, and what is compared of it, for the tools beside this file."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastlora


class Attention(nn.Module):
    """A fused projection, so that our folder says how it was split, and separate ones that run together."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(torch.tanh(q + k) * v)


class Model(nn.Module):
    """Two blocks of attention and norm, and a head with three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"attn": Attention(), "norm": nn.LayerNorm(8)}) for _ in range(2)])
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["attn"](block["norm"](x))
        return self.head(x.mean(dim=1))


def plain() -> nn.Module:
    torch.manual_seed(0)
    return Model()


def adapted(rank: int = 2) -> nn.Module:
    """B is not zero, and one slice has a rank of its own."""
    config = fastlora.LoraConfig(r=rank, target_modules="qkv", modules_to_save=["head"], init_lora_weights=False,
                                 split_qkv=True, rank_pattern={"blocks.0.attn.qkv[k]": 1})  # fmt: skip
    return fastlora.inject(plain(), config, check="off")


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 5, 8, generator=generator), torch.randint(3, (4,), generator=generator)


def loss_fn(model: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(given[0]), given[1])


def snapshot(model: nn.Module) -> Any:
    """Everything that a refused or failed call must leave alone; numbers as bytes, since NaN equals nothing."""
    tensors = {k: (v.dtype, v.numpy().tobytes()) for k, v in model.state_dict().items()}
    named = dict(model.named_parameters())
    flags = {n: (p.requires_grad, None if p.grad is None else p.grad.numpy().tobytes()) for n, p in named.items()}
    layers = fastlora.nn.linear.adapted_layers(model)
    scales = {(n, a): dict(spec.scale) for n, layer in layers.items() for a, spec in layer.adapter_specs.items()}
    tracked = {n: sorted(layer.probes) for n, layer in layers.items()}
    kinds = {n: (type(m), m.training, sorted(vars(m)), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
    return tensors, flags, scales, tracked, kinds, torch.get_rng_state().numpy().tobytes()


def machine() -> dict[str, Any]:
    """What a committed result says about where it comes from."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    except OSError:
        cpu = platform.processor()
    return {"cpu": cpu, "threads": torch.get_num_threads(), "python": platform.python_version(),
            "torch": torch.__version__, "fastlora": fastlora.__version__}  # fmt: skip
