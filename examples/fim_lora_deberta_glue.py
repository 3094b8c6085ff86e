"""FIM-LoRA on DeBERTa-v3 and GLUE: ranks from the variance of B's gradient over eight backward passes.

    python examples/fim_lora_deberta_glue.py --task sst2
    python examples/fim_lora_deberta_glue.py --model-path deberta-v3-base/ --data-dir glue/     # offline

The total rank stays n r; the floor is 2, because a floor of 1 splits ranks in two camps. What leaves is an ordinary
PEFT adapter with a rank_pattern. Offline data: ``<task>/train.tsv``, ``<task>/dev.tsv`` (or the two files alone), with
the header sentence<TAB>label or as GLUE publishes CoLA (source, label, mark, sentence).
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch

import fastlora
from fastlora.testing import enable_torchvision
from fastlora.training import Cosine


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model-path", default="microsoft/deberta-v3-base", help="name on the Hub, or a folder")
    add("--data-dir", type=Path, help="folder with the GLUE files; without it they come from the Hub")
    add("--out", type=Path, default=Path("fim-lora"), help="folder for the adapter and results.json")
    add("--task", choices=("sst2", "cola"), default="sst2")
    add("--method", choices=("fim", "uniform"), default="fim", help="uniform is the control at the same total rank")
    add("--rank", type=int, default=8)
    add("--floor", type=int, default=2, help="smallest rank")
    add("--passes", type=int, default=8, help="backward passes of calibration")
    add("--centered", action="store_true", help="subtract the squared mean gradient")
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


def load_model(args):
    """The pretrained encoder with adapters on every linear of its blocks; pooler and classifier are trained whole."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(args.model_path, num_labels=2).float()
    heads = [name for name, _ in model.named_children() if name in ("pooler", "classifier")]
    config = fastlora.LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", modules_to_save=heads
    )  # fmt: skip
    return fastlora.inject(model, config).to(args.device), AutoTokenizer.from_pretrained(args.model_path)


def loss_fn(model, batch):
    return model(**batch).loss


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


def train(model, tokenizer, pairs, args):
    steps = args.epochs * -(-len(pairs) // args.batch)
    optimizer = torch.optim.AdamW(fastlora.param_groups(model, lr_lora=args.lr, lr_head=args.lr))
    scheduler = Cosine(optimizer, steps, floor=args.lr / 100, warmup=steps // 16)
    order = random.Random(args.seed)
    for _ in range(args.epochs):
        model.train()
        for batch in batches(tokenizer, pairs, args, order.sample(range(len(pairs)), len(pairs))):
            loss_fn(model, batch).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def show(row):
    cells = {key: f"{v:.4g}" if isinstance(v, float) else str(v) for key, v in row.items() if key != "ranks"}
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:
        print("  ".join(f"{key} {value}" for key, value in cells.items()))
        return
    table = Table(*cells, title="FIM-LoRA")
    table.add_row(*cells.values())
    Console().print(table)


def main(argv=None):
    args = arguments(argv)
    enable_torchvision()
    torch.manual_seed(args.seed)
    model, tokenizer = load_model(args)
    pairs, dev = load_data(args.task, args.data_dir)
    scores = None
    if args.method == "fim":
        shuffled = random.Random(args.seed + 1).sample(pairs, len(pairs))
        scores = fastlora.calibrate(
            model, batches(tokenizer, shuffled, args), loss_fn, steps=args.passes, method="fim", centered=args.centered
        )  # fmt: skip
        fastlora.reallocate(model, scores, r_min=args.floor)
        print(scores.breakdown())
        print("rank correlation with the estimate before, by pass:", *(f"{value:.3f}" for value in scores.convergence))
    train(model, tokenizer, pairs, args)
    total = fastlora.summary(model)
    ranks = {row.key: row.rank for row in total.rows}
    result = {"task": args.task, "method": args.method, **evaluate(model, tokenizer, dev, args)}
    result |= {"total rank": sum(ranks.values()), "adapters": total.adapter_params, "ranks": ranks}
    fastlora.save(model, args.out, importance=scores)
    (args.out / "results.json").write_text(json.dumps(result, indent=1))
    show(result)
    return result


if __name__ == "__main__":
    main()
