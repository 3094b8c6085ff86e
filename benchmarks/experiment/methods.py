"""How each setting of the plan is prepared, and what it does around a step: one entry of ``PREPARE``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch

import fastlora

from .data import Batch
from .settings import HEAD, Settings

RANK, SCALE = 2, 2  # uniform rank of the baseline; lora_alpha over rank, in every setting
LINEARS = r".*encoder\.layer\.\d+\..*(query|key|value|dense)"  # not the pooler


class Task(NamedTuple):
    """What a setting is given: its rates, and batches of the run's own training sentences."""

    settings: Settings
    seed: int
    rate: float
    penalty: float
    calibration: list[Batch]


@dataclass
class Prepared:
    """A model ready to train. ``after_step`` says whether it put new parameters in place of old ones."""

    model: Any
    groups: Callable[[], list[dict[str, Any]]]
    after_backward: Callable[[int], None] = lambda step: None  # before gradients are clipped
    after_step: Callable[[int], bool] = lambda step: False  # before gradients are cleared
    ranks: Callable[[], dict[str, int]] = dict  # called after training
    merged: Callable[[], Any] | None = None  # the model without adapters' own arithmetic
    facts: dict[str, Any] = field(default_factory=dict)


def loss_fn(model: Any, batch: Batch) -> Any:
    return model(**batch).loss


def _ranks(model: Any) -> dict[str, int]:
    return {row.key: row.rank for row in fastlora.summary(model).rows}


def _adapt(model: Any, task: Task, rank: int = RANK, targets: str = LINEARS, **fields: Any) -> Prepared:
    """LoRA at one rank with a trained classifier."""
    config = fastlora.LoraConfig(
        r=rank, lora_alpha=SCALE * rank, target_modules=targets, modules_to_save=[HEAD], **fields
    )  # fmt: skip
    fastlora.inject(model, config)
    return Prepared(
        model,
        lambda: fastlora.param_groups(model, lr_lora=task.rate, lr_head=task.settings.lr_head),
        ranks=lambda: _ranks(model),
        merged=lambda: fastlora.merge_and_unload(model),
    )


def _query_key_value(model: Any, task: Task) -> Prepared:
    return _adapt(model, task, 3 * RANK, r".*encoder\.layer\.\d+\..*(query|key|value)")


def _mlp(model: Any, task: Task) -> Prepared:
    """As many whole ranks as the baseline's parameters pay for."""
    budget = sum(RANK * (m.in_features + m.out_features) for m in _linears(model, LINEARS).values())
    targets = r".*encoder\.layer\.\d+\.(intermediate|output)\.dense"
    prepared = _adapt(model, task, 2 * RANK, targets)
    rows = fastlora.summary(model).rows
    count = budget // (rows[0].in_features + rows[0].out_features)
    fastlora.set_ranks(model, fastlora.allocate({row.key: 1.0 for row in rows}, count))
    return prepared


def _linears(model: Any, pattern: str) -> dict[str, torch.nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and re.fullmatch(pattern, n)}


