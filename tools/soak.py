"""Thousands of training steps in one process, and what they leave behind: ``python tools/soak.py --out RESULT.json``.

Mixed batches with tracking, adapters added and removed, ranks changed, trackers closed and opened, adapters saved and
loaded, copies made. At the end of every cycle the live tensors, the live hooks and the resident memory are counted;
they do not grow. ``tests/repo/test_soak.py`` runs a few cycles.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import result_file
import torch
from small_model import adapted, batch, machine, plain
from torch import nn

import fastlora

CYCLE = 50  # steps


def resident() -> int:
    """Bytes of resident memory after the allocator gave back what it could."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def counted(model: nn.Module) -> dict[str, int]:
    """Live tensors, autograd nodes among them none, and hooks of the model."""
    gc.collect()
    tensors = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())
    return {"tensors": tensors, "hooks": hooks, "resident": resident()}


class Soak:
    """One model through all of it; ``cycle`` ends in the state in which it began."""

    def __init__(self, folder: Path):
        self.model, self.folder, self.number = adapted(), folder, 0
        self.tracker = fastlora.track(self.model, statistics=("grad_sq", "act_var"), every=1)

    def cycle(self) -> dict[str, int]:
        name, model = f"extra{self.number}", self.model
        fastlora.add_adapter(model, name, fastlora.LoraConfig(r=3, target_modules=["proj"], init_lora_weights=False))
        optimizer = torch.optim.AdamW(fastlora.param_groups(model, lr_lora=1e-3))
        handle = fastlora.freeze_unused_adapters(model, optimizer)
        second = fastlora.track(model, estimator="exact", adapter=name)
        newest = len(fastlora.adapter_names(model)) - 1
        for step in range(CYCLE):
            self.step(optimizer, torch.tensor([0, newest, -1, step % 2 * newest]), second)
        second.close()
        handle.remove()
        fastlora.delete_adapter(model, name)
        fastlora.save(model, self.folder)
        fastlora.load(plain(), self.folder)
        copy.deepcopy(model)(batch(0)[0]).sum().backward()
        self.tracker.close()
        fastlora.calibrate(
            model, [batch(0)], lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), steps=1, progress=False
        )
        self.tracker = fastlora.track(model, statistics=("grad_sq", "act_var"), every=1)
        with fastlora.disable_adapters(model), torch.no_grad():
            model(batch(0)[0])
        self.number += 1
        return {"steps": self.number * CYCLE, **counted(model)}

    def step(self, optimizer: torch.optim.Optimizer, ids: torch.Tensor, second: fastlora.Tracker) -> None:
        x, y = batch(self.number * CYCLE + int(ids.sum()))
        with fastlora.use_adapters(self.model, ids):
            losses = nn.functional.cross_entropy(self.model(x), y, reduction="none")
        (fastlora.per_adapter_mean(losses, ids) + self.tracker.penalty(1e-4)).backward()
        optimizer.step()
        optimizer.zero_grad()
        self.tracker.step()
        second.step()


def slope(rows: list[dict[str, int]], name: str) -> float:
    """Growth a step by least squares."""
    steps, values = [r["steps"] for r in rows], [r[name] for r in rows]
    mean, level = sum(steps) / len(steps), sum(values) / len(values)
    moment = sum((s - mean) ** 2 for s in steps)
    return sum((s - mean) * (v - level) for s, v in zip(steps, values, strict=True)) / moment


def run(cycles: int, folder: Path) -> list[dict[str, int]]:
    torch.set_num_threads(1)
    soak = Soak(folder)
    return [soak.cycle() for _ in range(cycles)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5000, help="training steps (%(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for the counts")
    arguments, began = parser.parse_args(), time.time()
    with tempfile.TemporaryDirectory() as folder:
        rows = run(arguments.steps // CYCLE, Path(folder) / "adapter")
    settled = rows[len(rows) // 4 :]
    document: dict[str, Any] = {
        "command": f"python tools/soak.py --steps {arguments.steps}", "seconds": round(time.time() - began, 1),
        "steps": rows[-1]["steps"], "adapters added and removed": len(rows),
        "live tensors": sorted({r["tensors"] for r in settled}), "hooks": sorted({r["hooks"] for r in settled}),
        "resident bytes a step": round(slope(settled, "resident"), 1),
        "resident MiB": [round(r["resident"] / 2**20, 1) for r in (settled[0], settled[-1])], **machine(), "rows": rows,
    }  # fmt: skip
    sys.stdout.write(json.dumps({k: v for k, v in document.items() if k != "rows"}, indent=1) + "\n")
    if arguments.out is not None:
        result_file.write(arguments.out, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
