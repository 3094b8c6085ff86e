"""The README's example runs as it stands."""

from __future__ import annotations

import pathlib
import re

import torch
from safetensors.torch import load_file

import fastlora

README = pathlib.Path(__file__).parents[2] / "README.md"


def test_the_example_adapts_trains_and_saves(build, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, several = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    model = build("timm_vit").train()
    size = model.patch_embed.img_size
    batches = [(torch.randn(4, 3, *size), torch.randint(model.num_classes, (4,))) for _ in range(8)]
    matrices = 3 * len(model.blocks)
    code = code.replace("budget=100", f"budget={4 * matrices}").replace("warmup=500", "warmup=2")
    code = code.replace("r=16", "r=8")
    mixed = [(*batch, torch.tensor([0, 2, -1, 1])) for batch in batches[:2]]
    scope = {"model": model, "batches": batches, "loader": batches, "mixed_loader": mixed}
    exec(compile(code, str(README), "exec"), scope)
    summary = fastlora.summary(scope["model"])
    assert sum(row.rank for row in summary.rows) == 4 * matrices
    assert "blocks.0.attn.qkv[q]" in capsys.readouterr().out
    assert scope["tracker"].importance is not None
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any(bool(tensor.any()) for name, tensor in saved.items() if "lora_B" in name)
    exec(compile(several, str(README), "exec"), scope)
    saved = load_file(tmp_path / "adapter-b" / "adapter_model.safetensors")
    assert any(bool(tensor.any()) for name, tensor in saved.items() if "lora_B" in name)
