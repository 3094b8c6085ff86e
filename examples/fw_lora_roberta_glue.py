"""FW-LoRA on RoBERTa and GLUE: importance by probes for K steps, then a penalty where importance is low.

    python examples/fw_lora_roberta_glue.py --task sst2
    python examples/fw_lora_roberta_glue.py --ablate                      # K, lambda, budgets, forms; SST-2 and CoLA
    python examples/fw_lora_roberta_glue.py --model-path roberta-base/ --data-dir glue/     # offline

Offline data: ``<task>/train.tsv`` and ``<task>/dev.tsv`` (or the two files alone), with the header sentence<TAB>label
or as GLUE publishes CoLA (source, label, mark, sentence). CoLA is judged by Matthews' correlation, SST-2 by accuracy.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch

import fastlora
from fastlora.testing import enable_torchvision
from fastlora.training import Cosine

ABLATION = {
    "warmup": (300, 500, 800),
    "weight": (0.0, 1e-5, 1e-4, 1e-3, 1e-2),
    "budget": (0.1, 0.2, 0.5),
    "normalize": ("sum", "relative", "uniform"),
}


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model-path", default="FacebookAI/roberta-base", help="name on the Hub, or a folder")
    add("--data-dir", type=Path, help="folder with the GLUE files; without it they come from the Hub")
    add("--out", type=Path, default=Path("fw-lora"), help="folder for adapters and results.json")
    add("--task", choices=("sst2", "cola"), default="sst2")
    add("--ablate", action="store_true", help="one factor at a time around the other arguments, on both tasks")
    add("--budget", type=float, default=0.2, help="adapter parameters, %% of the model's")
    add("--targets", nargs="+", default=["query", "key", "value"], help="suffixes of what is adapted")
    add("--warmup", type=int, default=500, help="K: steps until importance is frozen")
    add("--weight", type=float, default=1e-4, help="weight of the penalty; 0 is plain LoRA")
    add("--normalize", choices=("sum", "relative", "uniform"), default="sum", help="uniform is the control")
    add("--form", choices=("delta", "decay"), default="delta")
    add("--epochs", type=int, default=3)
    add("--batch", type=int, default=32)
    add("--lr", type=float, default=5e-4)
    add("--max-tokens", type=int, default=128)
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def read_tsv(path):
    rows = [line.rstrip("\n").split("\t") for line in path.open(encoding="utf-8")]
    if "sentence" in rows[0] and "label" in rows[0]:
        text, label = rows[0].index("sentence"), rows[0].index("label")
        return [(row[text], int(row[label])) for row in rows[1:]]
    return [(row[3], int(row[1])) for row in rows]


def load_data(task, folder):
    """(train, dev): lists of (sentence, label)."""
    if folder is not None:
        base = folder / task if (folder / task).is_dir() else folder
        return read_tsv(base / "train.tsv"), read_tsv(base / "dev.tsv")
    from datasets import load_dataset

    glue = load_dataset("nyu-mll/glue", task)
    return tuple(list(zip(glue[s]["sentence"], glue[s]["label"], strict=True)) for s in ("train", "validation"))


def batches(tokenizer, pairs, args, order=None):
    pairs = pairs if order is None else [pairs[i] for i in order]
    limits = {"padding": True, "truncation": True, "max_length": args.max_tokens, "return_tensors": "pt"}
    for start in range(0, len(pairs), args.batch):
        chosen = pairs[start : start + args.batch]
        tokens = tokenizer([text for text, _ in chosen], **limits)
        tokens["labels"] = torch.tensor([label for _, label in chosen])
        yield {name: tensor.to(args.device) for name, tensor in tokens.items()}


def inject(model, args):
    """Adapters of about equal rank that cost ``budget`` percent of the model's parameters."""
    config = fastlora.LoraConfig(r=8, lora_alpha=16, target_modules=args.targets, modules_to_save=["classifier"])
    total = sum(p.numel() for p in model.parameters())
    fastlora.inject(model, config)
    costs = fastlora.summary(model).costs
    ranks = fastlora.allocate(
        dict.fromkeys(costs, 1.0), budget=int(args.budget / 100 * total), r_max=64, unit="params", costs=costs
    )  # fmt: skip
    return fastlora.set_ranks(model, ranks)


@torch.no_grad()
def evaluate(model, tokenizer, pairs, args):
    """Accuracy and Matthews' correlation."""
    model.eval()
    hits = torch.zeros(2, 2, dtype=torch.float64)  # [label, prediction]
    for batch in batches(tokenizer, pairs, args):
        labels = batch.pop("labels")
        for label, predicted in zip(labels.tolist(), model(**batch).logits.argmax(1).tolist(), strict=True):
            hits[label, predicted] += 1
    (tn, fp), (fn, tp) = hits.tolist()
    spread = ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    return {"accuracy": (tp + tn) / len(pairs), "matthews": (tp * tn - fp * fn) / spread if spread else 0.0}


def train(args):
    """One run; returns its row of results."""
    enable_torchvision()
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model_path)
    model = AutoModelForSequenceClassification.from_pretrained(args.model_path, num_labels=2)
    model = inject(model.float(), args).to(args.device)
    pairs, dev = load_data(args.task, args.data_dir)
    steps = args.epochs * -(-len(pairs) // args.batch)
    if args.weight and args.warmup >= steps:
        raise SystemExit(f"--warmup: {args.warmup} leaves nothing of {steps} steps to the penalty")
    optimizer = torch.optim.AdamW(fastlora.param_groups(model, lr_lora=args.lr, lr_head=args.lr))
    scheduler = Cosine(optimizer, steps, floor=args.lr / 100, warmup=steps // 16)
    order, start = random.Random(args.seed), time.perf_counter()
    with fastlora.track(model, warmup=args.warmup, seed=args.seed) as tracker:
        for _ in range(args.epochs):
            model.train()
            for batch in batches(tokenizer, pairs, args, order.sample(range(len(pairs)), len(pairs))):
                model(**batch).loss.backward()
                if args.weight:
                    tracker.apply_penalty(args.weight, form=args.form, normalize=args.normalize)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                tracker.step()
        importance = tracker.scores("grad_sq")
    seconds, total = time.perf_counter() - start, fastlora.summary(model)
    name = "-".join(str(getattr(args, key)) for key in ("task", *ABLATION))
    fastlora.save(model, args.out / name, importance=importance)
    settings = {key: getattr(args, key) for key in ("task", *ABLATION)}
    adapters = {"adapters": total.adapter_params, "share %": 100 * total.adapter_params / total.total_params}
    return {**settings, **evaluate(model, tokenizer, dev, args), **adapters, "s / step": seconds / steps}


def ablation(args):
    """Arguments of every run: the given ones, then one factor changed at a time, for both tasks."""
    for task in ("sst2", "cola"):
        base = {**vars(args), "task": task}
        runs = [base, *({**base, key: value} for key, values in ABLATION.items() for value in values)]
        yield from (argparse.Namespace(**run) for i, run in enumerate(runs) if run not in runs[:i])


def show(rows):
    cells = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:
        print("\n".join("  ".join(row) for row in [list(rows[0]), *cells]))
        return
    table = Table(*rows[0], title="FW-LoRA")
    for row in cells:
        table.add_row(*row)
    # Ten columns do not fit into the 80 that a file or a pipe is given.
    Console(width=max(Console().width, 120)).print(table)


def main(argv=None):
    args = arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for run in ablation(args) if args.ablate else [args]:
        rows.append(train(run))
        (args.out / "results.json").write_text(json.dumps(rows, indent=1))
    show(rows)
    return rows


if __name__ == "__main__":
    main()
