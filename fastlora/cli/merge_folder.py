"""``fastlora merge``: a base of transformers with an adapter in its weights, as a folder that needs no adapter."""

from __future__ import annotations

import shutil
from pathlib import Path

from .._utils.errors import wrong_value
from .._utils.installed import blame_extra

# What lies beside weights and belongs to them: tokenizers, processors, how to generate.
_BESIDE = "tokenizer* vocab* merges* special_tokens* added_tokens* *processor_config* chat_template*".split()


def snapshot(path: Path) -> Path:
    """The folder with the files: ``path``, or the snapshot that ``main`` names in a cache folder of the Hub."""
    main = path / "refs" / "main"
    return path / "snapshots" / main.read_text().strip() if main.is_file() else path


def merge_folder(base: Path, adapter: Path, out: Path) -> int:
    """Write ``W + s B A`` of every adapted matrix, with the rest of the base, to ``out``; returns how many there were.

    Raises ``ValueError`` for folders that do not fit, ``ImportError`` without transformers; ``out`` is then not made.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        blame_extra(error, "fastlora merge", "hf", "transformers")
        raise
    from ..model.inject import eject
    from ..model.merge import merge
    from ..nn.linear import adapted_layers
    from ..peft_io.load import load

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise wrong_value("OUT", "a folder that is empty or not there yet", str(out))
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
