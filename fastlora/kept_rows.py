"""The operator ``fastlora::kept_moments``: sums of the columns of y and of their squares over the rows that count."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ._operator import LIBRARY, eager
from .backends import choose
from .grouped import on_host
from .verbs import as_rows

LIBRARY.define("kept_moments(Tensor y, Tensor? keep, str backend) -> Tensor")


def _kernel(y: Tensor, keep: Tensor | None, backend: str) -> Tensor:
    """``[sum_m y; sum_m y^2]`` over the rows of ``keep`` [M], their number in the last column: float64 [2, N + 1]."""
    chosen, _ = choose(backend, y.device, y.dtype)
    rows = as_rows(y)
    if keep is None:
        sums = chosen.column_moments(rows)
        return torch.cat([sums, sums.new_full((2, 1), rows.shape[0])], dim=1)
    # On a GPU nothing is read back to find out how many rows there are.
    kept = rows[keep] if on_host(y.device) else torch.where(keep.unsqueeze(1), rows, 0)
    sums = chosen.column_moments(kept)
    return torch.cat([sums, keep.sum().to(sums.dtype).expand(2, 1)], dim=1)


def _fake(y, keep, backend):
    return y.new_empty((2, y.shape[-1] + 1), dtype=torch.float64)


LIBRARY.impl("kept_moments", _kernel, "CompositeExplicitAutograd")
torch.library.register_fake("fastlora::kept_moments", _fake, lib=LIBRARY)


class _Moments(torch.autograd.Function):
    """Identity; the gradient of the moment leaf is the moments of the rows that count."""

    @staticmethod
    def forward(ctx, y: Tensor, V: Tensor, keep: Tensor | None, backend: str) -> Tensor:
        run = _kernel if eager((y, keep)) else torch.ops.fastlora.kept_moments
        ctx.save_for_backward(run(y, keep, backend))
        # Not a view of y, which an owner could not add its bias to in place.
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        return dy, ctx.saved_tensors[0], None, None


def with_moments(y: Tensor, V: Tensor, keep: Tensor | None, backend: str) -> Tensor:
    """y [*, N] as it is; backward adds the moments of its rows ``keep`` [M] (None: all) to V [2, N + 1]."""
    return _Moments.apply(y, V, keep, backend)


def rows_that_count(x: Tensor, route: Any, name: str) -> Tensor | None:
    """Which rows of ``x`` [*, K] a route's mask keeps that are an adapter's: bool [M], or None for all.

    Raises ``ValueError`` where the mask is not one of x's tokens.
    """
    keep, tokens = route.mask, x.shape[:-1]
    if keep is not None:
        if keep.shape not in (tokens, (tokens.numel(),)):
            seen = tuple(tokens)
            raise ValueError(f"mask: {tuple(keep.shape)} given, but a layer sees {seen} tokens; accepted: {seen}")
        keep = keep.reshape(-1).to(x.device, non_blocking=True)
    if route.batch is None:
        return keep
    own = route.batch.rows(x).ids == route.batch.names.index(name)
    return own if keep is None else own & keep


@contextlib.contextmanager
def masked(layers: Mapping[str, Any], mask: Tensor) -> Iterator[None]:
    """Inside, the ways of this thread through the layers have the mask."""
    routers = list({id(layer.router): layer.router for layer in layers.values()}.values())
    before = [(router, router.open(router.current().masked(mask), reopened=True)) for router in routers]
    try:
        yield
    finally:
        for router, outer in before:
            router.open(outer, reopened=True)


def checked_mask(mask: object) -> Tensor:
    """A mask as booleans; ``ValueError`` for what is none."""
    kinds = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    if not isinstance(mask, Tensor) or mask.dtype not in kinds or mask.dim() not in (1, 2):
        given = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask: expected booleans or integers [S, T] or [M], 1 a token that counts, got {given}")
    if on_host(mask.device) and bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError(f"mask: expected 0 and 1 only, got {sorted(set(mask.flatten().tolist()) - {0, 1})[:4]}")
    return mask.bool()
