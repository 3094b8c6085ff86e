"""The five ways to adapt the frozen base, trained side by side on the same batches."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import LoraConfig
from ..importance.allocation import allocate
from ..importance.scores import Scores
from ..model.inject import inject
from ..model.ranks import set_ranks
from ..model.summary import summary
from ..model.trainable import param_groups
from ..tracking.calibrate import calibrate
from ..tracking.tracker import Tracker, track
from ..training.temperature import ece, fit_temperature
from .recipe import CLASSES, Digits, Images, Settings, accuracy, batches, new_head, predict, schedule


def loss_of(model: nn.Module, batch: Images) -> Tensor:
    return F.cross_entropy(model(batch.x), batch.y)


class Lane:
    """One method on one seed: its model, its optimizer and a clock that runs only while it works."""

    def __init__(self, method: str, model: Any, groups: list[dict[str, Any]], settings: Settings):
        self.method, self.model, self.settings = method, model, settings
        self.optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
        self.scheduler = schedule(self.optimizer, settings.steps)
        self.tracker: Tracker | None = None
        self.scores: Scores | None = None
        self.ranks: dict[str, int] | None = None
        self.setup_seconds = 0.0
        self.step_seconds: list[float] = []
        self.curve: list[tuple[float, float]] = []

    def step(self, batch: Images) -> None:
        start = time.perf_counter()
        loss = loss_of(self.model, batch)
        if self.tracker is not None:
            loss = loss + self.tracker.penalty(self.settings.penalty)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        if self.tracker is not None:
            self.tracker.step()
        self.step_seconds.append(time.perf_counter() - start)

    @property
    def clock(self) -> float:
        return self.setup_seconds + sum(self.step_seconds)

    def parameters(self) -> dict[str, int]:
        """Trainable parameters: adapters, head, anything else."""
        if self.method in ("head", "full"):
            head = sum(p.numel() for p in self.model.head.parameters())
            trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
            return {"adapters": 0, "head": head, "other": trainable - head}
        counted = summary(self.model)
        return {"adapters": counted.adapter_params, "head": counted.head_params, "other": counted.other_trainable}


def adapted(base: Any, settings: Settings, seed: int, **fields: Any) -> Any:
    """A copy of the base with uniform-rank adapters on q, k and v, and the new head."""
    model = copy.deepcopy(base)
    new_head(model, seed)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules="qkv", modules_to_save=["head"], **fields
    )  # fmt: skip
    return inject(model, config)


def _lora_groups(model: Any, settings: Settings) -> list[dict[str, Any]]:
    return param_groups(
        model, lr_lora=settings.lr_lora, lr_head=settings.lr_head, weight_decay=settings.weight_decay
    )  # fmt: skip


def _head_only(base: Any, settings: Settings, seed: int, train: Images) -> Lane:
    model = copy.deepcopy(base).requires_grad_(False)
    new_head(model, seed)
    return Lane("head", model, [{"params": model.head.parameters(), "lr": settings.lr_head_only}], settings)


def _full(base: Any, settings: Settings, seed: int, train: Images) -> Lane:
    model = copy.deepcopy(base)
    new_head(model, seed)
    trunk = [p for n, p in model.named_parameters() if not n.startswith("head.")]
    groups = [
        {"params": model.head.parameters(), "lr": settings.lr_head},
        {"params": trunk, "lr": settings.lr_full},
    ]
    return Lane("full", model, groups, settings)


def _uniform(base: Any, settings: Settings, seed: int, train: Images) -> Lane:
    model = adapted(base, settings, seed)
    return Lane("lora", model, _lora_groups(model, settings), settings)


def _fc(base: Any, settings: Settings, seed: int, train: Images) -> Lane:
    """Calibrate, share out as many parameters as uniform ranks have, then train."""
    model = adapted(base, settings, seed)
    start = time.perf_counter()
    budget = summary(model).adapter_params
    calibration = batches(train, settings.batch, seed + 1000)
    scores = calibrate(model, calibration, loss_of, steps=settings.calibration_steps, method="fc", progress=False)
    ranks = allocate(scores, budget, r_min=1, r_max=settings.max_rank, unit="params")
    set_ranks(model, ranks)
    seconds = time.perf_counter() - start
    lane = Lane("fc", model, _lora_groups(model, settings), settings)
    lane.setup_seconds, lane.scores, lane.ranks = seconds, scores, ranks
    return lane


def _fw(base: Any, settings: Settings, seed: int, train: Images) -> Lane:
    """Probes follow the squared gradient for ``warmup`` steps; then it is frozen and weighs the penalty."""
    model = adapted(base, settings, seed)
    lane = Lane("fw", model, _lora_groups(model, settings), settings)
    lane.tracker = track(model, warmup=settings.warmup, seed=seed, every=1)
    return lane


# method -> (label, how to set it up); a further method is one entry here.
METHODS: dict[str, tuple[str, Callable[[Any, Settings, int, Images], Lane]]] = {
    "head": ("head only", _head_only),
    "full": ("full fine-tuning", _full),
    "lora": ("LoRA, uniform rank", _uniform),
    "fc": ("FC-LoRA", _fc),
    "fw": ("FW-LoRA", _fw),
}
ADAPTERS = ("lora", "fc", "fw")


def train_side_by_side(
    base: Any, settings: Settings, digits: Digits, seed: int, advance: Callable[[str], None] = lambda method: None
) -> list[Lane]:
    """Every method takes one step on each batch, in rotating order, so that all see the same machine.

    Test images are looked at along the way for the curves only: nothing is chosen by them, the last step counts.
    """
    lanes = [build(base, settings, seed, digits.train) for _, build in METHODS.values()]
    _record(lanes, digits.test)
    for step, batch in zip(range(settings.steps), batches(digits.train, settings.batch, seed), strict=False):
        turn = step % len(lanes)
        for lane in lanes[turn:] + lanes[:turn]:
            lane.step(batch)
            advance(lane.method)
        if (step + 1) % settings.evaluate_every == 0 or step + 1 == settings.steps:
            _record(lanes, digits.test)
    for lane in lanes:
        if lane.tracker is not None:
            lane.scores = lane.tracker.scores("grad_sq")
            lane.tracker.close()
    return lanes


def _record(lanes: list[Lane], test: Images) -> None:
    for lane in lanes:
        lane.curve.append((lane.clock, accuracy(predict(lane.model, test), test.y)))


def result_of(lane: Lane, seed: int, digits: Digits) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Numbers of a trained lane, and the tensors that pooled figures need."""
    logits = predict(lane.model, digits.test).double()
    temperature = fit_temperature(predict(lane.model, digits.validation), digits.validation.y)
    labels = digits.test.y
    right = logits.argmax(1) == labels
    steps = torch.tensor(lane.step_seconds)
    numbers = {
        "seed": seed,
        "accuracy": float(right.double().mean()),
        "per_class": [float(right[labels == c].double().mean()) for c in range(CLASSES)],
        "ece_before": ece(logits, labels),
        "ece_after": ece(logits, labels, temperature=temperature),
        "temperature": temperature,
        "seconds_per_step": float(steps.median()),
        "setup_seconds": lane.setup_seconds,
        "curve": lane.curve,
    }
    return numbers, {"logits": logits, "scaled": logits / temperature, "labels": labels, "right": right.double()}
