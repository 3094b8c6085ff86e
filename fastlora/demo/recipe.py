"""What the demo trains: its settings, the digits in splits, and the small vision transformer."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._utils.installed import extra
from ..testing import enable_torchvision

CLASSES = 5  # digits 0 to 4 for the base, 5 to 9 for the adaptation


class MissingExtra(ImportError):
    """A package that only the demo needs is not installed."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides what the demo does; the defaults are the recipe, ``fast`` shortens it.

    Learning rates were chosen on validation images of seeds that the demo does not use.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    threads: int = 1
    width: int = 48
    depth: int = 6
    heads: int = 3
    base_steps: int = 400
    base_batch: int = 32
    base_lr: float = 2e-3
    base_noise: float = 0.3
    steps: int = 150
    batch: int = 32
    shots: int = 40
    validation: int = 30
    evaluate_every: int = 25
    rank: int = 4
    alpha: float = 8.0
    max_rank: int = 16
    calibration_steps: int = 8
    warmup: int = 50
    penalty: float = 1e-4
    lr_head: float = 1e-2
    lr_head_only: float = 1e-1
    lr_full: float = 2e-3
    lr_lora: float = 1e-2
    weight_decay: float = 0.01
    cost_rounds: int = 30
    wide_rounds: int = 10
    min_base_accuracy: float = 0.97
    min_gain: float = 0.01
    max_reload_difference: float = 1e-4

    def fast(self) -> Settings:
        """One seed, a shallower net and few steps: enough to see every part run and every claim hold."""
        return replace(
            self, seeds=self.seeds[:1], depth=3, base_steps=200, steps=50, evaluate_every=25, warmup=20,
            cost_rounds=6, wide_rounds=0,
        )  # fmt: skip


def require(*packages: str) -> None:
    """Import packages of the extra; ``MissingExtra`` says which is not there and how to get it."""
    enable_torchvision()
    for package in packages:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            name = {"sklearn": "scikit-learn"}.get(error.name or package, error.name or package)
            raise MissingExtra(f"the demo needs {name}: {extra('demo')}") from error


class Images(NamedTuple):
    """Standardised images [n, 1, 8, 8] with labels 0 to 4."""

    x: Tensor
    y: Tensor


class Digits(NamedTuple):
    """Disjoint splits: ``base`` and ``held_out`` show 0 to 4, the others 5 to 9."""

    base: Images
    held_out: Images
    train: Images
    validation: Images
    test: Images


def load_digits(seed: int, settings: Settings) -> Digits:
    """Scikit-learn's 1797 digits, split at random within every class."""
    from sklearn.datasets import load_digits as sklearn_digits

    data = sklearn_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, list[Tensor]] = {name: [] for name in Digits._fields}
    for digit in range(2 * CLASSES):
        members = torch.nonzero(labels == digit).flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        if digit < CLASSES:
            names, sizes = ("base", "held_out"), [int(0.8 * len(members))]
        else:
            names, sizes = ("train", "validation", "test"), [settings.shots, settings.validation]
        for name, part in zip(names, members.split([*sizes, len(members) - sum(sizes)]), strict=True):
            parts[name].append(part)
    known = images[torch.cat(parts["base"])]
    images = (images - known.mean()) / known.std()
    chosen = {name: torch.cat(part) for name, part in parts.items()}
    return Digits(**{name: Images(images[i], labels[i] % CLASSES) for name, i in chosen.items()})


def build_vit(settings: Settings, seed: int, patch: int = 2) -> Any:
    """A timm ``VisionTransformer`` for 8x8 images.

    Weights are Xavier instead of timm's N(0, .02), with which a net this narrow needs several times the steps.
    """
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(seed)
    model = VisionTransformer(
        img_size=8, patch_size=patch, in_chans=1, num_classes=CLASSES, embed_dim=settings.width,
        depth=settings.depth, num_heads=settings.heads, mlp_ratio=2,
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
    nn.init.trunc_normal_(model.pos_embed, std=0.2)
    return model


def new_head(model: Any, seed: int) -> None:
    """Replace the classifier: the same fresh one for every method of a seed."""
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(model.head.in_features, CLASSES)
    with torch.no_grad():
        head.weight.normal_(std=0.02, generator=generator)
        head.bias.zero_()
    model.head = head


def schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over a tenth of the steps, then half a cosine to zero."""
    warmup = max(1, steps // 10)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def batches(images: Images, size: int, seed: int):
    """Endless random batches; the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(images.y), (size,), generator=generator)
        yield Images(images.x[chosen], images.y[chosen])


@torch.no_grad()
def predict(model: nn.Module, images: Images) -> Tensor:
    """Logits [n, 5] in evaluation mode."""
    model.eval()
    logits = model(images.x)
    model.train()
    return logits


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).float().mean())


def train_base(settings: Settings, digits: Digits, seed: int, advance=lambda: None) -> tuple[Any, float]:
    """Train the transformer on 0 to 4; returns it with its accuracy on held-out images of these classes."""
    model = build_vit(settings, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.base_lr, weight_decay=0.05)
    scheduler = schedule(optimizer, settings.base_steps)
    generator = torch.Generator().manual_seed(seed)
    for _, (x, y) in zip(range(settings.base_steps), batches(digits.base, settings.base_batch, seed), strict=False):
        x = x + settings.base_noise * torch.randn(x.shape, generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        scheduler.step()
        advance()
    return model, accuracy(predict(model, digits.held_out), digits.held_out.y)
