"""A right call of every public function, for the tests that then get one argument wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastlora


class Blocks(nn.Module):
    """Two blocks with attention and norms, and a head: every public function finds what it needs."""

    def __init__(self) -> None:
        super().__init__()
        names = ("q", "k", "v")
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(8), **{name: nn.Linear(8, 8) for name in names}}) for _ in range(2)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        for block in self.blocks:
            y = block["norm"](x)
            x = x + torch.tanh(block["q"](y) + block["k"](y)) * block["v"](y)
        return self.head(x)


KEY = "blocks.0.q"


def plain() -> nn.Module:
    torch.manual_seed(0)
    return Blocks()


def adapted() -> nn.Module:
    """A trained model with the adapters "default" and "b"."""
    model = fastlora.inject(plain(), config(modules_to_save=["head"]), check="off")
    fastlora.add_adapter(model, "b", config())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
        model(torch.zeros(1, 8))  # a layer remembers that it ran
    return model


def merged() -> nn.Module:
    return fastlora.merge(adapted())


def tracked() -> nn.Module:
    model = adapted()
    fastlora.track(model)
    return model


def config(**fields: Any) -> fastlora.LoraConfig:
    return fastlora.LoraConfig(**{"r": 2, "target_modules": "qkv", **fields})


def peft_model() -> nn.Module:
    import peft

    return peft.get_peft_model(plain(), peft.LoraConfig(r=2, target_modules=["q"]))


def eva_call() -> dict:
    model = fastlora.inject(plain(), config())
    sizes = {row.key: row.in_features for row in fastlora.summary(model).rows}
    return {"model": model, "covariances": {path: torch.eye(size) for path, size in sizes.items()}}


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(fastlora.param_groups(model))


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 8, generator=generator), torch.tensor([0, 1, 2, 0])) for _ in range(8)]


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def scores() -> dict[str, float]:
    return {f"blocks.{i}.{name}": float(1 + i) for i in range(2) for name in "qkv"}


def with_optimizer(**more: Any) -> dict[str, Any]:
    model = adapted()
    return {"model": model, "optimizer": adamw(model), **more}


def logits() -> torch.Tensor:
    return torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 1.0, 3.0]])


def classified() -> dict[str, Any]:
    return {"logits": logits(), "labels": torch.tensor([0, 1, 1])}


def scored_tracker() -> fastlora.Tracker:
    """A tracker after one step."""
    model = adapted()
    tracker = fastlora.track(model, every=1)
    loss(model, batches()[0]).backward()
    tracker.step()
    return tracker


def a_schedule() -> dict[str, Any]:
    model = adapted()
    first, second = adamw(model), adamw(model)
    return {"scheduler": fastlora.training.Cosine(first, 10), "optimizer": second}


# A right call of every public function; the tests replace one argument.
GOOD: dict[str, Callable[[Path], dict[str, Any]]] = {
    "training.Diagnostics": lambda at: {"optimizer": adamw(adapted())},
    "LoraConfig": lambda at: {},
    "Scores": lambda at: {"values": {"a": 1.0, "b": 2.0}, "kind": "grad_sq"},
    "Tracker": lambda at: {"model": adapted(), "estimator": "probe", "probes": 4, "ema": 0.9, "warmup": None,
                           "statistics": ("grad_sq",), "seed": 0, "loss_reduction": "mean", "every": 1,
                           "adapter": "default", "process_group": "auto"},
    "adapter_names": lambda at: {"model": adapted()},
    "use_adapters": lambda at: {"model": adapted(), "ids": torch.tensor([0, 1, -1])},
    "add_adapter": lambda at: {"model": adapted(), "name": "c", "config": config()},
    "add_weighted_adapter": lambda at: {"model": adapted(), "adapters": ["default", "b"], "weights": [1.0, 0.5],
                                        "adapter_name": "c", "combination_type": "ties_svd", "density": 0.5},
    "initialize_eva": lambda at: eva_call(),
    "initialize_corda": lambda at: eva_call(),
    "initialize_lora_ga": lambda at: {"model": fastlora.inject(plain(), config()), "batches": batches(),
                                      "loss_fn": loss, "steps": 2},
    "allocate": lambda at: {"scores": {"a": 3.0, "b": 1.0}, "budget": 8},
    "Scores.breakdown": lambda at: {"self": fastlora.Scores(scores(), "grad_sq")},
    "calibrate": lambda at: {"model": adapted(), "batches": batches(), "loss_fn": loss, "steps": 2, "method": "fw",
                             "progress": False},
    "recommend": lambda at: {"model": plain(), "batches": batches(), "loss_fn": loss, "budget": 100, "steps": 2,
                             "progress": False},
    "Scores.composite": lambda at: {name: {"a": 3.0, "b": 1.0} for name in ("grad_sq", "grad_abs", "act_var")},
    "disable_adapters": lambda at: {"model": adapted()},
    "training.ece": lambda at: classified(),
    "explain": lambda at: {"model": adapted()},
    "training.fit_temperature": lambda at: classified(),
    "from_peft": lambda at: {"peft_model": peft_model()},
    "freeze_unused_adapters": lambda at: with_optimizer(),
    "inject": lambda at: {"model": plain(), "config": config()},
    "load": lambda at: {"model": plain(), "path": saved(at)},
    "load_layout": lambda at: {"model": plain(), "layout": "loralib", "lora_alpha": 4,
                               "state_dict": {f"{KEY}.lora_A": torch.ones(2, 8), f"{KEY}.lora_B": torch.ones(8, 2)}},
    "merge": lambda at: {"model": adapted()},
    "merge_and_unload": lambda at: {"model": adapted()},
    "unload": lambda at: {"model": adapted()},
    "param_groups": lambda at: {"model": adapted()},
    "per_adapter_mean": lambda at: {"losses": torch.ones(3), "ids": torch.tensor([0, 1, -1])},
    "apply_policy": lambda at: {"model": plain(), "name": "deep_lora"},
    "LoraConfig.preset": lambda at: {"difficulty": "simple"},
    "reallocate": lambda at: {"model": adapted(), "scores": scores(), "reinit": True},
    "training.reliability": lambda at: classified(),
    "delete_adapter": lambda at: {"model": adapted(), "name": "b"},
    "save": lambda at: {"model": adapted(), "path": at / "new"},
    "set_adapter": lambda at: {"model": adapted(), "name": "b"},
    "set_ranks": lambda at: {"model": adapted(), "ranks": {KEY: 3}, "reinit": True},
    "roles": lambda at: {"model": adapted()},
    "summary": lambda at: {"model": adapted()},
    "to_peft": lambda at: {"model": adapted()},
    "track": lambda at: {"model": adapted()},
    "unmerge": lambda at: {"model": merged()},
    "LoraConfig.scaling": lambda at: {"self": config(), "rank": 4},
    "LoraConfig.coerce": lambda at: {"config": config()},
    "Scores.rank_correlation": lambda at: {"self": fastlora.Scores(scores(), "grad_sq"), "other": scores()},
    "Tracker.step": lambda at: {"self": scored_tracker()},
    "Tracker.scores": lambda at: {"self": scored_tracker()},
    "Tracker.mask": lambda at: {"self": scored_tracker(), "mask": torch.ones(2, 3, dtype=torch.bool)},
    "Tracker.covariances": lambda at: {"self": scored_tracker(), "kind": "act_cov"},
    "Tracker.penalty": lambda at: {"self": scored_tracker()},
    "Tracker.apply_penalty": lambda at: {"self": scored_tracker()},
    "Tracker.load_state_dict": lambda at: {"self": scored_tracker(), "state": scored_tracker().state_dict()},
    "training.Cosine": lambda at: {"optimizer": adamw(adapted()), "steps": 10},
    "nn.Conv1D": lambda at: {"in_features": 8, "out_features": 8},
    "nn.FrozenLinear": lambda at: {"in_features": 8, "out_features": 8},
    "nn.Linear": lambda at: {"in_features": 8, "out_features": 8},
    "nn.MultiheadAttention": lambda at: {"embed_dim": 8, "num_heads": 2},
    "nn.QKVLinear": lambda at: {"in_features": 8, "out_features": 24},
    "nn.TransformerEncoderLayer": lambda at: {"d_model": 8, "nhead": 2},
}  # fmt: skip


def saved(at: Path) -> Path:
    fastlora.save(adapted(), at / "adapter")
    return at / "adapter"
