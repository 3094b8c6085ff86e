"""What is frozen and in the files all the same: embeddings of a resized vocabulary, and what else a file brought."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from .._utils.errors import listed, wrong_value
from ..config import takes_weight
from ..nn.active import join, kept_inside
from ..nn.linear import Adapted
from .names import wrapped_key

logger = logging.getLogger(__name__)

_WRITTEN_AS_TARGETS = ("embed_tokens", "lm_head")  # which PEFT writes with their adapters, and others not


def embeddings_of(model: nn.Module) -> list[str]:
    """Names of the tensors of the input and the output embeddings; none where a model does not say which they are."""
    found = set()
    for name in ("get_input_embeddings", "get_output_embeddings"):
        get = getattr(model, name, None)
        try:
            found.add(id(get() if callable(get) else None))
        except (NotImplementedError, AttributeError):  # transformers' answer of a model that has none
            continue
    own = [(path, module._parameters) for path, module in model.named_modules() if id(module) in found]
    return [join(path, name) for path, held in own for name in ("weight", "bias") if held.get(name) is not None]


def frozen_in_file(
    model: nn.Module, keys: Collection[str], bias: str, stored: Mapping[str, str], rows: Collection[str]
) -> dict[str, str]:
    """Those of ``keys`` that are of frozen tensors of the model, and their names there.

    ``stored`` and ``rows``: what has adapters, and rows of its own, in the file. With ``bias="all"`` PEFT to 0.20 wrote
    whatever has "bias" in its name, as a table of biases of positions.
    """
    names = embeddings_of(model)
    if bias == "all":
        names = [*names, *(name for name in own_tensors(model) if "bias" in name)]
    found = {wrapped_key(name, stored, rows): name for name in names}
    return {key: found[key] for key in keys if key in found}


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by every name; whatever hooks of ``state_dict`` leave out of it."""
    kinds = model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    return {name: tensor for held in kinds for name, tensor in held}


def remember(model: nn.Module, names: Collection[str]) -> None:
    """A file brought these: the model has them from no other place, so that its own files have to hold them, too."""
    if names:
        model.fastlora_frozen = sorted({*getattr(model, "fastlora_frozen", ()), *names})


def frozen_to_save(
    model: nn.Module, choice: bool | str, layers: Mapping[str, Adapted], adapter: str, stored: Mapping[str, str],
    rows: Collection[str],
) -> dict[str, Tensor]:  # fmt: skip
    """PEFT's keys of the frozen tensors that go along -> the model's own; what several modules share, once."""
    embeddings = embeddings_of(model)
    if choice is True and not embeddings:
        accepted = f"'auto' or False for a {type(model).__name__}, which names no embeddings (get_input_embeddings)"
        raise wrong_value("save_embedding_layers", accepted, choice)
    kept = kept_inside(model, "fastlora_frozen").items()
    names = [join(at, name) for at, brought in kept for name in brought]
    if choice is False:
        names = [name for name in names if name not in embeddings]
    elif choice is True or _resized(model, embeddings):
        names += embeddings
    elif not rows:
        names += [n for n in embeddings if _written_as_target(n.rpartition(".")[0], layers, adapter)]
    moved = [n for n in names if (path := n.rpartition(".")[0]) in layers and layers[path].lora_A[adapter].starts()]
    if moved:
        raise ValueError(
            f"model: {moved[0]!r} is what init_lora_weights left of it, which no file can hold; "
            "save_embedding_layers=False leaves it out"
        )
    tensors = own_tensors(model)
    # Where rows of it are trained PEFT finds a shared weight by their key alone.
    names.sort(key=lambda name: (name.rpartition(".")[0] in rows, name in embeddings[:1], name))
    once = {id(tensors[name]): name for name in names}
    return {wrapped_key(name, stored, rows): tensors[name] for name in once.values()}


def _written_as_target(path: str, layers: Mapping[str, Adapted], adapter: str) -> bool:
    """Whether PEFT writes an adapted embedding; not where a part of it became factors, which only a base has whole."""
    if path not in layers or path.rpartition(".")[2] not in _WRITTEN_AS_TARGETS:
        return False
    layer = layers[path]
    return not layer.lora_A[adapter].starts() and not takes_weight(layer.adapter_specs[adapter].init)


def _resized(model: nn.Module, embeddings: Collection[str]) -> bool:
    """Whether the vocabulary has another size than in the checkpoint that the model was made from, as PEFT asks."""
    config = getattr(model, "config", None)
    name, size = getattr(config, "_name_or_path", None), _vocabulary(config)
    read = getattr(type(config), "from_pretrained", None)
    if not (embeddings and name and size and callable(read)):
        return False
    try:
        return _vocabulary(read(name, local_files_only=True)) != size
    except (OSError, ValueError) as error:  # transformers' answers where there is no such file
        logger.warning(
            "save: the config of the base %r cannot be read (%s); %s are left out as if the vocabulary had its size. "
            "save_embedding_layers=True writes them, and False says that the base has them",
            name,
            str(error).partition("\n")[0],
            listed(embeddings),
        )
        return False


def _vocabulary(config: Any) -> int | None:
    """The size that ``resize_token_embeddings`` changes, which a model of several parts has in its config of text."""
    try:
        config = config.get_text_config()
    except (AttributeError, ValueError):  # no config of transformers, or one with several of text
        pass
    return getattr(config, "vocab_size", None)
