"""``fastlora merge``: a base of transformers with an adapter in its weights, as a folder that needs no adapter."""

from __future__ import annotations

import shutil
from pathlib import Path

from .._utils.errors import wrong_value
from .._utils.installed import blame_extra

# What lies beside weights and belongs to them: tokenizers, processors, how to generate.
_BESIDE = "tokenizer* vocab* merges* special_tokens* added_tokens* *processor_config* chat_template*".split()


def snapshot(path: Path) -> Path:
    """The folder with the files: ``path``, or in a folder of the Hub's cache the snapshot of ``main``, else the one."""
    main, snapshots = path / "refs" / "main", path / "snapshots"
    if main.is_file():
        return snapshots / main.read_text().strip()
    found = sorted(snapshots.iterdir()) if snapshots.is_dir() else [path]
    if len(found) != 1:
        raise wrong_value(
            str(path), "a folder of the Hub's cache with refs/main or one snapshot", [f.name for f in found]
        )
    return found[0]


def new_folder(out: Path) -> None:
    """``ValueError`` for a folder that holds something already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise wrong_value("OUT", "a folder that is empty or not there yet", str(out))


def merge_folder(base: Path, adapter: Path, out: Path) -> int:
    """Write ``W + s B A`` of every adapted matrix, with the rest of the base, to ``out``; returns how many there were.

    Raises ``ValueError`` for folders that do not fit, ``ImportError`` without transformers; ``out`` is then not made.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        blame_extra(error, "fastlora merge", "hf", "transformers")
        raise
    from ..model.eject import eject
    from ..model.merge import merge
    from ..nn.linear import adapted_layers
    from ..peft_io.load import load

    new_folder(out)
    base = snapshot(base)
    if not (base / "config.json").is_file():
        raise wrong_value("BASE", "a folder with the config.json and weights of a model of transformers", str(base))
    names = transformers.AutoConfig.from_pretrained(base, local_files_only=True).architectures or ["none"]
    kind = getattr(transformers, names[0], None)
    if kind is None:
        raise wrong_value("BASE", "a config.json whose architectures are transformers' own", names[0])
    model = kind.from_pretrained(base, dtype="auto", local_files_only=True)
    load(model, snapshot(adapter))
    count = len(adapted_layers(model))
    eject(merge(model))
    model.save_pretrained(out)
    for pattern in _BESIDE:
        for file in base.glob(pattern):
            shutil.copy(file, out / file.name)
    return count
