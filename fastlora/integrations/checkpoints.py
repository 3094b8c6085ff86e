"""Checkpoints of training: adapters, head and tracker, and the states of whatever else a loop has."""

from __future__ import annotations

import io
import logging
import math
import os
import pathlib
import random
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .._utils.distributed import shards, unwrapped
from .._utils.errors import listed, suggestion
from .._utils.files import write_atomically
from ..model.state_differences import refuse_other
from ..nn.active import NO_ADAPTERS
from ..nn.linear import DEFAULT, adapted_layers, matrix_key
from ..tracking.tracker import Tracker, reopened_by
from .adapters_only import AdaptersOnly, adapters_only, load_trained, trained_state

logger = logging.getLogger(__name__)

VERSION = 1


class TrainingState:
    """What a checkpoint needs beside weights: which ranks and scales they have, and the averages of a ``tracker``.

    An object with ``state_dict`` and ``load_state_dict``, as trainers take them. Loading raises ``ValueError`` for a
    state from a newer version, and names ranks, scales, targets or tracker settings that differ, with nothing changed.
    Raises ``TypeError`` for what is no model, ``ValueError`` for a ``model`` without adapters.

    >>> from fastlora.integrations import TrainingState
    >>> state = TrainingState(nn.Sequential(fastlora.nn.Linear(8, 8, r=2)))
    >>> state.load_state_dict(state.state_dict())
    """

    def __init__(self, model: nn.Module, tracker: Tracker | None = None):
        self.model, self.tracker = model, tracker
        if not adapted_layers(model):
            raise ValueError(NO_ADAPTERS)

    def state_dict(self) -> dict[str, Any]:
        """Ranks and scales ``s`` by matrix, and the tracker's ``state_dict``: tensors and plain values."""
        tracker = None if self.tracker is None else self.tracker.state_dict()
        return {"version": VERSION, "ranks": _ranks(self.model), "scales": _scales(self.model), "tracker": tracker}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a saved ``state``; ``ValueError`` names what differs, with nothing changed."""
        refuse_newer(state, "state")
        refuse_ranks(self.model, state)
        if self.tracker is not None and state["tracker"] is not None:
            self.tracker.load_state_dict(state["tracker"])
        elif self.tracker is not None:
            logger.warning("the checkpoint has no statistics: the tracker starts anew")
        elif state["tracker"] is not None:
            logger.warning("the checkpoint has statistics, and nothing is tracked now: they are left out")


def refuse_newer(state: Mapping[str, Any], where: str) -> None:
    version = state.get("version") if isinstance(state, Mapping) else None
    if type(version) is not int or version < 1:
        raise ValueError(f"{where}: is no state of fastlora's (version {version!r})")
    if version > VERSION:
        raise ValueError(f"{where}: version {version} is newer than {VERSION}; update fastlora")


def refuse_ranks(model: nn.Module, state: Mapping[str, Any]) -> None:
    """``ValueError`` naming the matrices whose ranks or scales a saved state has otherwise."""
    differences = _differences("rank", _ranks(model), state["ranks"])
    if not differences and "scales" in state:  # older states have none
        differences = _differences("scale", _scales(model), state["scales"])
    if differences:
        raise ValueError(f"checkpoint: does not fit the model: {listed(differences)}")


def _ranks(model: nn.Module) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for path, layer in adapted_layers(model).items():
        for adapter in layer.adapter_names:
            for name, rank in layer.ranks(adapter).items():
                found.setdefault(adapter, {})[matrix_key(path, name)] = rank
    return found


def _scales(model: nn.Module) -> dict[str, dict[str, float]]:
    """``s`` of every matrix that has a rank."""
    found: dict[str, dict[str, float]] = {}
    for path, layer in adapted_layers(model).items():
        for adapter, spec in layer.adapter_specs.items():
            for name, rank in layer.ranks(adapter).items():
                if rank:
                    found.setdefault(adapter, {})[matrix_key(path, name)] = float(spec.scale[name])
    return found


def _differences(
    what: str, mine: Mapping[str, Mapping[str, float]], theirs: Mapping[str, Mapping[str, float]]
) -> list[str]:
    found = []
    for adapter in sorted(mine.keys() | theirs.keys()):
        here, there = mine.get(adapter, {}), theirs.get(adapter, {})
        found += [
            f"{key} has {what} {here.get(key, 0)} in the model and {there.get(key, 0)} in the checkpoint"
            + ("" if adapter == DEFAULT else f" (adapter {adapter!r})")
            for key in dict.fromkeys([*here, *there])
            if not math.isclose(here.get(key, 0), there.get(key, 0), rel_tol=1e-12)  # s r / r is s but for a bit
        ]
    return found


def register_for_checkpointing(accelerator: Any, model: nn.Module, tracker: Tracker | None = None) -> AdaptersOnly:
    """``accelerator.save_state`` and ``load_state`` of Accelerate handle adapters, head and tracker, not the base.

    Call it once, before ``load_state``, with the model that was adapted. Returns what :func:`adapters_only` does.
    ``accelerator`` needs its own ``register_for_checkpointing``; ``tracker``: whose averages go along. Raises
    ``TypeError`` for what is no model, ``ValueError`` without adapters.

    >>> from fastlora.integrations import register_for_checkpointing
    >>> from accelerate import Accelerator
    >>> model = nn.Sequential(fastlora.nn.Linear(8, 8, r=2))
    >>> handle = register_for_checkpointing(Accelerator(cpu=True), model)
    >>> handle.close()
    """
    state = TrainingState(model, tracker)
    accelerator.register_for_checkpointing(state)
    return adapters_only(model)


def save_checkpoint(path: str | os.PathLike, model: nn.Module, tracker: Tracker | None = None, **others: Any) -> None:
    """Write a file at ``path`` with all that a loop needs to go on with the same numbers, but for the frozen base.

    Adapters, ``modules_to_save``, other trained parameters, buffers, the tracker and the states of the random number
    generators (torch, Python, NumPy). ``others``: objects with ``state_dict``, such as ``optimizer=optimizer``, and
    plain values, such as ``step=step``. In a distributed run one process calls it. The file appears complete or not at
    all. Raises ``TypeError`` for what is no model, ``ValueError`` for one without adapters and for a sharded one, of
    which no process has the whole, ``OSError`` where the file cannot be written.

    >>> from fastlora.integrations import load_checkpoint, save_checkpoint
    >>> model = nn.Sequential(fastlora.nn.Linear(8, 8, r=2))
    >>> save_checkpoint(folder / "last.pt", model, step=3)
    >>> load_checkpoint(folder / "last.pt", model)
    {'step': 3}
    """
    _refuse_shards(model)
    state = TrainingState(unwrapped(model), tracker).state_dict()
    objects = {name: other.state_dict() for name, other in others.items() if hasattr(other, "state_dict")}
    values = {name: other for name, other in others.items() if name not in objects}
    content = {**state, "model": dict(trained_state(unwrapped(model))), "objects": objects, "values": values}
    write_atomically(pathlib.Path(path), packed({**content, "generators": _generators()}))


def load_checkpoint(
    path: str | os.PathLike, model: nn.Module, tracker: Tracker | None = None, **objects: Any
) -> dict[str, Any]:
    """Take up what ``save_checkpoint`` wrote at ``path``; returns its plain values.

    ``objects``: those whose state is wanted, by the names they were saved under. Random number generators are set too.
    Raises ``ValueError`` for a file that is torn, newer, or does not fit, naming the differences, with the model, the
    tracker and the generators as they were; ``FileNotFoundError`` for a missing one, ``TypeError`` for what is no
    model.

    >>> from fastlora.integrations import load_checkpoint, save_checkpoint
    >>> model = nn.Sequential(fastlora.nn.Linear(8, 8, r=2))
    >>> save_checkpoint(folder / "last.pt", model, step=3)
    >>> load_checkpoint(folder / "last.pt", model)["step"]
    3
    """
    _refuse_shards(model)
    model = unwrapped(model)
    state = read(pathlib.Path(path))
    missing = sorted(set(objects) - set(state["objects"]))
    if missing:
        near = suggestion(missing[0], state["objects"])
        raise ValueError(f"{path}: has no state of {missing}, only of {sorted(state['objects'])}{near}")
    refuse_other(model, state["model"], partial=True)
    refuse_ranks(model, state)
    if tracker is not None and state["tracker"] is not None:
        reopened_by(tracker, state["tracker"])  # refuses what it would
    for name, other in objects.items():  # before anything of ours, since they may refuse
        other.load_state_dict(state["objects"][name])
    TrainingState(model, tracker).load_state_dict(state)
    load_trained(model, state["model"])
    _set_generators(state["generators"])
    return state["values"]


def read(path: pathlib.Path) -> dict[str, Any]:
    """A file's content; ``ValueError`` naming the file where it is torn, foreign or newer."""
    data = path.read_bytes()
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a torn file raises whatever the unpickler met
        raise ValueError(f"{path}: torn, or not a checkpoint: {error}") from error
    refuse_newer(state, str(path))
    return state


def packed(content: Mapping[str, Any]) -> bytes:
    """``torch.save`` into memory."""
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    return buffer.getvalue()


def _refuse_shards(model: nn.Module) -> None:
    if isinstance(model, nn.Module) and shards(model):
        raise ValueError(
            "model: is sharded by fully_shard; save its state dict under adapters_only(model), and the optimizer's, "
            "with torch.distributed.checkpoint, and TrainingState(model, tracker).state_dict() beside it"
        )


def _generators() -> dict[str, Any]:
    found: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state_all()
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        found["numpy"] = (kind, keys.tolist(), *rest)
    return found


def _set_generators(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    if "numpy" in state and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(state["numpy"])
