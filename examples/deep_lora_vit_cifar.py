"""Hybrid layerwise adaptation of ViT-Small on CIFAR-100: LoRA in the deepest third, norms in the other blocks.

    python examples/deep_lora_vit_cifar.py
    python examples/deep_lora_vit_cifar.py --policy lora_only               # a control with the same floor
    python examples/deep_lora_vit_cifar.py --compare                        # every policy, one table
    python examples/deep_lora_vit_cifar.py --model-path vit/ --data-dir cifar/ --dataset cifar10     # offline

LoRA stands still for the first 400 optimiser steps while norms and head learn; the cosine ends at 1e-5 in every policy,
so that none wins by its floor. ``--model-path``: a folder as timm saves it (config.json, model.safetensors).
``--data-dir``: ``<dataset>_train.npz`` and ``<dataset>_test.npz`` with x [n, height, width, 3] uint8 and y [n].
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F

import fastlora
from fastlora.testing import enable_torchvision
from fastlora.training import Cosine

HUB = {"cifar10": ("uoft-cs/cifar10", "label"), "cifar100": ("uoft-cs/cifar100", "fine_label")}
COMPARED = ("deep_lora", "lora_only", "norm_only", "hybrid_parallel", "bitfit", "head_only")


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="vit_small_patch16_224.augreg_in21k_ft_in1k", help="timm's name, from the Hub")
    add("--model-path", type=Path, help="folder to load instead")
    add("--data-dir", type=Path, help="folder with the images; without it they come from the Hub")
    add("--dataset", choices=HUB, default="cifar100")
    add("--out", type=Path, default=Path("deep-lora"), help="folder for what was trained and results.json")
    add("--policy", choices=COMPARED, default="deep_lora")
    add("--compare", action="store_true", help="run all policies")
    add("--rank", type=int, default=8)
    add("--freeze", type=int, default=400, help="optimiser steps for which LoRA stands still, where others learn")
    add("--floor", type=float, default=1e-5, help="learning rate at the end of the cosine")
    add("--lr-lora", type=float, default=5e-4)
    add("--lr-norm", type=float, default=1e-3)
    add("--lr-head", type=float, default=1e-3)
    add("--epochs", type=int, default=5)
    add("--batch", type=int, default=64)
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def load_split(args, split):
    """Images [n, 3, height, width] uint8 and labels [n]."""
    import numpy

    if args.data_dir is not None:
        with numpy.load(args.data_dir / f"{args.dataset}_{split}.npz") as file:
            x, y = file["x"], file["y"]
    else:
        from datasets import load_dataset

        name, label = HUB[args.dataset]
        data = load_dataset(name, split=split)
        x, y = numpy.stack([numpy.asarray(image) for image in data["img"]]), numpy.asarray(data[label])
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(y).long()


def load_model(args, classes):
    """(model, preprocessing): the pretrained vision transformer with a new head."""
    import timm

    name = f"local-dir:{args.model_path}" if args.model_path else args.model
    model = timm.create_model(name, pretrained=True, num_classes=classes)
    data = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(data[key], device=args.device).view(1, 3, 1, 1) for key in ("mean", "std"))

    def prepare(images, flip):
        x = images.to(args.device).float() / 255
        if flip:
            x = torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)
        x = F.interpolate(x, size=data["input_size"][1:], mode="bicubic", antialias=True).clamp(0, 1)
        return (x - mean) / std

    return model, prepare


def batches(data, prepare, args, shuffle):
    x, y = data
    order = torch.randperm(len(y)) if shuffle else torch.arange(len(y))
    for chosen in order.split(args.batch):
        yield prepare(x[chosen], shuffle), y[chosen].to(args.device)


def train(model, data, prepare, args):
    """Diagnostics of each epoch by parameter group."""
    steps = args.epochs * -(-len(data[1]) // args.batch)
    rates = {"lr_lora": args.lr_lora, "lr_norm": args.lr_norm, "lr_head": args.lr_head}
    optimizer = torch.optim.AdamW(fastlora.param_groups(model, **rates), weight_decay=0.0)
    # Where LoRA is all that is trained beside the head, nothing is gained by its standing still.
    both = {"lora", "norm"} <= {group["name"] for group in optimizer.param_groups}
    scheduler = Cosine(optimizer, steps, floor=args.floor, freeze=args.freeze if both else 0)
    epochs = []
    with fastlora.training.Diagnostics(optimizer) as diagnostics:
        for epoch in range(args.epochs):
            model.train()
            for x, y in batches(data, prepare, args, shuffle=True):
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            epochs.append(diagnostics.epoch())
            for name, found in epochs[-1].items():
                print(f"epoch {epoch} {name}: gradient {found.gradient_norm:.3g}, update {found.update_norm:.3g}, "
                      f"cosine {found.cosine:.2f} over {found.steps} steps")  # fmt: skip
    return [{name: found._asdict() for name, found in epoch.items()} for epoch in epochs]


def save(model, folder):
    """PEFT's files where there are adapters, else the trained parameters alone."""
    if fastlora.summary(model).adapter_params:
        fastlora.save(model, folder)
        return
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    trained = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if p.requires_grad}
    save_file(trained, folder / "trained.safetensors")


@torch.no_grad()
def accuracy(model, data, prepare, args):
    model.eval()
    hits = [(model(x).argmax(1) == y).double() for x, y in batches(data, prepare, args, shuffle=False)]
    return float(torch.cat(hits).mean())


def run(args, training, test):
    torch.manual_seed(args.seed)
    classes = int(max(training[1].max(), test[1].max())) + 1
    model, prepare = load_model(args, classes)
    config = fastlora.LoraConfig(r=args.rank, lora_alpha=2 * args.rank)
    model = fastlora.apply_policy(model, args.policy, config).to(args.device)
    total = fastlora.summary(model)
    counts = {"adapters": total.adapter_params, "norms": total.norm_params, "head": total.head_params}
    epochs = train(model, training, prepare, args)
    save(model, args.out / args.policy)
    reached = accuracy(model, test, prepare, args)
    return {"policy": args.policy, "accuracy": reached, **counts, "biases": total.bias_params, "epochs": epochs}


def show(rows):
    names = [name for name in rows[0] if name != "epochs"]
    cells = [[f"{row[n]:.4g}" if isinstance(row[n], float) else f"{row[n]}" for n in names] for row in rows]
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:
        print("\n".join("  ".join(row) for row in [names, *cells]))
        return
    table = Table(*names, title="Layerwise policies")
    for row in cells:
        table.add_row(*row)
    Console().print(table)


def main(argv=None):
    args = arguments(argv)
    enable_torchvision()
    training, test = load_split(args, "train"), load_split(args, "test")
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for policy in COMPARED if args.compare else (args.policy,):
        rows.append(run(argparse.Namespace(**{**vars(args), "policy": policy}), training, test))
        (args.out / "results.json").write_text(json.dumps(rows, indent=1))
    show(rows)
    return rows


if __name__ == "__main__":
    main()
