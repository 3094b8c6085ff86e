"""``fastlora convert``: an adapter of ours, or a state dict of another library, as plain files of PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from .._utils.errors import wrong_value
from ..peft_io.convert import layout_files
from ..peft_io.folder import CONFIG, parse_tensors, read_folder, write_folder
from .merge_folder import new_folder, snapshot

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def convert_files(source: Path, out: Path, layout: str | None, alpha: float | None, dtype: str | None) -> int:
    """Write ``source`` to the folder ``out`` as ``adapter_config.json`` and tensors; returns how many tensors.

    ``source`` is a folder of PEFT's files, ours or foreign, or with ``layout`` a safetensors file in that layout, whose
    scale is ``alpha / r``. Raises ``ValueError`` or ``OSError`` as ``load`` does; ``out`` is then not made.
    """
    new_folder(out)
    if (layout is None) != (alpha is None):
        raise wrong_value("--alpha", "a number with --layout, and none without", alpha)
    if layout is not None:
        fields, tensors = layout_files(parse_tensors(source.read_bytes(), source)[0], layout, alpha)
    else:
        folder = read_folder(snapshot(source))
        fields, tensors = json.loads(Path(folder.where(CONFIG)).read_text()), dict(folder.tensors)
    if dtype is not None:
        tensors = {key: _cast(key, tensor, DTYPES[dtype]) for key, tensor in tensors.items()}
    write_folder(out, fields, tensors, None)
    return len(tensors)


def _cast(key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    cast = tensor.to(dtype)
    if bool((tensor.isfinite() & ~cast.isfinite()).any()):
        raise wrong_value("--dtype", f"one that holds the values of {key!r}", str(dtype).removeprefix("torch."))
    return cast
