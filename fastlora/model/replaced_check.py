"""Tells when a plain module has taken the place of an adapted layer, whose adapters are gone with it."""

from __future__ import annotations

import logging
import sys
import weakref
from typing import Any

from torch import Tensor, nn

from ..nn.active import join, kept_inside
from ..nn.linear import Adapted, adapted_layers
from ..nn.token_rows import TokenRows, embeddings_with_rows

logger = logging.getLogger(__name__)

_HOW = "replace modules (resize_token_embeddings) before fastlora.inject"


class AdaptedPlaces:
    """Where a model had adapted layers. Warns when one dies and a module with a weight is in its place.

    Hooks of layers cost every forward; a weak reference costs nothing.
    """

    def __init__(self, model: nn.Module, paths: list[str]):
        self.model, self.paths = weakref.ref(model), paths
        self._watch(_places(model))

    def _watch(self, layers: dict[str, nn.Module]) -> None:
        # The callback holds this object weakly: the references are its own. At the interpreter's end names are gone.
        me, ending = weakref.ref(self), sys.is_finalizing
        self._layers = [
            weakref.ref(layer, lambda _, path=path: ending() or _say(me(), path)) for path, layer in layers.items()
        ]

    def __getstate__(self) -> dict[str, Any]:
        model = self.model()
        return {"model": model, "paths": self.paths, "layers": {} if model is None else _places(model)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.model, self.paths = weakref.ref(self if state["model"] is None else state["model"]), state["paths"]
        self._watch(state["layers"])

    def replaced(self, path: str) -> bool:
        """Whether something with a weight and without an adapter stands at ``path``; wrappers hold the layer itself."""
        here = self.model()
        for name in path.split("."):
            here = getattr(here, "_modules", {}).get(name)
        plain = here is not None and not any(isinstance(m, (Adapted, TokenRows)) for m in here.modules())
        return plain and isinstance(getattr(here, "weight", None), Tensor)


def _places(model: nn.Module) -> dict[str, nn.Module]:
    return {**adapted_layers(model), **embeddings_with_rows(model)}


def _say(places: AdaptedPlaces | None, path: str) -> None:
    if places is not None and places.replaced(path):
        logger.warning("model: another module has replaced %r, and the adapters on it are gone; %s", path, _HOW)


def watch_places(model: nn.Module) -> None:
    """Warn when adapted layers are replaced from now on; those that were stay known."""
    before = getattr(model, "fastlora_places", None)
    paths = dict.fromkeys([*([] if before is None else before.paths), *_places(model)])
    model.fastlora_places = AdaptedPlaces(model, list(paths))


def refuse_replaced(model: nn.Module) -> None:
    """``ValueError`` where a plain module is in the place of an adapted layer."""
    held = kept_inside(model, "fastlora_places").items()
    lost = [join(at, path) for at, places in held for path in places.paths if places.replaced(path)]
    if lost:
        raise ValueError(f"model: another module has replaced {lost[0]!r}, and the adapters on it are gone; {_HOW}")
