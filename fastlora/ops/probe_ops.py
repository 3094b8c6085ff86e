"""Identity operators whose backward measures: moments of masked rows, columns of the weight gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._utils.torch_compat import can_skip_dispatcher
from . import reference
from .autograd import LIBRARY
from .backends import choose
from .layout import as_rows, on_host

LIBRARY.define("column_probes(Tensor dy, Tensor? columns, Tensor? x, int[] sizes, str backend) -> Tensor[]")


def _columns_kernel(
    dy: Tensor, columns: Tensor | None, x: Tensor | None, sizes: Sequence[int], backend: str
) -> list[Tensor]:
    """Of every run of ``sizes`` columns of dy: ``Q_i = dy_i^T c_i`` [N_i, k], then the norms of x's columns [n, K]."""
    parts, out = as_rows(dy).split(list(sizes), dim=1), []
    if columns is not None:
        (chosen, _), k = choose(backend, dy.device, dy.dtype), columns.shape[1] // len(sizes)
        out = [chosen.outer(part, columns.narrow(1, i * k, k)) for i, part in enumerate(parts)]
    return out if x is None else [*out, reference.column_norms(as_rows(x), parts)]


def _columns_fake(dy, columns, x, sizes, backend):
    out = []
    if columns is not None:
        acc, k = reference.accumulate_dtype(dy.dtype), columns.shape[1] // len(sizes)
        out = [dy.new_empty((size, k), dtype=acc) for size in sizes]
    if x is None:
        return out
    return [*out, x.new_empty((len(sizes), x.shape[-1]), dtype=reference.accumulate_dtype(x.dtype))]


LIBRARY.impl("column_probes", _columns_kernel, "CompositeExplicitAutograd")
torch.library.register_fake("fastlora::column_probes", _columns_fake, lib=LIBRARY)


class _Measured(torch.autograd.Function):
    """Identity on y; the gradients of its leaves are columns of G, and norms of columns."""

    @staticmethod
    def forward(
        ctx, y: Tensor, columns: Tensor | None, x: Tensor | None, sizes: tuple[int, ...], backend: str, *leaves
    ):
        ctx.sizes, ctx.backend = sizes, backend
        ctx.save_for_backward(columns, x)
        # Not a view of y, which an owner could not add its bias to in place.
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        columns, x = ctx.saved_tensors
        if torch.is_grad_enabled() and columns is not None:  # create_graph: the formula can be differentiated again
            acc, k = reference.accumulate_dtype(dy.dtype), columns.shape[1] // len(ctx.sizes)
            parts = as_rows(dy).to(acc).split(ctx.sizes, dim=1)
            found = [part.T @ columns[:, i * k : i * k + k].to(acc) for i, part in enumerate(parts)]
            found += [] if x is None else [reference.column_norms(as_rows(x), parts).detach()]
        else:
            run = _columns_kernel if can_skip_dispatcher((dy, columns, x)) else torch.ops.fastlora.column_probes
            found = run(dy.detach(), columns, x, ctx.sizes, ctx.backend)
        count = 0 if columns is None else len(ctx.sizes)
        norms = () if x is None else found[-1].unbind()
        return (dy, None, None, None, None, *found[:count], *norms)


def measured(
    y: Tensor,
    sizes: Sequence[int],
    backend: str,
    columns: Tensor | None = None,
    Z: Sequence[Tensor] = (),
    x: Tensor | None = None,
    norms: Sequence[Tensor] = (),
) -> Tensor:
    """y [*, sum N_i] as it is, with N_i = ``sizes``. Counted if and only if backward ran:

    with n k ``columns`` [M, n k] of x backward adds ``dy_i^T c_i`` to Z_i [N_i, k], with x [*, K] it adds
    ``sum_m ||dy_im||^2 x_mj^2`` to norms_i [K].
    """
    return _Measured.apply(y, columns, x, tuple(sizes), backend, *Z, *norms)


LIBRARY.define("masked_moments(Tensor y, Tensor? keep, str backend) -> Tensor")


def _moments_kernel(y: Tensor, keep: Tensor | None, backend: str) -> Tensor:
    """``[sum_m y; sum_m y^2]`` over the rows of ``keep`` [M], their number in the last column: float64 [2, N + 1]."""
    chosen, _ = choose(backend, y.device, y.dtype)
    rows = as_rows(y)
    if keep is None:
        sums = chosen.moments(rows)
        return torch.cat([sums, sums.new_full((2, 1), rows.shape[0])], dim=1)
    # On a GPU nothing is read back to find out how many rows there are.
    kept = rows[keep] if on_host(y.device) else torch.where(keep.unsqueeze(1), rows, 0)
    sums = chosen.moments(kept)
    return torch.cat([sums, keep.sum().to(sums.dtype).expand(2, 1)], dim=1)


def _moments_fake(y, keep, backend):
    return y.new_empty((2, y.shape[-1] + 1), dtype=torch.float64)


LIBRARY.impl("masked_moments", _moments_kernel, "CompositeExplicitAutograd")
torch.library.register_fake("fastlora::masked_moments", _moments_fake, lib=LIBRARY)


class _Moments(torch.autograd.Function):
    """Identity; the gradient of the moment leaf is the moments of the rows that count."""

    @staticmethod
    def forward(ctx, y: Tensor, V: Tensor, keep: Tensor | None, backend: str) -> Tensor:
        run = _moments_kernel if can_skip_dispatcher((y, keep)) else torch.ops.fastlora.masked_moments
        ctx.save_for_backward(run(y, keep, backend))
        # Not a view of y, which an owner could not add its bias to in place.
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        return dy, ctx.saved_tensors[0], None, None


class _MomentsOfRuns(torch.autograd.Function):
    """As ``_Moments``, of runs of rows one by one."""

    @staticmethod
    def forward(
        ctx, y: Tensor, V: Tensor, runs: Sequence[tuple[int, slice]], keep: Tensor | None, backend: str
    ) -> Tensor:
        sums = torch.zeros_like(V).view(2, -1, y.shape[1] + 1)
        for part, rows in runs:
            sums[:, part] = _moments_kernel(y[rows], None if keep is None else keep[rows], backend)
        ctx.save_for_backward(sums.flatten(1))
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        return dy, ctx.saved_tensors[0], None, None, None


def with_moments_of_runs(
    y: Tensor, V: Tensor, runs: Sequence[tuple[int, slice]], keep: Tensor | None, backend: str
) -> Tensor:
    """y [M, N] as it is; backward adds the moments of each run's rows to its part of V [2, parts (N + 1)]."""
    return _MomentsOfRuns.apply(y, V, runs, keep, backend)


def with_moments(y: Tensor, V: Tensor, keep: Tensor | None, backend: str) -> Tensor:
    """y [*, N] as it is; backward adds the moments of its rows ``keep`` [M] (None: all) to V [2, N + 1]."""
    return _Moments.apply(y, V, keep, backend)
