"""FC-LoRA on DeiT and CIFAR: 100 ranks among the query, key and value projections, by composite importance.

    python examples/fc_lora_deit_cifar.py                                   # DeiT-Base and CIFAR-100 from the Hub
    python examples/fc_lora_deit_cifar.py --method fc_original              # the published allocator: overspends
    python examples/fc_lora_deit_cifar.py --model-path deit/ --data-dir cifar/ --dataset cifar10     # offline

``--model-path``: a folder as timm saves it (config.json, model.safetensors). ``--data-dir``: ``<dataset>_train.npz``
and ``<dataset>_test.npz`` with x [n, height, width, 3] uint8 and y [n]. A tenth of the training images is kept apart to
fit the temperature.
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


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="deit_base_patch16_224.fb_in1k", help="timm's name, from the Hub")
    add("--model-path", type=Path, help="folder to load instead")
    add("--data-dir", type=Path, help="folder with the images; without it they come from the Hub")
    add("--dataset", choices=HUB, default="cifar100")
    add("--out", type=Path, default=Path("fc-lora"), help="folder for the adapter and results.json")
    add("--method", choices=("fc", "fc_original", "uniform"), default="fc")
    add("--budget", type=int, default=100, help="total rank of all matrices")
    add("--r-min", type=int, default=1)
    add("--r-max", type=int, default=16)
    add("--alpha", type=float, default=16, help="the scale is alpha / r_max for every matrix")
    add("--passes", type=int, default=8, help="backward passes of calibration")
    add("--epochs", type=int, default=5)
    add("--batch", type=int, default=64)
    add("--lr", type=float, default=5e-4)
    add("--lr-head", type=float, default=1e-3)
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


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def adapt(model, calibration, args):
    """Adapters with ranks by importance; returns the scores, or None for uniform ranks."""
    config = fastlora.LoraConfig(r=args.r_max, lora_alpha=args.alpha, target_modules="qkv", modules_to_save=["head"])
    fastlora.inject(model, config)
    bounds = {"budget": args.budget, "r_min": args.r_min, "r_max": args.r_max}
    if args.method == "uniform":
        keys = [row.key for row in fastlora.summary(model).rows]
        fastlora.set_ranks(model, fastlora.allocate(dict.fromkeys(keys, 1.0), **bounds))
        return None
    scores = fastlora.calibrate(model, calibration, loss_fn, steps=args.passes, method=args.method)
    rule = "fc_original" if args.method == "fc_original" else "webster"
    fastlora.set_ranks(model, fastlora.allocate(scores, rule=rule, **bounds))
    print(fastlora.Scores({row.key: row.rank for row in fastlora.summary(model).rows}, kind="rank").breakdown())
    return scores


@torch.no_grad()
def predict(model, data, prepare, args):
    model.eval()
    return torch.cat([model(x).double().cpu() for x, _ in batches(data, prepare, args, shuffle=False)])


def train(model, data, prepare, args):
    steps = args.epochs * -(-len(data[1]) // args.batch)
    groups = fastlora.param_groups(model, lr_lora=args.lr, lr_head=args.lr_head, weight_decay=0.01)
    optimizer = torch.optim.AdamW(groups)
    scheduler = Cosine(optimizer, steps, floor=args.lr / 100, warmup=steps // 20)
    for _ in range(args.epochs):
        model.train()
        for batch in batches(data, prepare, args, shuffle=True):
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
    table = Table(*cells, title="FC-LoRA")
    table.add_row(*cells.values())
    Console().print(table)


def main(argv=None):
    args = arguments(argv)
    enable_torchvision()
    torch.manual_seed(args.seed)
    (x, y), test = load_split(args, "train"), load_split(args, "test")
    classes = int(max(y.max(), test[1].max())) + 1
    apart, kept = torch.randperm(len(y)).split([len(y) // 10, len(y) - len(y) // 10])
    training, validation = (x[kept], y[kept]), (x[apart], y[apart])
    model, prepare = load_model(args, classes)
    model.to(args.device)
    scores = adapt(model, batches(training, prepare, args, shuffle=True), args)
    train(model, training, prepare, args)
    temperature = fastlora.training.fit_temperature(predict(model, validation, prepare, args), validation[1])
    logits, total = predict(model, test, prepare, args), fastlora.summary(model)
    result = {"method": args.method, "accuracy": float((logits.argmax(1) == test[1]).double().mean())}
    result |= {"ECE": fastlora.training.ece(logits, test[1]), "temperature": temperature}
    result |= {"ECE after": fastlora.training.ece(logits, test[1], temperature=temperature)}
    result |= {"adapters": total.adapter_params, "head": total.head_params}
    result["ranks"] = {row.key: row.rank for row in total.rows}
    fastlora.save(model, args.out, importance=scores)
    (args.out / "results.json").write_text(json.dumps(result, indent=1))
    show(result)
    return result


if __name__ == "__main__":
    main()
