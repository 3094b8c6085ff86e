"""What the statistics cost: the same training step with and without them, interleaved in one process."""

from __future__ import annotations

import copy
import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..nn.linear import adapted_layers
from ..peft_io.convert import to_peft
from ..tracking.sampling import median_cost
from ..tracking.tracker import track
from .lanes import adapted, loss_of
from .recipe import Images, Settings, build_vit

Step = Callable[[Images], None]


def _training_step(model: nn.Module, settings: Settings, after: Callable[[], None]) -> Step:
    parameters = [p for n, p in model.named_parameters() if p.requires_grad and ("lora_" in n or "head." in n)]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr_lora)

    def step(batch: Images) -> None:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        after()

    return step


def _plain(model: nn.Module, settings: Settings) -> Step:
    return _training_step(model, settings, lambda: None)


def _tracked(model: nn.Module, settings: Settings, estimator: str) -> Step:
    return _training_step(model, settings, track(model, estimator=estimator, every=1).step)


def _requires_grad(model: nn.Module, settings: Settings) -> Step:
    """What users do without such a library: let autograd form the weight gradients, square them, throw them away."""
    weights = [layer.weight.requires_grad_(True) for layer in adapted_layers(model).values()]
    averages = [torch.zeros(3) for _ in weights]

    def after() -> None:
        with torch.no_grad():
            for weight, average in zip(weights, averages, strict=True):
                squares = torch.stack([part.square().sum() for part in weight.grad.chunk(3)])
                average.lerp_(squares, 0.02)
                weight.grad = None

    return _training_step(model, settings, after)


# variant -> (label, its training step); "plain" is the denominator and "control" is plain once more.
VARIANTS: dict[str, tuple[str, Callable[[nn.Module, Settings], Step]]] = {
    "plain": ("no statistics", _plain),
    "control": ("control: no statistics, again", _plain),
    "probe": ("probe, every step", lambda model, settings: _tracked(model, settings, "probe")),
    "exact": ("exact, every step", lambda model, settings: _tracked(model, settings, "exact")),
    "requires_grad": ("usual way: requires_grad on W", _requires_grad),
}


# Pairs of variants whose difference is judged.
COMPARED_COSTS = (
    ("probe", "control"), ("exact", "control"), ("requires_grad", "control"), ("requires_grad", "probe"),
)  # fmt: skip


def step_seconds(
    steps: dict[str, Step], batch: Images, rounds: int, advance: Callable[[], None]
) -> dict[str, list[float]]:
    """CPU seconds of one thread per variant and round.

    Variants run one after the other within a round and in the opposite order in the next.
    """
    names, seconds = list(steps), {name: [] for name in steps}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for turn in range(-2, rounds):  # two rounds to warm up
            for name in names if turn % 2 == 0 else reversed(names):
                start = time.thread_time()
                steps[name](batch)
                if turn >= 0:
                    seconds[name].append(time.thread_time() - start)
            advance()
    finally:
        torch.set_num_threads(threads)
    return seconds


def cost_differences(seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Of the compared pairs: (first - second) / plain of the same round, median with its 95 % interval.

    The interval's ends are None where the rounds are too few to have one.
    """
    found = []
    for first, second in COMPARED_COSTS:
        rounds = zip(seconds[first], seconds[second], seconds["plain"], strict=True)
        shares = [(mine - theirs) / plain for mine, theirs, plain in rounds]
        cost = median_cost(shares)
        low, high = (None, None) if cost is None else (cost.low, cost.high)
        median = statistics.median(shares)
        found.append({"first": first, "second": second, "median": median, "low": low, "high": high})
    return found


def _ratios(seconds: list[float], plain: list[float]) -> dict[str, float]:
    """Median and quartiles of ratios to ``plain`` in the same round."""
    ratios = [mine / theirs for mine, theirs in zip(seconds, plain, strict=True)]
    lower, middle, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"ratio": middle, "lower": lower, "upper": upper, "seconds": statistics.median(seconds)}


def _cases(base: Any, train: Images, settings: Settings) -> list[tuple[Any, Images, int, str]]:
    """The demo's transformer, and one as wide as ViT-Small, where fixed overheads weigh as in practice."""
    batch = Images(train.x[: settings.batch], train.y[: settings.batch])
    cases = [(base, batch, settings.cost_rounds, "the demo's transformer")]
    if settings.wide_rounds:
        wide = build_vit(replace(settings, width=384, depth=2, heads=6), 0, patch=1)
        cases.append((wide, Images(batch.x[:8], batch.y[:8]), settings.wide_rounds, "two blocks as wide as ViT-Small"))
    return cases


def _timed(
    case: tuple[Any, Images, int, str], steps: dict[str, Step], over: str, advance: Callable[[], None]
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    model, batch, rounds, title = case
    seconds = step_seconds(steps, batch, rounds, advance)
    rows = batch.x.shape[0] * model.pos_embed.shape[1]
    costs = {name: _ratios(mine, seconds[over]) for name, mine in seconds.items()}
    return {"title": title, "width": model.embed_dim, "rows": rows, "rounds": rounds, "variants": costs}, seconds


def measure(
    base: Any, train: Images, settings: Settings, advance: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """What statistics cost in every case."""
    results = []
    for case in _cases(base, train, settings):
        model = adapted(case[0], settings, 0)
        steps = {name: build(copy.deepcopy(model), settings) for name, (_, build) in VARIANTS.items()}
        found, seconds = _timed(case, steps, "plain", advance)
        results.append({**found, "differences": cost_differences(seconds)})
    return results


SPEED = {"head": "head only", "fastlora": "fastlora", "peft": "PEFT"}


def measure_speed(
    base: Any, train: Images, settings: Settings, advance: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """The same adapter here and in PEFT, a dense one on every fused q, k, v; empty where PEFT is not installed."""
    if not compares_with_peft():
        return []
    results = []
    for case in _cases(base, train, settings):
        own = adapted(case[0], settings, 0, split_qkv=False)
        models = {"head": copy.deepcopy(case[0]).requires_grad_(False), "fastlora": own, "peft": to_peft(own)}
        models["head"].head.requires_grad_(True)
        steps = {name: _training_step(model, settings, lambda: None) for name, model in models.items()}
        results.append(_timed(case, steps, "peft", advance)[0])
    return results


def compares_with_peft() -> bool:
    """Whether PEFT is here."""
    return importlib.util.find_spec("peft") is not None


def rounds_in(settings: Settings) -> int:
    """Calls of ``advance`` that ``measure`` and ``measure_speed`` make."""
    once = sum(rounds + 2 for rounds in (settings.cost_rounds, settings.wide_rounds) if rounds)
    return once * (2 if compares_with_peft() else 1)
