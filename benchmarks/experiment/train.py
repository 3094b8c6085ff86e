"""One run: one setting at one rate on one seed, from the pretrained model to numbers."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.training.schedule import Cosine

from . import plan, runs
from .data import Batch, Sentences, batches, by_length, draw, lengths_of
from .methods import PREPARE, Prepared, Task, loss_fn
from .settings import HEAD, Settings
from .splits import Splits


class Job(NamedTuple):
    """What to train and what to measure it on: ``phase`` is ``"tuning"`` or ``"final"``."""

    data: str
    phase: str
    setting: str
    rate: float
    penalty: float
    seed: int


def load(model_path: str, seed: int) -> tuple[Any, Any]:
    """(model, tokenizer): the pretrained encoder under a new classifier, the same for every setting of a seed."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    # Each load would report that the classifier is new.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=2)
    return model.float(), AutoTokenizer.from_pretrained(model_path)


def shortest_first(sentences: Sentences, tokenizer: Any, settings: Settings) -> Sentences:
    """So that a batch has little padding: the order in which predictions are kept."""
    rows = sorted(zip(lengths_of(sentences, tokenizer, settings.max_tokens), *sentences, strict=True))
    return Sentences([text for _, text, _ in rows], [label for _, _, label in rows])


@torch.inference_mode()
def _logits(model: Any, data: Iterable[Batch]) -> Tensor:
    model.eval()
    return torch.cat([model(**{k: v for k, v in batch.items() if k != "labels"}).logits for batch in data])


def predict(model: Any, tokenizer: Any, sentences: Sentences, settings: Settings) -> list[int]:
    """The class of each sentence, 0 where logits are not numbers."""
    data = batches(sentences, tokenizer, 32, settings.max_tokens, drop_last=False)
    return _logits(model, data).argmax(1).tolist()


def without(model: Any, base: Any, names: Iterable[str], data: list[Batch]) -> dict[str, float]:
    """Mean loss of a merged model with each named weight back as it is in ``base``, one at a time; "" with none."""
    labels = torch.cat([batch["labels"] for batch in data])

    def loss() -> float:
        return float(torch.nn.functional.cross_entropy(_logits(model, data).float(), labels))

    found = {"": loss()}
    for name in names:
        weight = model.get_submodule(name).weight
        trained = weight.detach().clone()
        with torch.no_grad():
            weight.copy_(base.get_submodule(name).weight)
            found[name] = loss()
            weight.copy_(trained)
    return found


def score(data: str, predicted: list[int], labels: list[int]) -> float:
    """Accuracy on SST-2, Matthews correlation on CoLA (0 where one class alone is predicted)."""
    pairs = list(zip(predicted, labels, strict=True))
    if data == "sst2":
        return sum(p == y for p, y in pairs) / len(pairs)
    count = {cell: pairs.count(cell) for cell in ((1, 1), (1, 0), (0, 1), (0, 0))}
    scale = math.prod(count[a] + count[b] for a, b in (
        ((1, 1), (1, 0)), ((1, 1), (0, 1)), ((0, 0), (1, 0)), ((0, 0), (0, 1))
    ))  # fmt: skip
    product = count[1, 1] * count[0, 0] - count[1, 0] * count[0, 1]
    return product / math.sqrt(scale) if scale else 0.0


def _train(prepared: Prepared, data: list[Any], settings: Settings) -> dict[str, list[float]]:
    """Losses and CPU seconds of each step; it ends where a loss is not a number, which is then the last."""

    def begin(step: int) -> tuple[Any, Any, list[Any]]:
        groups = prepared.groups()
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        scheduler = Cosine(optimizer, settings.steps, floor=settings.lr_floor, warmup=settings.tenth)
        for _ in range(step):
            scheduler.step()
        return optimizer, scheduler, [p for group in groups for p in group["params"]]

    optimizer, scheduler, trained = begin(0)
    prepared.model.train()
    record: dict[str, list[float]] = {"losses": [], "cpu": []}
    for step, batch in enumerate(data):
        cpu = time.thread_time()
        loss = loss_fn(prepared.model, batch)
        record["losses"].append(float(loss.detach()))
        if not math.isfinite(record["losses"][-1]):
            break
        loss.backward()
        prepared.after_backward(step)
        torch.nn.utils.clip_grad_norm_(trained, settings.clip)
        optimizer.step()
        scheduler.step()
        if prepared.after_step(step):
            optimizer, scheduler, trained = begin(step + 1)
        prepared.model.zero_grad()
        record["cpu"].append(time.thread_time() - cpu)
    return record


