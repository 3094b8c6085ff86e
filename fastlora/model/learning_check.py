"""Finds adapters that never learn, once, after the first backward."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch
from torch import nn

from .._utils.distributed import is_sharded, shards
from .._utils.errors import listed
from .._utils.torch_compat import in_backward, version_of
from ..nn.linear import Linear, adapted_layers
from ..nn.weight_reads import WeightReads
from .optimizer_check import watch_optimizers

logger = logging.getLogger(__name__)

MODES = ("raise", "warn", "off")
_SHOWN = 8


class LearningCheck:
    """Watches a model until the first backward has run, reports adapters that took no part, and removes its hooks.

    - The owner ran, never called the adapted layer, and its weight was read: ``RuntimeError``, or a warning.
    - The owner ran without the layer (a branch that the batch did not need): a warning.
    - The owner did not run either (an expert without tokens, a dropped layer), or the layer ran and got no gradient (a
      frozen phase): the adapter may learn later. A warning.

    Forwards without gradients and compiled ones do not count. The model, which holds the check, is held weakly.
    """

    def __init__(self, model: nn.Module, mode: str):
        self.mode = mode
        self.layers = weakref.WeakValueDictionary(adapted_layers(model))
        self.owners: dict[str, list[str]] = {}
        for path in self.layers:
            self.owners.setdefault(path.rpartition(".")[0] if path else "", []).append(path)
        self.kinds: dict[str, str] = {}
        self.ran: set[str] = set()
        self.model = weakref.ref(model)
        self.versions: dict[int, Any] = {}  # of the first forward: before it a parameter may be set by hand
        self._root = model.register_forward_pre_hook(self._before_forward)
        self._hooks: dict[str, Any] = {}
        for name, paths in self.owners.items():
            owner = model.get_submodule(name)
            self.kinds[name] = f"{type(owner).__module__}.{type(owner).__qualname__}"
            if paths != [name]:
                self._hooks[name] = owner.register_forward_hook(_OwnerHook(self, name))

    def __getstate__(self) -> dict[str, Any]:
        # Parameters of a copy have other identities.
        return {**self.__dict__, "versions": {}, "model": self.model(), "layers": dict(self.layers)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        layers = weakref.WeakValueDictionary(state["layers"])
        model = state["model"]
        self.__dict__.update(state, model=_nothing if model is None else weakref.ref(model), layers=layers)

    def owner_ran(self, name: str) -> None:
        """Note that an owner's forward is over; it is not watched any longer once it has called all its layers."""
        self.ran.add(name)
        if not self.versions:
            self._note_versions()  # the model around may never be called as a whole
        if all(map(self._called, self.owners[name])):
            self._hooks.pop(name).remove()

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling() and torch.is_grad_enabled() and not in_backward():
            self.examine()
            if self._root is not None:
                self._note_versions()

    def _note_versions(self) -> None:
        for p in self._trainable():
            self.versions.setdefault(id(p), version_of(p))  # new ones may take the place of others

    def examine(self) -> None:
        """Report, if backward has run; ``RuntimeError`` names adapted layers that their owners never called."""
        if self._root is None or not any(self._learned(p) for p in self._trainable()):
            return
        if not self.ran and not any(map(self._called, self.layers)):
            return  # nothing of an eager forward was seen: to take the hooks of a compiled model would recompile it
        passed_by = [p for name in self._hooks for p in self.owners[name] if name in self.ran and not self._called(p)]
        readers = [p for p in passed_by if self._read_at(p)]
        if readers and self.mode == "raise":
            raise RuntimeError(self._text(readers))
        self.close()
        if passed_by:
            logger.warning("%s", self._text(passed_by))
        resting = [p for p in self.layers if p not in passed_by and not self._called(p)] if self.ran else []
        if resting:
            logger.warning("adapters of modules that have not run so far: %s", listed(resting, _SHOWN))
        without = [p for p, layer in self.layers.items() if layer.called and not self._got_gradient(layer)]
        if without:
            logger.warning("adapters that ran and got no gradient so far: %s", listed(without, _SHOWN))

    def close(self) -> None:
        """Remove all hooks."""
        for hook in (*self._hooks.values(), *([] if self._root is None else [self._root])):
            hook.remove()
        self._root, self._hooks = None, {}

    def _trainable(self) -> list[nn.Parameter]:
        # Asked anew: fully_shard puts other parameters in the place of those that were there.
        model = self.model()
        return [] if model is None else [p for p in model.parameters() if p.requires_grad]

    def _called(self, path: str) -> bool:
        layer = self.layers.get(path)
        return layer is None or layer.called

    def _learned(self, parameter: nn.Parameter) -> bool:
        version = version_of(parameter)
        has_gradient = parameter.is_leaf and parameter.grad is not None
        return has_gradient or self.versions.get(id(parameter), version) != version

    def _got_gradient(self, layer: Linear) -> bool:
        live = [p for f in (layer.lora_A, layer.lora_B) for p in f.parameters() if p.requires_grad]
        # The gradients of a sharded model are with the shards, which a running forward has put aside; a process under
        # FSDP1 has views of some whole matrices in the forward, and of none or a part of them afterwards.
        aside = bool(shards(self.model())) and not any(is_sharded(p) for p in live)
        aside = aside or not all(p.is_leaf and p.numel() for p in live)
        return not live or aside or any(self._learned(p) for p in live)

    def _read_at(self, path: str) -> list[str]:
        """Where the layer's weight was read in the forward of another module."""
        reads = self.layers[path].reads
        return [] if reads is None else reads.places

    def _text(self, paths: list[str]) -> str:
        named = [f"{path} (in {self.kinds[path.rpartition('.')[0]]})" for path in paths]
        text = f"adapters never ran although the modules around them did, so they do not learn: {listed(named, _SHOWN)}"
        places = dict.fromkeys(place for path in paths for place in self._read_at(path))
        if places:
            text += (
                f"; the weight was read instead, at {listed(list(places), _SHOWN)}: leave these out of target_modules, "
                "or pass check='warn' or 'off' to fastlora.inject"
            )
        return text


def _nothing() -> None:
    """In place of a model that is gone: a part of it was kept and copied."""


class _OwnerHook:
    """Forward hook of one owner."""

    def __init__(self, check: LearningCheck, name: str):
        self.check, self.name = check, name

    def __call__(self, owner: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            self.check.owner_ran(self.name)


def watch_learning(model: nn.Module, mode: str | None = None) -> None:
    """Watch all adapters of a model in place of an earlier check, whose mode stays unless another is given; and
    the optimizers that step from now on."""
    watch_optimizers(model, injected=mode is not None)
    before = getattr(model, "fastlora_learning", None)
    if before is not None:
        before.close()
        mode = mode or before.mode
    if mode in ("raise", "warn"):
        model.fastlora_learning = LearningCheck(model, mode)
        for path, layer in adapted_layers(model).items():
            layer.reads = layer.reads or WeightReads(path)
