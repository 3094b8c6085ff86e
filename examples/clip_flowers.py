"""CLIP's image tower on Oxford Flowers-102: adapters on in_proj, out_proj, c_fc and c_proj, or biases alone.

    python examples/clip_flowers.py                                         # open_clip ViT-B/32, torchvision's flowers
    python examples/clip_flowers.py --difficulty complex                    # r 32, alpha 64
    python examples/clip_flowers.py --method bitfit                         # the reference: biases only
    python examples/clip_flowers.py --model-path clip/ --data-dir flowers/  # offline

``--model-path``: a folder that open_clip reads as ``local-dir:`` (open_clip_config.json and weights). ``--data-dir``:
``train/<class>/*.jpg`` and ``test/<class>/*.jpg``. The head starts from the text tower's embedding of each class name.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import fastlora
from fastlora.testing import enable_torchvision
from fastlora.training import Cosine

PROMPT = "a photo of a {}, a type of flower."


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="ViT-B-32", help="open_clip's name")
    add("--pretrained", default="openai", help="open_clip's tag of the weights")
    add("--model-path", type=Path, help="folder to load instead of the two")
    add("--data-dir", type=Path, help="folder with the images; without it torchvision downloads them")
    add("--out", type=Path, default=Path("clip-flowers"), help="folder for what was trained and results.json")
    add("--method", choices=("lora", "bitfit", "head"), default="lora")
    add("--difficulty", choices=("simple", "medium", "complex", "very_complex"), default="medium", help="rank, alpha")
    add("--lr-lora", type=float, default=2e-4)
    add("--lr-bias", type=float, default=1e-3)
    add("--lr-head", type=float, default=1e-3)
    add("--epochs", type=int, default=10)
    add("--batch", type=int, default=32)
    add("--workers", type=int, default=2)
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def load_data(args, transforms):
    """(train, test, class names); torchvision's train and validation images of the flowers are trained on."""
    from torchvision import datasets

    if args.data_dir is not None:
        train = datasets.ImageFolder(args.data_dir / "train", transforms[0])
        test = datasets.ImageFolder(args.data_dir / "test", transforms[1])
        if train.classes != test.classes:
            raise SystemExit(f"--data-dir: train has the classes {train.classes}, test {test.classes}")
        return train, test, train.classes
    flowers, root = datasets.Flowers102, Path.home() / ".cache" / "flowers"
    parts = [flowers(root, split, transforms[0], download=True) for split in ("train", "val")]
    return torch.utils.data.ConcatDataset(parts), flowers(root, "test", transforms[1]), flowers.classes


class Classifier(nn.Module):
    """CLIP's image tower and a linear head on its normalized embedding; logits [n, classes]."""

    def __init__(self, visual, embeddings, scale):
        super().__init__()
        self.visual, self.scale = visual, scale
        self.head = nn.Linear(embeddings.shape[1], len(embeddings))
        with torch.no_grad():
            self.head.weight.copy_(embeddings)
            self.head.bias.zero_()

    def forward(self, images):
        return self.scale * self.head(F.normalize(self.visual(images), dim=-1))


@torch.no_grad()
def class_embeddings(clip, tokenizer, names):
    return F.normalize(clip.encode_text(tokenizer([PROMPT.format(name.replace("_", " ")) for name in names])), dim=-1)


def load_clip(args):
    """(model, training transform, evaluation transform, tokenizer)."""
    import open_clip

    name = f"local-dir:{args.model_path}" if args.model_path else args.model
    weights = None if args.model_path else args.pretrained
    clip, *transforms = open_clip.create_model_and_transforms(name, pretrained=weights)
    return clip.float(), transforms, open_clip.get_tokenizer(name)


def adapt(model, args):
    """What is trained, by name of the method; everything else is frozen."""
    config = fastlora.LoraConfig.preset(args.difficulty, modules_to_save=["head"])
    if args.method == "lora":
        return fastlora.inject(model, config)
    return fastlora.apply_policy(model, {"bitfit": "bitfit", "head": "head_only"}[args.method], config)


def check(model, batch, args):
    """The check list: what is covered, what is trained, and that every adapter gets a gradient."""
    total = fastlora.summary(model)
    print(f"adapted modules: {total.modules_by_role}")
    trained = total.adapter_params + total.head_params + total.other_trainable
    print(f"trained: {trained:,} of {total.total_params:,} ({trained / total.total_params:.2%})")
    F.cross_entropy(model(batch[0].to(args.device)), batch[1].to(args.device)).backward()
    lost = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    touched = [n for n, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
    if lost or touched:
        raise SystemExit(f"no gradient reaches {lost}; frozen ones with a gradient: {touched}")
    model.zero_grad()


def train(model, loader, args):
    steps = args.epochs * len(loader)
    groups = fastlora.param_groups(model, lr_lora=args.lr_lora, lr_head=args.lr_head, lr_bias=args.lr_bias)
    optimizer = torch.optim.AdamW(groups)
    scheduler = Cosine(optimizer, steps, floor=1e-6, warmup=steps // 20)
    for _ in range(args.epochs):
        model.train()
        for x, y in loader:
            F.cross_entropy(model(x.to(args.device)), y.to(args.device)).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


@torch.no_grad()
def accuracy(model, loader, args):
    model.eval()
    return float(torch.cat([(model(x.to(args.device)).argmax(1).cpu() == y).double() for x, y in loader]).mean())


def save(model, folder):
    """PEFT's files where there are adapters, else the trained parameters alone."""
    if fastlora.summary(model).adapter_params:
        fastlora.save(model, folder)
        return
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    trained = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if p.requires_grad}
    save_file(trained, folder / "trained.safetensors")


def show(row):
    cells = {key: f"{v:.4g}" if isinstance(v, float) else str(v) for key, v in row.items()}
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:
        print("  ".join(f"{key} {value}" for key, value in cells.items()))
        return
    table = Table(*cells, title="CLIP on flowers")
    table.add_row(*cells.values())
    Console().print(table)


def main(argv=None):
    args = arguments(argv)
    enable_torchvision()
    torch.manual_seed(args.seed)
    clip, transforms, tokenizer = load_clip(args)
    training, test, names = load_data(args, transforms)
    clip.eval()
    model = Classifier(clip.visual, class_embeddings(clip, tokenizer, names), clip.logit_scale.exp().item())
    loading = {"batch_size": args.batch, "num_workers": args.workers}
    loader = torch.utils.data.DataLoader(training, shuffle=True, **loading)
    tests = torch.utils.data.DataLoader(test, **loading)
    zero_shot = accuracy(model.to(args.device), tests, args)
    adapt(model, args).to(args.device)
    check(model, next(iter(loader)), args)
    train(model, loader, args)
    total = fastlora.summary(model)
    result = {"method": args.method, "zero-shot": zero_shot, "accuracy": accuracy(model, tests, args)}
    result |= {"adapters": total.adapter_params, "biases": total.bias_params, "head": total.head_params}
    save(model, args.out)
    (args.out / "results.json").write_text(json.dumps(result, indent=1))
    show(result)
    return result


if __name__ == "__main__":
    main()