def _parameters(model: Any) -> dict[str, int]:
    """Trained parameters: adapters, head, anything else."""
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    adapters = sum(count for name, count in trained.items() if ".lora_" in name)
    head = sum(count for name, count in trained.items() if HEAD in name)
    return {"adapters": adapters, "head": head, "other": sum(trained.values()) - adapters - head}


def _measure(job: Job, model: Any, tokenizer: Any, splits: Splits, settings: Settings) -> Iterator[tuple[str, Any]]:
    """Scores of the job's phase, in bf16; with those of the first seed what fp32 would have said on dev."""
    if job.phase == "tuning":
        sentences = shortest_first(splits.tuning, tokenizer, settings)
        yield "tuning", score(job.data, predict(model.bfloat16(), tokenizer, sentences, settings), sentences.labels)
        return
    dev, evaluation = (shortest_first(part, tokenizer, settings) for part in (splits.dev, splits.evaluation))
    fp32 = predict(model, tokenizer, dev, settings) if job.seed == plan.SEEDS[0] else None
    model = model.bfloat16()
    on_dev, predicted = (predict(model, tokenizer, part, settings) for part in (dev, evaluation))
    yield "dev", score(job.data, on_dev, dev.labels)
    if fp32 is not None:
        yield "dev_fp32", score(job.data, fp32, dev.labels)
        yield "dev_changed", sum(a != b for a, b in zip(fp32, on_dev, strict=True))
    # CoLA has few sentences: it is tested on both.
    with_dev = job.data == "cola"
    yield "score", score(job.data, predicted + on_dev * with_dev, evaluation.labels + dev.labels * with_dev)
    yield "dev_predictions", runs.packed(on_dev)
    yield "predictions", runs.packed(predicted)


def run(job: Job, settings: Settings, model_path: str, splits: Splits) -> dict[str, Any]:
    """Train and measure; the result can be written as JSON."""
    torch.set_num_threads(1)
    model, tokenizer = load(model_path, job.seed)
    drawn = draw(splits.train, settings.sentences, job.seed)
    drawn = by_length(drawn, lengths_of(drawn, tokenizer, settings.max_tokens), settings.batch, job.seed)
    data = list(batches(drawn, tokenizer, settings.batch, settings.max_tokens, drop_last=True))
    few = max(1, min(settings.calibration_steps, len(data)))
    setup = time.thread_time()
    task = Task(settings, job.seed, job.rate, job.penalty, data[:few])
    prepared = PREPARE[job.setting](model, task)
    setup = time.thread_time() - setup
    parameters = _parameters(prepared.model)
    # The same dropout for every setting, however much randomness its preparation took.
    torch.manual_seed(job.seed)
    record = _train(prepared, data, settings)
    diverged = not math.isfinite(record["losses"][-1])
    ranks = prepared.ranks()
    trained = prepared.merged() if prepared.merged is not None and not diverged else prepared.model
    measured = dict(_measure(job, trained, tokenizer, splits, settings))
    if job[:3] == ("sst2", "final", plan.BASELINE) and job.seed in plan.WITHOUT_SEEDS and not diverged:
        few = Sentences(
            *(part[:: plan.WITHOUT_EVERY] for part in shortest_first(splits.evaluation, tokenizer, settings))
        )
        held_out = list(batches(few, tokenizer, settings.batch, settings.max_tokens, drop_last=False))
        measured["without"] = without(trained, load(model_path, job.seed)[0], ranks, held_out)
    return {
        **job._asdict(),
        "settings": asdict(settings),
        "environment": runs.environment(),
        **measured,
        "diverged": diverged,
        "parameters": parameters,
        "ranks": ranks,
        **prepared.facts,
        "setup_cpu_seconds": round(setup, 3),
        "step_cpu_seconds": round(statistics.fmean(record["cpu"]), 4) if record["cpu"] else None,
        "training_cpu_seconds": round(sum(record["cpu"]), 2),
        "losses": [round(loss, 4) if math.isfinite(loss) else None for loss in record["losses"]],
    }
