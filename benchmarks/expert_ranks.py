"""Whether ranks follow the experts that matter: a small mixture of experts trained on text, then adapted.

    python -m benchmarks.expert_ranks --data-dir DATA --out benchmarks/results

A model with 8 experts a layer, 2 a token and no balancing loss, learns the negative sentences of SST-2 byte by byte;
then adapters on its experts learn the positive ones, with one budget: a uniform rank, ranks by the experts' load, and
ranks by their ``grad_sq``. The loss is per byte on positive sentences of the development set.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastlora
from fastlora.importance.scores import Scores
from fastlora.testing import enable_torchvision

from .experiment.data import find
from .harness import result_files
from .harness.machine import cpu_name

WIDTH, EXPERTS, ACTIVE, LAYERS, LENGTH, BATCH = 96, 8, 2, 2, 64, 8
PRETRAIN, ADAPT, RANK, LARGEST, SEEDS = 300, 80, 4, 16, 3
METHODS = ("uniform", "load", "grad_sq")


def model() -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=256, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=4, num_local_experts=EXPERTS, num_experts_per_tok=ACTIVE, pad_token_id=0,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def as_bytes(texts: list[str]) -> Tensor:
    """The texts one after another, a byte a token: [windows, LENGTH]."""
    stream = torch.tensor(list("\n".join(texts).encode()), dtype=torch.int64)
    return stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)


def loss_of(m: nn.Module, windows: Tensor) -> Tensor:
    logits = m(input_ids=windows).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def train(m: nn.Module, windows: Tensor, steps: int, lr: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        loss_of(m, windows[torch.randint(len(windows), (BATCH,), generator=generator)]).backward()
        optimizer.step()


@torch.no_grad()
def evaluated(m: nn.Module, windows: Tensor) -> float:
    return statistics.mean(float(loss_of(m, part)) for part in windows[:256].split(BATCH))


def loads(m: nn.Module, batches: list[Tensor]) -> dict[str, float]:
    """The share of a layer's routes that each expert has, for each of its matrices."""
    counts = {n: torch.zeros(EXPERTS) for n, _ in m.named_modules() if n.endswith(".experts")}

    def counting(name: str) -> Any:
        def hook(_: nn.Module, args: Any) -> None:
            counts[name] += args[1].flatten().bincount(minlength=EXPERTS)

        return m.get_submodule(name).register_forward_pre_hook(hook)

    hooks = [counting(name) for name in counts]
    with torch.no_grad():
        for windows in batches:
            m(input_ids=windows)
    for hook in hooks:
        hook.remove()
    return {
        f"{name}.{leaf}[{e}]": float(c / count.sum())
        for name, count in counts.items()
        for leaf in ("gate_up_proj", "down_proj")
        for e, c in enumerate(count)
    }


def run(folder: Path) -> dict[str, Any]:
    """Everything, as the document of a result file."""
    train_set, dev = find(folder)
    text = {y: as_bytes([t for t, own in zip(*train_set, strict=True) if own == y][:8000]) for y in (0, 1)}
    held = as_bytes([t for t, y in zip(*dev, strict=True) if y == 1])
    base = model()
    train(base, text[0], PRETRAIN, 3e-3, 0)
    before = evaluated(base, held)
    config = fastlora.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="experts")
    rows, adapted = [], fastlora.inject(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(1)
    batches = [text[1][torch.randint(len(text[1]), (BATCH,), generator=generator)] for _ in range(16)]
    load = loads(adapted, batches)
    score = fastlora.calibrate(adapted, batches, loss_of, steps=16, method="fw", progress=False)
    budget = RANK * len(load)
    ranks = {"uniform": dict.fromkeys(load, RANK)}
    for name, weights in (("load", load), ("grad_sq", dict(score))):
        ranks[name] = fastlora.allocate(weights, budget, r_min=0, r_max=LARGEST, shares="raw", power=0.5)
    for name in METHODS:
        losses = []
        for seed in range(SEEDS):
            torch.manual_seed(seed)
            m = fastlora.set_ranks(fastlora.inject(copy.deepcopy(base), config), ranks[name])
            train(m, text[1], ADAPT, 3e-3, seed)
            losses.append(evaluated(m, held))
        rows.append({"variant": name, "loss": losses, "ranks": ranks[name]})
    as_scores = {name: Scores(r, "rank") for name, r in (*ranks.items(), ("loads", load), ("scores", dict(score)))}
    agree = {
        f"{a}, {b}": as_scores[a].rank_correlation(as_scores[b]) for a, b in (("scores", "loads"), ("grad_sq", "loads"))
    }
    machine = {"cpu": cpu_name(), "torch": torch.__version__, "fastlora": fastlora.__version__}
    return {"title": "Ranks of experts", "environment": machine, "budget": budget, "before": before, "load": load,
            "grad_sq": dict(score), "spearman": agree, "results": rows}  # fmt: skip


def markdown(document: dict[str, Any]) -> str:
    results, before = {row["variant"]: row for row in document["results"]}, document["before"]
    lines = [
        "# Ranks of experts", "", *(" ".join(__doc__.split("\n\n")[2].split()),), "",
        f"{document['budget']} ranks in all, {SEEDS} seeds; before adaptation {before:.4f}.", "",
        "| ranks by | loss, mean | less than uniform, paired: mean [least, most] | smallest and largest rank |",
        "|---|---:|---:|---:|",
    ]  # fmt: skip
    for name, row in results.items():
        gains = [u - x for u, x in zip(results["uniform"]["loss"], row["loss"], strict=True)]
        spread = f"{statistics.mean(gains):.4f} [{min(gains):.4f}, {max(gains):.4f}]" if name != "uniform" else ""
        ranks = row["ranks"].values()
        lines.append(f"| {name} | {statistics.mean(row['loss']):.4f} | {spread} | {min(ranks)}, {max(ranks)} |")
    loads_of = document["load"].values()
    loads_of, agree = document["load"].values(), document["spearman"]
    lines += [
        "",
        f"Loads are {min(loads_of):.3f} to {max(loads_of):.3f} of a layer's routes. Spearman's correlation over the "
        f"{len(loads_of)} matrices:",
        f"grad_sq and load {agree['scores, loads']:.2f}, ranks by grad_sq and load {agree['grad_sq, loads']:.2f}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with SST-2 (train.tsv, dev.tsv)")
    parser.add_argument("--out", type=Path, required=True, help="folder for expert_ranks.json and expert_ranks.md")
    options = parser.parse_args()
    enable_torchvision()
    torch.set_num_threads(1)
    document = run(options.data_dir)
    result_files.write(options.out / "expert_ranks.json", document)
    (options.out / "expert_ranks.md").write_text(markdown(document), encoding="utf-8")
    print(markdown(document))


if __name__ == "__main__":
    main()
