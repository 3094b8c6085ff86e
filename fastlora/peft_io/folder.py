"""An adapter's folder on disk: atomic writes, and reads that refuse what is not whole."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
from torch import Tensor

from .._utils.errors import check_instance, check_integer, wrong_type
from .._utils.files import read_together, replace_together
from ..nn.adapter import check_slice_name
from .names import PeftFields, parse_fields

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
SIDE = "fastlora.json"
PICKLE = "adapter_model.bin"
FORMAT_VERSION = 2  # that a reader has to know where slices interleave; 1 holds the rest
_LARGEST_JSON = 2**26


@dataclass(frozen=True)
class Slice:
    """One of the matrices inside a split q/k/v; its own scale is ``scale_ratio`` times the file's."""

    name: str
    rows: int
    rank: int
    scale_ratio: float
    blocks: int = 1  # of rows of the matrix, each with its part of every slice


@dataclass(frozen=True)
class Side:
    """What fastlora.json adds to PEFT's files."""

    split: Mapping[str, tuple[Slice, ...]]
    rule: Mapping[str, Any]
    modules_to_save: tuple[str, ...]
    sha256: str
    importance: Mapping[str, float] | None


@dataclass(frozen=True)
class AdapterFolder:
    """Everything in a folder, read and checked for itself; ``side`` is None in a foreign one."""

    path: pathlib.Path
    fields: PeftFields
    tensors: Mapping[str, Tensor]
    side: Side | None
    sha256: str

    def where(self, name: str) -> str:
        return str(self.path / name)


def write_folder(folder: pathlib.Path, config: dict, tensors: Mapping[str, Tensor], side: dict | None) -> None:
    """Write the three files, without ``side`` PEFT's two, all or none.

    A save that is killed leaves the adapter that was there, or the new one.
    Raises ``ValueError`` for a path that is no folder, ``OSError`` for what the system refuses, as on a full disk.
    """
    data = safetensors.torch.save(dict(tensors), metadata={"format": "pt"})
    beside = {} if side is None else {SIDE: _json_bytes({**side, "sha256": hashlib.sha256(data).hexdigest()})}
    try:
        replace_together(folder, {TENSORS: data, **beside, CONFIG: _json_bytes(config)})
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"path: expected a folder, got {folder}, which is a file or below one") from None


def _json_bytes(value: dict) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def read_folder(path: str | os.PathLike, limit: int | None = None) -> AdapterFolder:
    """Read an adapter; ``FileNotFoundError`` or ``ValueError`` naming the file and what is wrong with it.

    A tensor file of more than ``limit`` bytes is refused unread. Links are followed, to regular files only: a cache of
    downloads consists of them.
    """
    check_instance("path", path, (str, os.PathLike), "the path of a folder")
    folder = pathlib.Path(path)
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder (only local folders are read)")
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder with {CONFIG} and {TENSORS}, got a file")
    most = {SIDE: _LARGEST_JSON, CONFIG: _LARGEST_JSON} | ({} if limit is None else {TENSORS: limit})
    found = read_together(folder, (TENSORS, SIDE, CONFIG), most)
    if found[CONFIG] is None:
        raise FileNotFoundError(f"{folder / CONFIG}: no such file; is this an adapter, and was its save completed?")
    if found[TENSORS] is None:
        if (folder / PICKLE).is_file():
            raise ValueError(
                f"{folder / PICKLE}: pickle files can run code and are not read; save it as {TENSORS} with PEFT first"
            )
        raise FileNotFoundError(f"{folder / TENSORS}: no such file")
    fields = parse_fields(_parsed(found[CONFIG], folder / CONFIG), str(folder / CONFIG))
    side = None if found[SIDE] is None else parse_side(_parsed(found[SIDE], folder / SIDE), str(folder / SIDE))
    tensors, digest = parse_tensors(found[TENSORS], folder / TENSORS)
    return AdapterFolder(folder, fields, tensors, side, digest)


def _parsed(data: bytes, path: pathlib.Path) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a number")

    try:
        return json.loads(data.decode(), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None


def parse_tensors(data: bytes, path: pathlib.Path) -> tuple[dict[str, Tensor], str]:
    """Tensors by key and the file's sha256; ``ValueError`` for what is no safetensors file."""
    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:  # the reader raises types of several libraries for a damaged header
        raise ValueError(f"{path}: truncated or not a safetensors file: {error}") from error
    if not tensors:
        raise ValueError(f"{path}: holds no tensors")
    return tensors, hashlib.sha256(data).hexdigest()


def parse_side(raw: Any, where: str) -> Side:
    """Check and read fastlora.json."""
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(raw).__name__}")
    version = raw.get("format_version")
    if type(version) is not int or version < 1:
        raise ValueError(f"{where}: format_version: expected an integer from 1, got {version!r}")
    if version > FORMAT_VERSION:
        raise ValueError(f"{where}: format_version {version} is newer than {FORMAT_VERSION}; update fastlora")
    try:
        split = {path: tuple(_slice(s) for s in slices) for path, slices in raw["split"].items()}
        rule = {name: raw["scale"][name] for name in ("mode", "r", "lora_alpha", "use_rslora")}
        saved, digest, importance = tuple(raw["modules_to_save"]), raw["sha256"], raw.get("importance")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: missing or malformed entry: {error}") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if not isinstance(digest, str) or not all(isinstance(name, str) for name in saved):
        raise ValueError(f"{where}: sha256 and modules_to_save: expected strings")
    if importance is not None and not isinstance(importance, dict):
        raise ValueError(f"{where}: importance: expected an object, got {importance!r}")
    return Side(split, rule, saved, digest, importance)


def _slice(raw: dict) -> Slice:
    name, ratio = check_slice_name("name of a slice", raw["name"]), raw["scale_ratio"]
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
        raise wrong_type("scale_ratio", "a number", ratio)
    rows, rank = check_integer("rows", raw["rows"], 1), check_integer("rank", raw["rank"], 0)
    blocks = check_integer("blocks", raw.get("blocks", 1), 1)
    if rows % blocks:
        raise ValueError(f"blocks: expected a divisor of {rows} rows, got {blocks}")
    return Slice(name, rows, rank, float(ratio), blocks)
