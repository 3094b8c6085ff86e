"""A short training whose every bit follows from its seed."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import fastlora

sys.path.append(str(Path(__file__).parents[2] / "tools"))
from small_model import batch, loss_fn, plain  # noqa: E402


def trained(backend: str, steps: int = 6, seed: int = 0) -> tuple[list[torch.Tensor], dict[str, dict[str, float]]]:
    """Weights and statistics after a short training with dropout and two adapters in a batch."""
    base = plain()
    torch.manual_seed(seed)
    config = dict(r=3, lora_dropout=0.2, backend=backend, init_lora_weights=False)
    model = fastlora.inject(base, fastlora.LoraConfig(target_modules="qkv", **config))
    fastlora.add_adapter(model, "b", fastlora.LoraConfig(target_modules=["proj"], **config))
    optimizer = torch.optim.AdamW(fastlora.param_groups(model, lr_lora=1e-2))
    ids = torch.tensor([0, 1, -1, 1])
    with fastlora.track(model, statistics=("grad_sq", "act_var"), every=1) as tracker:
        for i in range(steps):
            x, y = batch(i)
            with fastlora.use_adapters(model, ids):
                losses = torch.nn.functional.cross_entropy(model(x), y, reduction="none")
            (fastlora.per_adapter_mean(losses, ids) + loss_fn(model, batch(50 + i))).backward()
            optimizer.step()
            optimizer.zero_grad()
            tracker.step()
    return [p.detach().clone() for p in model.parameters()], {k: dict(tracker.scores(k)) for k in tracker.kinds}
