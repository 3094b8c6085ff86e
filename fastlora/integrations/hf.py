"""Hugging Face's Trainer: statistics, penalty and freezing as a callback, and checkpoints that hold adapters only."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import safetensors.torch
import torch
from torch import nn

from .._utils.distributed import shards
from .._utils.files import write_atomically
from .._utils.installed import blame_extra
from ..model.adapters import adapter_names
from ..nn.linear import DEFAULT, adapted_layers
from ..peft_io.save import save
from ..tracking.tracker import Tracker
from .adapters_only import adapters_only, trained_state
from .checkpoints import packed, read, refuse_ranks
from .session import Session, checked_checkpoints

try:
    from transformers import Trainer, TrainerCallback
    from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME
except ModuleNotFoundError as error:
    blame_extra(error, __name__, "hf", "transformers")
    raise

logger = logging.getLogger(__name__)

STATE = "fastlora_training.pt"
_HANDLES_CHECKPOINTS = ("_save_checkpoint", "_load_from_checkpoint", "_load_best_model")


class FastLoraCallback(TrainerCallback):
    r"""Statistics, FW-LoRA's penalty and a frozen start for ``transformers.Trainer``, and small checkpoints.

    - ``track``: True, False, or options of :func:`fastlora.track`; the tracker is ``callback.tracker``, and its scores
      stay readable after training.
    - ``penalty``: λ, or options of ``Tracker.penalty``. Its gradient is there before the first backward of a step, so
      it is clipped with the loss's and counted in ``grad_norm``, once a step whatever the accumulation.
    - ``freeze``: optimizer steps in which the adapter stands still (its gradients are off).
    - ``adapter``: which one is tracked, penalized and frozen; the active one when training begins, unless named.
    - ``checkpoints="adapters"``: in the Trainer's checkpoints ``model.safetensors`` holds adapters, the head and other
      trained parameters, which is what resuming and ``load_best_model_at_end`` load; PEFT's files lie beside it
      in place of ``config.json``, so that ``from_pretrained`` takes the folder for an adapter; those of further
      adapters are in folders of their names. ``"full"`` leaves the Trainer's files alone.
    - ``resume_from``: the folder to resume from, where it is neither ``args.resume_from_checkpoint`` nor in
      ``args.output_dir``.

    Raises ``TypeError`` or ``ValueError`` naming the argument; while training ``ValueError`` for a model without
    adapters, and for a checkpoint that does not fit, naming the differences.

    >>> from fastlora.integrations.hf import FastLoraCallback
    >>> callback = FastLoraCallback(track={"warmup": 4}, penalty=1e-4, freeze=1)
    >>> callback.tracker  # none before trainer.train() of Trainer(model, args, callbacks=[callback])
    >>> callback.close()
    """

    def __init__(
        self,
        *,
        track: bool | Mapping[str, Any] = True,
        penalty: float | Mapping[str, Any] | None = None,
        freeze: int = 0,
        checkpoints: str = "adapters",
        resume_from: str | os.PathLike | None = None,
        adapter: str | None = None,
    ):
        self.session = Session(track, penalty, freeze, adapter)
        self.checkpoints, self.resume_from = checked_checkpoints(checkpoints), resume_from
        self._trainer: Any = None  # whose methods are surrounded

    @property
    def tracker(self) -> Tracker | None:
        """The tracker of the last training; None before the first, and where ``track`` is False."""
        return self.session.tracker

    def on_init_end(self, args, state, control, model: nn.Module | None = None, **kwargs) -> None:
        self._open(model, _calling_trainer("__init__"))

    def on_train_begin(self, args, state, control, model: nn.Module | None = None, **kwargs) -> None:
        self._open(model, _calling_trainer("_inner_training_loop"))
        if self.checkpoints == "adapters" and args.save_strategy != "no" and _takes_part(args, model):
            # What has no place in PEFT's files is found now, not at the first checkpoint.
            with tempfile.TemporaryDirectory() as folder:
                _save_adapters(model, pathlib.Path(folder))
        saved = self._saved(args, state, model) if state.global_step else None
        self.session.begin(model, saved, state.max_steps)

    def on_step_begin(self, args, state, control, optimizer: Any = None, **kwargs) -> None:
        self.session.hold(state.global_step)
        # No event lies between backward and clipping: gradients start with the penalty's.
        self.session.add_penalty(getattr(optimizer, "scaler", None))

    def on_pre_optimizer_step(self, args, state, control, optimizer: Any = None, **kwargs) -> None:
        self.session.step(getattr(optimizer, "scaler", None))

    def on_save(self, args, state, control, model: nn.Module | None = None, **kwargs) -> None:
        folder = _folder(args, state)
        if not _takes_part(args, model):
            return
        if not shards(model) and not folder.is_dir():
            logger.warning("%s: no such folder, so the adapter and the statistics are not saved beside it", folder)
            return
        tensors, own = _tensors(model), {"step": state.global_step, "weights": _digest(model)}
        if self.checkpoints == "adapters":
            _save_adapters(model, folder)
        if not args.should_save:
            return
        if self.checkpoints == "adapters":
            # As in a folder of PEFT's: with a config.json in it, from_pretrained would take it for a complete model.
            (folder / CONFIG_NAME).unlink(missing_ok=True)
            # The Trainer's own file may have the hub's names for weights, which its load_state_dict does not know.
            write_atomically(folder / SAFE_WEIGHTS_NAME, safetensors.torch.save(tensors, {"format": "pt"}))
        write_atomically(folder / STATE, packed({**self.session.state_dict(), **own}))

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.close()

    def close(self) -> None:
        """Stop tracking and let go of frozen adapters: what the end of a training does, however it ends."""
        self.session.close()

    def _open(self, model: nn.Module, trainer: Any) -> None:
        if not adapted_layers(model):
            raise ValueError("model: has no adapters; call fastlora.inject before the Trainer is made")
        if trainer is None or trainer is self._trainer:
            return
        self._trainer = trainer
        # One that was added to a Trainer is told of it by its first training, whose loop is running: the parts of it.
        for owner, method in ((trainer, "_inner_training_loop"), (trainer, "_run_epoch"),
                              (trainer, "training_step"), (trainer.callback_handler, "call_event")):  # fmt: skip
            if hasattr(owner, method):
                _surround(owner, method, self._closed_on_error)
        if self.checkpoints == "adapters":
            for method in _HANDLES_CHECKPOINTS:
                _surround(trainer, method, lambda: adapters_only(trainer.model))

    @contextlib.contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _saved(self, args: Any, state: Any, model: nn.Module) -> dict[str, Any]:
        """Our state in the folder that the Trainer has just resumed from, which it does not tell."""
        asked = [self.resume_from] if self.resume_from is not None else [args.resume_from_checkpoint]
        places = [pathlib.Path(p) for p in (*asked, _folder(args, state)) if isinstance(p, (str, os.PathLike))]
        found = {place: read(place / STATE) for place in places if (place / STATE).is_file()}
        for saved in found.values():
            if saved["step"] == state.global_step and saved["weights"] == _digest(model):
                return saved
        for saved in found.values():
            refuse_ranks(model, saved)
        raise ValueError(
            f"resume: no {STATE} with step {state.global_step} and the weights that were loaded in "
            f"{[str(place) for place in places]}; name the folder: FastLoraCallback(resume_from=...)"
        )


def _calling_trainer(method: str) -> Any:
    """The Trainer whose method is running: no event tells which one it comes from."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == method and isinstance(frame.f_locals.get("self"), Trainer):
            return frame.f_locals["self"]
        frame = frame.f_back
    return None


def _surround(trainer: Any, method: str, around: Callable[[], Any]) -> None:
    """Let a context surround one method of one Trainer."""
    inner = getattr(trainer, method)

    @functools.wraps(inner)
    def surrounded(*args: Any, **kwargs: Any) -> Any:
        with around():
            return inner(*args, **kwargs)

    setattr(trainer, method, surrounded)


def _folder(args: Any, state: Any) -> pathlib.Path:
    return pathlib.Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _takes_part(args: Any, model: nn.Module) -> bool:
    """Whether this process has a part in saving: the first one, and every one that holds a shard."""
    return bool(args.should_save or shards(model))


def _save_adapters(model: nn.Module, folder: pathlib.Path) -> None:
    for name in adapter_names(model):
        if name is not None:
            save(model, folder if name == DEFAULT else folder / name, name)


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in trained_state(model).items()}


def _digest(model: nn.Module) -> str:
    """Of the trained weights: tells whether a folder's state belongs to what the model holds."""
    found = hashlib.sha256()
    for name, tensor in sorted(_tensors(model).items()):
        found.update(name.encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
