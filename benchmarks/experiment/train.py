"""One run: one method on one seed, from the pretrained model to numbers."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, replace
from typing import Any

import torch

import fastlora
from fastlora.training.schedule import Cosine

from .data import Sentences, batches, by_length, draw
from .methods import BASELINE, METHODS, Prepared, Task, loss_fn
from .runs import environment
from .settings import HEAD, Settings


def load(model_path: str, seed: int) -> tuple[Any, Any]:
    """(model, tokenizer): the pretrained encoder under a new classifier, the same for every method of a seed."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    # Each load would report that the classifier is new.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=2)
    return model.float(), AutoTokenizer.from_pretrained(model_path)


@torch.no_grad()
def evaluate(model: Any, tokenizer: Any, sentences: Sentences, settings: Settings) -> dict[str, Any]:
    """Accuracy, loss and calibration error on the dev set, and every prediction as a digit."""
    model.eval()
    logits, labels = [], []
    for batch in batches(sentences, tokenizer, 64, settings.max_tokens, drop_last=False):
        labels.append(batch.pop("labels"))
        logits.append(model(**batch).logits)
    scores, truth = torch.cat(logits).double(), torch.cat(labels)
    predicted = scores.argmax(1)
    return {
        "accuracy": float((predicted == truth).double().mean()),
        "loss": float(torch.nn.functional.cross_entropy(scores, truth)),
        "ece": fastlora.training.ece(scores, truth),
        "predictions": "".join(map(str, predicted.tolist())),
    }


def agreement(model: Any, data: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Probe and exact grad_sq of the same gradients: no dropout, no training in between, plain means over batches."""
    training = model.training
    model.eval()
    found = {}
    for estimator in ("probe", "exact"):
        with fastlora.track(model, estimator=estimator, ema=None, every=1, seed=seed) as tracker:
            for batch in data:
                loss_fn(model, batch).backward()
                tracker.step()
                model.zero_grad()
            found[estimator] = tracker.scores("grad_sq")
            probes = tracker.probes
    model.train(training)
    errors = [found["probe"][key] / value - 1 for key, value in found["exact"].items() if value > 0]
    return {
        "spearman": found["probe"].rank_correlation(found["exact"]),
        "rms_error": (sum(e * e for e in errors) / len(errors)) ** 0.5,
        "batches": len(data),
        "probes": probes,
        **{name: dict(scores) for name, scores in found.items()},
    }


def _train(prepared: Prepared, data: list[Any], settings: Settings) -> dict[str, list[float]]:
    model = prepared.model
    optimizer = torch.optim.AdamW(prepared.groups, weight_decay=0.0)
    scheduler = Cosine(optimizer, settings.steps, floor=settings.lr_floor, warmup=settings.steps // 16)
    trained = [p for group in prepared.groups for p in group["params"]]
    model.train()
    record: dict[str, list[float]] = {"losses": [], "cpu": [], "wall": []}
    for step, batch in enumerate(data):
        cpu, wall = time.thread_time(), time.perf_counter()
        loss = loss_fn(model, batch)
        loss.backward()
        prepared.after_backward(step)
        torch.nn.utils.clip_grad_norm_(trained, settings.clip)
        optimizer.step()
        scheduler.step()
        prepared.after_step(step)
        optimizer.zero_grad()
        record["cpu"].append(time.thread_time() - cpu)
        record["wall"].append(time.perf_counter() - wall)
        record["losses"].append(float(loss.detach()))
    return record


def _parameters(model: Any, prepared: Prepared) -> dict[str, int]:
    """Trained parameters: adapters, head, anything else."""
    trained = {n: p.numel() for group in [model.named_parameters()] for n, p in group if p.requires_grad}
    adapters = sum(count for name, count in trained.items() if ".lora_" in name)
    head = sum(count for name, count in trained.items() if HEAD in name)
    return {"adapters": adapters, "head": head, "other": sum(trained.values()) - adapters - head}


def run(
    method: str, seed: int, settings: Settings, model_path: str, train: Sentences, dev: Sentences
) -> dict[str, Any]:  # fmt: skip
    """Train one method on one seed and measure it; the result can be written as JSON."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    model, tokenizer = load(model_path, seed)
    drawn = by_length(draw(train, settings.sentences, seed), settings.batch, seed)
    data = list(batches(drawn, tokenizer, settings.batch, settings.max_tokens, drop_last=True))
    few = max(1, min(settings.calibration_steps, len(data)))
    setup = time.thread_time()
    prepared = METHODS[method][1](model, Task(settings, seed, data[:few]))
    setup = time.thread_time() - setup
    found: dict[str, Any] = {}
    held = data[: settings.agreement_batches]
    if method == BASELINE:
        found["agreement_before"] = agreement(prepared.model, held, seed)
    # The same dropout for every method, however much randomness its preparation took.
    torch.manual_seed(seed)
    record = _train(prepared, data, settings)
    if method == BASELINE:
        found["agreement_after"] = agreement(prepared.model, held, seed)
    return {
        "method": method,
        "seed": seed,
        "settings": asdict(settings),
        "environment": environment(),
        **evaluate(prepared.model, tokenizer, dev, settings),
        "parameters": _parameters(prepared.model, prepared),
        "ranks": prepared.ranks(),
        **prepared.facts,
        **found,
        "setup_cpu_seconds": setup,
        "step_cpu_seconds": statistics.median(record["cpu"]),
        "step_wall_seconds": statistics.median(record["wall"]),
        "losses": record["losses"],
        "wall_seconds": time.perf_counter() - started,
    }


def sized(settings: Settings, sentences: int) -> Settings:
    """The same settings for another number of sentences; ``ValueError`` if they make no two batches."""
    changed = replace(settings, sentences=sentences)
    if changed.steps < 2:
        raise ValueError(f"--sentences: expected at least {2 * settings.batch}, got {sentences}")
    return changed