def _half(upper: bool) -> Callable[[Any, Task], Prepared]:
    def prepare(model: Any, task: Task) -> Prepared:
        depth = model.config.num_hidden_layers
        layers = range(depth // 2, depth) if upper else range(depth // 2)
        targets = LINEARS.replace(r"\d+", f"({'|'.join(map(str, layers))})")
        return _adapt(model, task, 2 * RANK, targets)

    return prepare


def _norm(tracker: Any) -> fastlora.Scores:
    scores = tracker.scores("grad_sq")
    return fastlora.Scores({key: value**0.5 for key, value in scores.items()}, "grad_norm", costs=scores.costs)


def _fisher(tracker: Any) -> Any:
    return tracker.scores("fisher")


def _variance(tracker: Any) -> Any:
    return tracker.scores("act_var")


def _by_score(method: Any, rank: int = RANK, per: str = "rank") -> Callable[[Any, Task], Prepared]:
    """Scores from a few backward passes, then the parameters of uniform ranks shared out by them."""

    def prepare(model: Any, task: Task) -> Prepared:
        prepared = _adapt(model, task, rank)
        scores = _scores(model, task, method)
        fastlora.reallocate(model, scores, unit="params", r_min=0, r_max=4 * rank, per=per)
        costs = scores.costs if per == "param" else {}
        prepared.facts["scores"] = {key: value / costs.get(key, 1) for key, value in scores.items()}
        return prepared

    return prepare


def _scores(model: Any, task: Task, method: Any) -> Mapping[str, float]:
    if method == "random":
        chance = torch.Generator().manual_seed(task.seed)
        costs = fastlora.summary(model).costs
        drawn = torch.rand(len(costs), generator=chance).tolist()
        return fastlora.Scores(dict(zip(costs, drawn, strict=True)), "random", signed=False, costs=costs)
    steps = len(task.calibration)
    return fastlora.calibrate(model, task.calibration, loss_fn, steps=steps, method=method, progress=False)


def _moved(every: bool) -> Callable[[Any, Task], Prepared]:
    """Ranks by tracked gradient norm per parameter, after a tenth of the steps or after every tenth."""

    def prepare(model: Any, task: Task) -> Prepared:
        prepared = _adapt(model, task)
        tenth, budget = task.settings.tenth, sum(row.params for row in fastlora.summary(model).rows)
        costs = fastlora.summary(model).costs
        tracker = fastlora.track(model, every=1, seed=task.seed)

        def after_step(step: int) -> bool:
            tracker.step()
            turn = (step + 1) // tenth
            if (step + 1) % tenth or turn > (9 if every else 1):
                return False
            ranks = fastlora.allocate(
                _norm(tracker), budget, r_min=0, r_max=4 * RANK, unit="params", per="param", costs=costs
            )  # fmt: skip
            fastlora.set_ranks(model, ranks, keep=True)
            return True

        prepared.after_step = after_step
        return prepared

    return prepare


def _penalised(normalize: str) -> Callable[[Any, Task], Prepared]:
    """FW-LoRA: probes for a tenth of the steps, when importance is frozen, then the penalty that it weighs."""

    def prepare(model: Any, task: Task) -> Prepared:
        prepared = _adapt(model, task)
        tracker = fastlora.track(model, warmup=task.settings.tenth, every=1, seed=task.seed)

        def after_step(step: int) -> bool:
            tracker.step()
            return False

        prepared.after_backward = lambda step: tracker.apply_penalty(task.penalty, normalize=normalize)
        prepared.after_step = after_step
        return prepared

    return prepare


def _eva(model: Any, task: Task) -> Prepared:
    prepared = _adapt(model, task)
    with fastlora.track(model, estimator="exact", ema=None, every=1, statistics=("act_cov",)) as tracker:
        for batch in task.calibration:
            with tracker.mask(batch["attention_mask"]):
                loss_fn(model, batch).backward()
            tracker.step()
            model.zero_grad()
        fastlora.initialize_eva(model, tracker.covariances("act_cov"), progress=False)
    return prepared


def _lora_ga(model: Any, task: Task) -> Prepared:
    prepared = _adapt(model, task, init_lora_weights="lora_ga")
    fastlora.initialize_lora_ga(model, task.calibration, loss_fn, steps=len(task.calibration))
    return prepared


def _adalora(model: Any, task: Task) -> Prepared:
    """Starts at 1.5 times the rank and prunes to it between a tenth and half of the steps."""
    import peft

    settings = task.settings
    config = peft.AdaLoraConfig(
        init_r=RANK * 3 // 2, target_r=RANK, lora_alpha=SCALE * RANK, tinit=settings.steps // 10,
        tfinal=settings.steps // 2, deltaT=max(1, settings.steps // 50), total_step=max(2, settings.steps),
        target_modules=LINEARS, modules_to_save=[HEAD],
    )  # fmt: skip
    wrapped = peft.get_peft_model(model, config)

    def groups() -> list[dict[str, Any]]:
        trained = [(n, p) for n, p in wrapped.named_parameters() if p.requires_grad]
        parts = [p for n, p in trained if ".lora_" in n], [p for n, p in trained if ".lora_" not in n]
        return [{"params": p, "lr": lr} for p, lr in zip(parts, (task.rate, settings.lr_head), strict=True)]

    def after_step(step: int) -> bool:
        wrapped.base_model.update_and_allocate(step)
        return False

    def ranks() -> dict[str, int]:
        kept = wrapped.peft_config["default"].rank_pattern or {}
        masks = {_key(name): sum(mask) for name, mask in kept.items()}
        return masks or {_key(n): p.shape[0] for n, p in wrapped.named_parameters() if ".lora_A" in n}

    return Prepared(wrapped, groups, after_step=after_step, ranks=ranks, merged=wrapped.merge_and_unload)


def _key(name: str) -> str:
    return name.removeprefix("base_model.model.").partition(".lora_")[0]


def _full(model: Any, task: Task) -> Prepared:
    head = [p for n, p in model.named_parameters() if n.startswith(HEAD)]
    trunk = [p for n, p in model.named_parameters() if not n.startswith(HEAD)]
    rates = task.settings.lr_head, task.rate
    groups = [{"params": p, "lr": lr} for p, lr in zip((head, trunk), rates, strict=True)]
    return Prepared(model, lambda: groups)


def _head(model: Any, task: Task) -> Prepared:
    fastlora.apply_policy(model, "head_only", fastlora.LoraConfig(modules_to_save=[HEAD]))
    return Prepared(model, lambda: fastlora.param_groups(model, lr_lora=task.rate, lr_head=task.rate))


PREPARE: dict[str, Callable[[Any, Task], Prepared]] = {
    "all-2": _adapt,
    "qkv": _query_key_value,
    "mlp": _mlp,
    "lower": _half(upper=False),
    "upper": _half(upper=True),
    "all-1": partial(_adapt, rank=1),
    "all-8": partial(_adapt, rank=8),
    "norm": _by_score(_norm, per="param"),
    "norm-1": _by_score(_norm, rank=1, per="param"),
    "norm-8": _by_score(_norm, rank=8, per="param"),
    "norm-warmup": _moved(every=False),
    "norm-tracked": _moved(every=True),
    "norm-total": _by_score(_norm),
    "fisher": _by_score(_fisher, per="param"),
    "fc": _by_score("fc"),
    "fim": _by_score("fim"),
    "variance": _by_score(_variance),
    "random": _by_score("random"),
    "penalty-sum": _penalised("sum"),
    "penalty-relative": _penalised("relative"),
    "penalty-uniform": _penalised("uniform"),
    "orthogonal": partial(_adapt, init_lora_weights="orthogonal"),
    "pissa": partial(_adapt, init_lora_weights="pissa"),
    "eva": _eva,
    "lora-ga": _lora_ga,
    "adalora": _adalora,
    "dora": partial(_adapt, use_dora=True),
    "full": _full,
    "head": _head,
}
