"""Rows of a frozen embedding or linear that are trained alone, and of the output layer that shares the weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .plain import times_scale
from .routing import Routed, Router

LEAF = "token_adapter"  # PEFT's name of the child that holds them


class TokenRows(Routed):
    r"""Trained rows [n, D] of W [V, D] for each adapter, in the place of W's own, as in PEFT: of an embedding

    .. math:: y_i = R_j \text{ where } x_i = \mathrm{index}_j,\quad W_{x_i} \text{ elsewhere}

    A child of the layer. Forward hooks put the rows into an embedding's output, and their products into that of a
    linear, as of the output layer that shares W; W itself is not copied.
    """

    def __init__(self, router: Router, scaled: bool):
        super().__init__()
        self.scaled = scaled  # ``is_scaled`` of the layer
        self.trainable_tokens_delta = nn.Module()
        self.indices: dict[str, tuple[int, ...]] = {}
        self.router = router
        router.holders.add(self)
        self.merged: tuple[str, ...] = ()
        self.unmerged: Tensor | None = None
        self.sorted: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "sorted": {}}

    @property
    def adapter_names(self) -> tuple[str, ...]:
        return tuple(self.indices)

    def install(self, adapter: str, indices: Sequence[int], rows: Tensor) -> None:
        """Give an adapter its rows."""
        self.trainable_tokens_delta.register_parameter(adapter, nn.Parameter(rows))
        self.indices[adapter] = tuple(indices)
        self.router.changed(adapter)

    def uninstall(self, adapter: str) -> None:
        """Forget an adapter, if it has rows here."""
        if self.indices.pop(adapter, None) is not None:
            delattr(self.trainable_tokens_delta, adapter)
            self.sorted = {}
            self.router.changed(adapter)

    def rows(self, adapter: str) -> Tensor:
        """The rows [n, D] of an adapter."""
        return self.trainable_tokens_delta._parameters[adapter]

    def look_up(self, module: nn.Embedding, args: Any, kwargs: Mapping[str, Any], y: Tensor) -> Tensor:
        """Forward hook of the embedding: the trained rows where the input names them."""
        x = _input(args, kwargs)

        def replaced(adapter: str) -> Tensor:
            index, order = self._sorted(adapter, y.device)
            at = torch.searchsorted(index, x.long()).clamp(max=len(index) - 1)
            hit = index[at] == x
            # One row more for all other tokens, so that scale_grad_by_freq counts none of them as a trained one.
            table = F.pad(self.rows(adapter).to(module.weight.dtype), (0, 0, 0, 1))
            indices, padding = self.indices[adapter], module.padding_idx
            padding = indices.index(padding) if padding in indices else None
            row = torch.where(hit, order[at], len(index))
            new = F.embedding(row, table, padding, scale_grad_by_freq=module.scale_grad_by_freq)
            new = times_scale(module, new) if self.scaled else new
            return torch.where(hit.unsqueeze(-1), new.to(y.dtype), y)

        return self._routed(module, y, replaced)

    def project(self, module: nn.Linear, args: Any, kwargs: Mapping[str, Any], y: Tensor) -> Tensor:
        """Forward hook of a linear without bias: ``x R^T`` in the columns of the trained rows."""
        x = _input(args, kwargs)

        def replaced(adapter: str) -> Tensor:
            index, order = self._sorted(adapter, y.device)
            new = F.linear(x, self.rows(adapter).to(module.weight.dtype)[order])
            return y.index_copy(-1, index, new.to(y.dtype))

        return self._routed(module, y, replaced)

    def _routed(self, module: nn.Module, y: Tensor, replaced: Callable[[str], Tensor]) -> Tensor:
        route = self.router.traced() if torch.compiler.is_compiling() else self.router.route(module.training)
        if self.merged or not route.enabled:
            return y
        if route.batch is None:
            return replaced(route.adapter) if route.adapter in self.indices else y
        out = y
        for place, name in enumerate(route.batch.names):
            if name in self.indices:
                ids = route.batch.rows(y).ids.view(*y.shape[:-1], 1)
                out = torch.where(ids == place, replaced(name), out)
        return out

    def _sorted(self, adapter: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Indices in ascending order, and the row of each."""
        found = None if torch.compiler.is_compiling() else self.sorted.get((adapter, device))
        if found is None:
            with torch.inference_mode(False):
                index, order = torch.tensor(self.indices[adapter], device=device).sort()
            found = index, order
            if type(index) is Tensor and not torch.compiler.is_compiling():
                self.sorted[adapter, device] = found
        return found

    def merged_rows(self, adapter: str, weight: Tensor) -> Tensor | None:
        """An adapter's rows in the weight's dtype, None where they are not finite."""
        rows = self.rows(adapter).detach().to(weight.dtype)
        return rows if bool(rows.isfinite().all()) else None

    @torch.no_grad()
    def put_in(self, adapter: str, weight: Tensor, rows: Tensor) -> None:
        """Write an adapter's rows into the weight, and keep those that were there."""
        index = torch.tensor(self.indices[adapter], device=weight.device)
        self.merged, self.unmerged = (adapter,), weight[index].clone()
        weight[index] = rows

    @torch.no_grad()
    def take_out(self, weight: Tensor) -> None:
        """Put back what ``put_in`` kept."""
        if self.unmerged is not None:
            index = torch.tensor(self.indices[self.merged[0]], device=weight.device)
            weight[index] = self.unmerged.to(weight.device)
        self.unmerged, self.merged = None, ()


def _input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def embeddings_with_rows(model: nn.Module) -> dict[str, nn.Module]:
    """Embeddings and linears that have trained rows, by path."""
    return {n: m for n, m in model.named_modules() if isinstance(m._modules.get(LEAF), TokenRows)}


def token_rows(model: nn.Module, adapter: str | None = None) -> dict[str, TokenRows]:
    """The trained rows of a model, or of one adapter, by the layer's path."""
    every = {path: module._modules[LEAF] for path, module in embeddings_with_rows(model).items()}
    return {path: rows for path, rows in every.items() if adapter is None or adapter in rows.indices}
