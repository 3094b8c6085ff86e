"""The page on DDP and FSDP2 runs as it stands, in one process."""

from __future__ import annotations

import pathlib
import re

import torch.distributed as dist
from torch.distributed.tensor import DTensor

import fastlora

PAGE = pathlib.Path(fastlora.__file__).parent.parent / "docs" / "scale_out.md"


def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    names = {}
    try:
        for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
            exec(compile(block, str(PAGE), "exec"), names)
        assert all(isinstance(p, DTensor) for p in names["model"].parameters())
        assert all(value > 0 for value in names["tracker"].scores().values())
        assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    finally:
        dist.destroy_process_group()
