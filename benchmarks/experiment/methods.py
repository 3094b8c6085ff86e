"""The methods: what each trains, and what it does around a step. A further method is one entry of ``METHODS``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import fastlora

from .data import Batch
from .settings import HEAD, TARGETS, Settings


def _nothing(step: int) -> None:
    return None


@dataclass
class Prepared:
    """A model ready to train. ``ranks`` is called after training; ``facts`` go into the run's file as they are."""

    model: Any
    groups: list[dict[str, Any]]
    after_backward: Callable[[int], None] = _nothing  # before gradients are clipped
    after_step: Callable[[int], None] = _nothing  # before gradients are cleared
    ranks: Callable[[], dict[str, int]] = dict
    facts: dict[str, Any] = field(default_factory=dict)


class Task(NamedTuple):
    """What a method may use before training: batches of the run's own training sentences."""

    settings: Settings
    seed: int
    calibration: list[Batch]


def loss_fn(model: Any, batch: Batch) -> Any:
    return model(**batch).loss


def adapt(model: Any, settings: Settings) -> Any:
    """Uniform LoRA on q, k and v with a trained classifier."""
    config = fastlora.LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules=list(TARGETS), modules_to_save=[HEAD]
    )  # fmt: skip
    return fastlora.inject(model, config)


def _groups(model: Any, settings: Settings) -> list[dict[str, Any]]:
    return fastlora.param_groups(model, lr_lora=settings.lr_lora, lr_head=settings.lr_head)


def _ranks(model: Any) -> Callable[[], dict[str, int]]:
    return lambda: {row.key: row.rank for row in fastlora.summary(model).rows}


def _full(model: Any, task: Task) -> Prepared:
    head = [p for n, p in model.named_parameters() if n.startswith(HEAD)]
    trunk = [p for n, p in model.named_parameters() if not n.startswith(HEAD)]
    rates = task.settings.lr_head, task.settings.lr_full
    return Prepared(model, [{"params": p, "lr": lr} for p, lr in zip((head, trunk), rates, strict=True)])


def _head_only(model: Any, task: Task) -> Prepared:
    fastlora.apply_policy(model, "head_only", fastlora.LoraConfig(modules_to_save=[HEAD]))
    return Prepared(model, _groups(model, task.settings))


def _uniform(model: Any, task: Task) -> Prepared:
    adapt(model, task.settings)
    return Prepared(model, _groups(model, task.settings), ranks=_ranks(model))


def _calibrated(method: str, r_min: int) -> Callable[[Any, Task], Prepared]:
    """Scores from a few backward passes, then the parameters of uniform ranks shared out by them."""

    def prepare(model: Any, task: Task) -> Prepared:
        settings = task.settings
        adapt(model, settings)
        steps = len(task.calibration)
        scores = fastlora.calibrate(model, task.calibration, loss_fn, steps=steps, method=method, progress=False)
        fastlora.reallocate(model, scores, unit="params", r_min=r_min, r_max=settings.max_rank)
        facts = {"scores": dict(scores), "settled": list(scores.convergence)}
        return Prepared(model, _groups(model, settings), ranks=_ranks(model), facts=facts)

    return prepare


def _weighted(normalize: str) -> Callable[[Any, Task], Prepared]:
    """FW-LoRA: probes until importance is frozen, then the penalty it weighs."""

    def prepare(model: Any, task: Task) -> Prepared:
        settings, facts = task.settings, {}
        adapt(model, settings)
        frozen_at = settings.importance_steps
        tracker = fastlora.track(model, warmup=frozen_at, every=1, seed=task.seed)

        def after_backward(step: int) -> None:
            tracker.apply_penalty(settings.penalty, normalize=normalize)

        def after_step(step: int) -> None:
            tracker.step()
            if step + 1 == frozen_at:
                facts["scores"] = dict(tracker.scores("grad_sq"))

        return Prepared(model, _groups(model, settings), after_backward, after_step, _ranks(model), facts)

    return prepare


def _peft_groups(model: Any, settings: Settings) -> list[dict[str, Any]]:
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    adapters = [p for n, p in trained if ".lora_" in n]
    head = [p for n, p in trained if ".lora_" not in n]
    rates = {"params": adapters, "lr": settings.lr_lora}, {"params": head, "lr": settings.lr_head}
    return [{**group, "weight_decay": 0.0} for group in rates]


def _key(name: str) -> str:
    return name.removeprefix("base_model.model.").partition(".lora_")[0]


def _adalora(model: Any, task: Task) -> Prepared:
    """Starts at 1.5 times the rank and prunes to it between a tenth and seven tenths of the steps."""
    import peft

    settings = task.settings
    config = peft.AdaLoraConfig(
        init_r=settings.rank * 3 // 2, target_r=settings.rank, lora_alpha=settings.alpha, tinit=settings.steps // 10,
        tfinal=settings.steps * 3 // 10, deltaT=max(1, settings.steps // 50), total_step=max(2, settings.steps),
        target_modules=list(TARGETS), modules_to_save=[HEAD],
    )  # fmt: skip
    wrapped = peft.get_peft_model(model, config)

    def after_step(step: int) -> None:
        wrapped.base_model.update_and_allocate(step)

    def ranks() -> dict[str, int]:
        kept = wrapped.peft_config["default"].rank_pattern or {}
        masks = {_key(name): sum(mask) for name, mask in kept.items()}
        parameters = wrapped.named_parameters()
        return masks or {_key(n): p.shape[0] for n, p in parameters if ".lora_A" in n}

    return Prepared(wrapped, _peft_groups(wrapped, settings), after_step=after_step, ranks=ranks)


def _eva(model: Any, task: Task) -> Prepared:
    """A from the activations' principal directions, ranks by the variance they explain (at most twice the rank)."""
    import peft

    settings = task.settings
    config = peft.LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules=list(TARGETS), modules_to_save=[HEAD],
        init_lora_weights="eva", eva_config=peft.EvaConfig(rho=settings.max_rank / settings.rank),
    )  # fmt: skip
    wrapped = peft.get_peft_model(model, config)
    inputs = [{name: value for name, value in batch.items() if name != "labels"} for batch in task.calibration]
    wrapped.eval()
    peft.initialize_lora_eva_weights(wrapped, inputs, show_progress_bar=False)

    def ranks() -> dict[str, int]:
        return {_key(n): p.shape[0] for n, p in wrapped.named_parameters() if ".lora_A" in n}

    return Prepared(wrapped, _peft_groups(wrapped, settings), ranks=ranks)


BASELINE = "lora"

# name -> (label, how to prepare it)
METHODS: dict[str, tuple[str, Callable[[Any, Task], Prepared]]] = {
    "full": ("full fine-tuning", _full),
    "head": ("head only", _head_only),
    BASELINE: ("LoRA, uniform rank", _uniform),
    "fc": ("FC-LoRA", _calibrated("fc", r_min=1)),
    "fim": ("FIM-LoRA", _calibrated("fim", r_min=2)),
    "fw-sum": ("FW-LoRA, sum", _weighted("sum")),
    "fw-relative": ("FW-LoRA, relative", _weighted("relative")),
    "fw-uniform": ("uniform penalty (control)", _weighted("uniform")),
    "adalora": ("AdaLoRA (PEFT)", _adalora),
    "eva": ("EVA (PEFT)", _eva),
}
