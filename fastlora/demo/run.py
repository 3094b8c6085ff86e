"""The demo from beginning to end: train, adapt, judge, save, draw."""

from __future__ import annotations

import copy
import json
import logging
import os
import platform
import time
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..ops import native
from ..peft_io.load import load
from ..peft_io.save import save
from .cost import SPEED, VARIANTS, measure, measure_speed, rounds_in
from .lanes import METHODS, Lane, result_of, train_side_by_side
from .page import write_page
from .recipe import Digits, Settings, load_digits, new_head, predict, require, train_base
from .verdict import (
    RULE,
    accuracy_sentences,
    calibration_sentences,
    claims,
    cost_sentences,
    diagram,
    differences,
    method_summary,
)

logger = logging.getLogger(__name__)

SCHEMA = 1
SAVED_METHOD = "fc"


def run(settings: Settings, out: Path, progress: Any = None) -> dict[str, Any]:
    """Run the demo and write ``results.json``, ``adapter/``, the pictures and ``index.html`` into ``out``.

    ``progress``: a started ``rich.progress.Progress``, or None for silence. Returns what is in ``results.json``;
    ``results["failed"]`` lists the claims that do not hold. Raises ``MissingExtra`` and ``OSError``.
    """
    require("timm", "sklearn", "matplotlib")
    from .figures import draw

    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        results = _results(settings, out, _Bars(progress, settings))
    finally:
        torch.set_num_threads(before)
    results["wall_seconds"] = time.perf_counter() - start
    write_page(results, draw(results, out), out)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    return results


def _results(settings: Settings, out: Path, bars: _Bars) -> dict[str, Any]:
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
    outcomes: dict[str, list[dict[str, Tensor]]] = {name: [] for name in METHODS}
    bases, chosen, lanes_of_seed = [], [], []
    for seed in settings.seeds:
        digits = load_digits(seed, settings)
        base, accuracy = train_base(settings, digits, seed, bars.base)
        logger.info("seed %d: the base reaches %.3f on its own classes", seed, accuracy)
        lanes = train_side_by_side(base, settings, digits, seed, bars.lane)
        for lane in lanes:
            numbers, outcome = result_of(lane, seed, digits)
            runs[lane.method].append(numbers)
            outcomes[lane.method].append(outcome)
        bases.append(accuracy)
        lanes_of_seed.append({lane.method: lane for lane in lanes})
        chosen.append((base, digits))
    base, digits = chosen[0]
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "settings": {**asdict(settings), "seeds": list(settings.seeds)},
        "environment": _environment(),
        "data": {name: len(part.y) for name, part in digits._asdict().items()},
        "base": {"accuracy": bases, "parameters": sum(p.numel() for p in base.parameters())},
        "methods": {name: _method(name, runs[name], outcomes[name], lanes_of_seed[0][name]) for name in METHODS},
        "differences": differences({n: [o["right"] for o in outcomes[n]] for n in METHODS}),
        "ranks": [lanes["fc"].ranks for lanes in lanes_of_seed],
        "importance": {
            "composite": _mean_scores([dict(lanes["fc"].scores) for lanes in lanes_of_seed]),
            "grad_sq": _mean_scores([_shares(dict(lanes["fw"].scores)) for lanes in lanes_of_seed]),
        },
        "adapter": _save_adapter(lanes_of_seed[0][SAVED_METHOD], base, settings, digits, out),
        "cost": measure(base, digits.train, settings, bars.cost),
        "cost_labels": {name: label for name, (label, _) in VARIANTS.items()},
        "speed": measure_speed(base, digits.train, settings, bars.cost),
        "speed_labels": SPEED,
    }
    return _judged(results, settings)


def _judged(results: dict[str, Any], settings: Settings) -> dict[str, Any]:
    results["claims"] = claims(results, settings)
    results["failed"] = [f"{c['claim']}: {c['value']}" for c in results["claims"] if not c["holds"]]
    results["rule"] = RULE
    results["findings"] = [*accuracy_sentences(results), *calibration_sentences(results), *cost_sentences(results)]
    return results


def _method(name: str, runs: list[dict[str, Any]], outcomes: list[dict[str, Tensor]], lane: Lane) -> dict[str, Any]:
    return {
        "label": METHODS[name][0],
        "parameters": lane.parameters(),
        "summary": method_summary(runs),
        "reliability": diagram(outcomes),
        "runs": runs,
    }


def _shares(values: dict[str, float]) -> dict[str, float]:
    total = sum(values.values())
    return {key: value / total for key, value in values.items()}


def _mean_scores(scores: list[dict[str, float]]) -> dict[str, float]:
    return {key: mean(one[key] for one in scores) for key in scores[0]}


def _save_adapter(lane: Lane, base: Any, settings: Settings, digits: Digits, out: Path) -> dict[str, Any]:
    """Save as PEFT files, read them back into a fresh copy of the base, and compare the logits."""
    folder = out / "adapter"
    save(lane.model, folder, importance=lane.scores)
    fresh = copy.deepcopy(base)
    new_head(fresh, seed=-1)
    load(fresh, folder, progress=False)
    gap = (predict(fresh, digits.test) - predict(lane.model, digits.test)).abs().max()
    return {
        "method": lane.method,
        "seed": settings.seeds[0],
        "folder": folder.name,
        "files": sorted(path.name for path in folder.iterdir()),
        "reload_max_difference": float(gap),
    }


def _environment() -> dict[str, Any]:
    import timm

    return {
        "fastlora": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "native": native.isa() if native.available() else f"not used: {native.reason()}",
    }


class _Bars:
    """Progress bars: one for the bases, one per method, one for the cost."""

    def __init__(self, progress: Any, settings: Settings):
        self.progress = progress
        if progress is None:
            return
        seeds = len(settings.seeds)
        self._base = progress.add_task("base, digits 0-4", total=seeds * settings.base_steps)
        self._lanes = {
            name: progress.add_task(f"{label}, digits 5-9", total=seeds * settings.steps)
            for name, (label, _) in METHODS.items()
        }
        self._cost = progress.add_task("cost of the statistics", total=rounds_in(settings))

    def base(self) -> None:
        if self.progress is not None:
            self.progress.advance(self._base)

    def lane(self, method: str) -> None:
        if self.progress is not None:
            self.progress.advance(self._lanes[method])

    def cost(self) -> None:
        if self.progress is not None:
            self.progress.advance(self._cost)
