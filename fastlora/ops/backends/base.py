"""Backend: the protocol of what runs an adapted group; ComposedBackend: built from skinny kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..layout import Gradients, Layout, LoraCall, Need, as_rows, picks_columns
from ..matmul import ENGINES, matmul_backward


class Backend(Protocol):
    """What runs an adapted group of linears and reduces gradients; the meaning is that of ``reference``.

    Moments and gradients of several adapters may be parts of one tensor.
    """

    name: str
    unsupported_reason: Callable[[torch.device, torch.dtype], str | None]
    plannable: bool  # whether what it does for a call may be written down once and repeated
    whole: tuple[Callable, Callable] | None  # linear_lora_forward, linear_lora_backward; None: it has none

    def forward(self, call: LoraCall) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """``y_j = x W_j^T + bias_j + s h B^T``, ``h = [dropout(x) A^T | x P^T]``: y_j [*, N_j], h [M, width], moments.

        A row's h holds its own adapter's columns first. Moments are float64 [2, N_j + 1], column sums of y_j and y_j^2
        with the number of rows in the last column, by adapter, then output; none unless the call asks for them.
        """
        ...

    def backward(self, call: LoraCall, h: Tensor, dy: Sequence[Tensor | None], need: Need) -> Gradients:
        """``dx = sum_j dy_j W_j + dh A``, ``dA = dh^T x``, ``dB = s dy^T h``, ``Q = dy^T h_P``.

        dy_j [M, N_j], None where no gradient came.
        """
        ...

    def gradstat(self, x: Tensor, dy: Sequence[Tensor], offsets: Sequence[int], absolute: bool = True) -> Tensor:
        """Sum of squares and of absolute values of each dy_i^T x per run of rows: [matrices, runs, 2].

        Without ``absolute`` the second column is zero, and short runs may cost less.
        """
        ...

    def moments(self, y: Tensor) -> Tensor:
        """Column sums of y [M, N] and of its squares: float64 [2, N]."""
        ...

    def outer(self, dy: Tensor, columns: Tensor) -> Tensor:
        """``dy^T columns``: dy [M, N], columns [M, k] in its dtype -> [N, k] in the accumulation dtype."""
        ...

    def add_gram_(self, total: Tensor, rows: Tensor, weight: Tensor) -> None:
        """``total += weight rows^T rows`` on and above the diagonal; total [D, D], rows [M, D], weight a scalar tensor.

        A weight of 0 adds nothing, whatever the rows hold.
        """
        ...


_GRAM_BLOCK = 256  # columns of a block of a Gram matrix


@dataclass(frozen=True)
class ComposedBackend:
    """The protocol from skinny kernels around the library's matmul; each adapter's rows are taken out and put back.

    ``kernels`` supplies shrink, expand_, wgrad, outer, dropout, dropout_rows, gradstat and column_moments. A backend
    with fused kernels overrides ``forward`` and ``backward``.
    """

    name: str
    kernels: Any
    unsupported_reason: Callable[[torch.device, torch.dtype], str | None]
    plannable: bool = False
    whole: ClassVar[tuple[Callable, Callable] | None] = None

    def forward(self, call: LoraCall) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """As ``Backend.forward``."""
        outputs = [ENGINES.forward(call.x, w, b, call.engine) for w, b in zip(call.W, call.bias, strict=True)]
        y, x, sums = [out.view(-1, out.shape[-1]) for out in outputs], as_rows(call.x), {}
        h = None if call.rows is None else x.new_zeros(x.shape[0], call.layout.width([p.shape[0] for p in call.P]))
        for g, mine in _adapters(call):
            layout, first = call.layout.of(g), g * call.layout.projections
            own = self._shrink(call, g, mine, _take(x, mine))
            if h is None:
                h = own
            else:
                _put_(h[:, : own.shape[1]], mine, own)
            for j, out in enumerate(y):
                target, held = _take(out, mine), [i for i, output in enumerate(layout.outputs) if output == j]
                runs = [(i, *run) for i in held for run in layout.runs_of(i)]
                B = {i: call.B[first + i].to(out.dtype).t() for i in held}
                sums[g * len(y) + j] = self.kernels.expand_(
                    target,
                    own,
                    [B[i].narrow(1, row, count) for i, row, _, count in runs],
                    [layout.offsets[i] for i, *_ in runs],
                    [column for _, _, column, _ in runs],
                    [call.scale[first + i] for i, *_ in runs],
                    call.moments,
                )
                _put_(out, mine, target)
        if not call.moments:
            return outputs, h, []
        count = len(call.A) // call.layout.projections * len(y)
        zeros = [x.new_zeros((2, out.shape[1]), dtype=torch.float64) for out in y]
        return outputs, h, with_counts([sums.get(i, zeros[i % len(y)]) for i in range(count)], call)

    def _shrink(self, call: LoraCall, g: int, mine: Tensor | None, x: Tensor) -> Tensor:
        first = g * call.layout.projections
        A, P = call.A[first : first + call.layout.projections], call.P[g] if call.P else None
        columns = [x.index_select(1, P.reshape(-1))] if picks_columns(P) else []
        probes = [] if columns or P is None else [P]
        if _drops(call, g):
            parts = [self.kernels.shrink(self._dropout(call, g, mine, x, i), a.to(x.dtype)) for i, a in enumerate(A)]
            parts += [self.kernels.shrink(x, p.to(x.dtype)) for p in probes]
            return torch.cat([*parts, *columns], dim=1)
        h = self.kernels.shrink(x, torch.cat([*A, *probes]).to(x.dtype))
        return torch.cat([h, *columns], dim=1) if columns else h

    def _dropout(self, call: LoraCall, g: int, mine: Tensor | None, x: Tensor, projection: int) -> Tensor:
        if mine is None:
            return self.kernels.dropout(x, call.drop.key, call.drop.streams[projection], call.drop.p[g])
        keys = call.drop.key if mine.dtype == torch.bool else call.drop.key[mine]
        return self.kernels.dropout_rows(x, keys, call.drop.streams[projection], call.drop.p[g])

    def backward(self, call: LoraCall, h: Tensor, dy: Sequence[Tensor | None], need: Need) -> Gradients:
        """As ``Backend.backward``."""
        x, n = as_rows(call.x), call.layout.projections
        dx = matmul_backward(dy, call.W, call.engine) if need.dx else None
        grads = Gradients(dx, *([None] * len(call.A) for _ in range(3)))
        probes = call.probes if need.dZ else [0] * (len(call.A) // n)
        for g, mine in _adapters(call):
            layout, seen = call.layout.of(g), _take(x, mine)
            live = [i for i, j in enumerate(layout.outputs) if dy[j] is not None]
            if not live:
                continue
            dh, packed = self._wgrad(call, g, mine, seen, h, dy, layout, live, probes[g], need, grads)
            for i in live if need.dA else ():
                part = slice(layout.offsets[i], layout.offsets[i] + layout.ranks[i])
                if _drops(call, g):
                    grads.dA[g * n + i] = self.kernels.outer(dh[:, part], self._dropout(call, g, mine, seen, i))
                else:  # outputs of an operator must not share memory
                    grads.dA[g * n + i] = packed[part].clone() if len(call.A) > 1 else packed[part]
            if dx is not None:
                target = _take(dx, mine)
                self._add_dx(call, g, mine, target, dh, layout)
                _put_(dx, mine, target)
        return grads

    def _wgrad(self, call, g, mine, x, h, dy, layout, live, probes, need, grads) -> tuple[Tensor, Tensor]:
        """dh and dA of an adapter's rows; its dB and Q go where they belong."""
        first, own = g * call.layout.projections, _take(h, mine)
        if mine is not None or not probes:
            own = own[:, : layout.rank + probes]
        elif len(live) < layout.projections and own.shape[1] - layout.rank > probes:
            # Every projection has columns of its own: those of the live ones.
            kept = [own.narrow(1, layout.rank + i * probes, probes) for i in live]
            own = torch.cat([own.narrow(1, 0, layout.rank), *kept], dim=1)
        taken = {j: _take(dy[j], mine) for j in {layout.outputs[i] for i in live}}
        dh, packed, dB, Q = self.kernels.wgrad(
            x,
            [layout.columns_of(taken[layout.outputs[i]], i) for i in live],
            own,
            [call.B[first + i].to(x.dtype) for i in live],
            [layout.offsets[i] for i in live],
            [call.scale[first + i] for i in live],
            layout.rank,
            probes,
            need.dA and not _drops(call, g),
        )
        for position, i in enumerate(live):
            grads.dB[first + i], grads.Q[first + i] = dB[position], Q[position]
        return dh, packed

    def _add_dx(self, call: LoraCall, g: int, mine: Tensor | None, dx: Tensor, dh: Tensor, layout: Layout) -> None:
        """``dx += dh A`` for an adapter's rows."""
        first = g * layout.projections
        A = call.A[first : first + layout.projections]
        if not _drops(call, g):
            self.kernels.expand_(dx, dh, [torch.cat(list(A)).to(dh.dtype)], [0], [0], [1.0], False)
            return
        for i, a in enumerate(A):
            part = torch.zeros_like(dx)
            self.kernels.expand_(part, dh, [a.to(dh.dtype)], [layout.offsets[i]], [0], [1.0], False)
            dx += self._dropout(call, g, mine, part, i)

    def gradstat(self, x: Tensor, dy: Sequence[Tensor], offsets: Sequence[int], absolute: bool = True) -> Tensor:
        """As ``Backend.gradstat``."""
        return torch.stack([self.kernels.gradstat(x, part, offsets, absolute) for part in dy])

    def moments(self, y: Tensor) -> Tensor:
        """As ``Backend.moments``."""
        return self.kernels.column_moments(y)

    def outer(self, dy: Tensor, columns: Tensor) -> Tensor:
        """As ``Backend.outer``."""
        return self.kernels.outer(columns, dy).t().contiguous()

    def add_gram_(self, total: Tensor, rows: Tensor, weight: Tensor) -> None:
        """As ``Backend.add_gram_``, by blocks: half the work of the whole product."""
        rows = rows.to(total.dtype)
        for start in range(0, rows.shape[1], _GRAM_BLOCK):
            stop = min(start + _GRAM_BLOCK, rows.shape[1])
            block = rows[:, start:stop].T @ rows[:, start:]
            total[start:stop, start:] += torch.where(weight == 0, 0.0, weight * block)


def with_counts(sums: Sequence[Tensor], call: LoraCall) -> list[Tensor]:
    """Column sums [2, N_j] by adapter, then output, with the number of rows behind them in one more column."""
    if call.rows is None:
        counts = [m.new_full((2, 1), call.x.shape[:-1].numel()) for m in sums]
    else:
        rows = call.rows.ranges.diff().to(torch.float64)
        counts = [count.expand(2, 1) for count in rows.unbind() for _ in call.W]
    return [torch.cat(both, dim=1) for both in zip(sums, counts, strict=True)] if sums else []


def _adapters(call: LoraCall) -> Iterator[tuple[int, Tensor | None]]:
    """(adapter, its rows), None meaning all."""
    return iter([(0, None)]) if call.rows is None else call.rows.each()


def _take(tensor: Tensor, mine: Tensor | None) -> Tensor:
    """The rows of an index, all rows with zeros outside of a mask, or the tensor itself."""
    if mine is None:
        return tensor
    return torch.where(mine.unsqueeze(1), tensor, 0) if mine.dtype == torch.bool else tensor.index_select(0, mine)


def _put_(tensor: Tensor, mine: Tensor | None, rows: Tensor) -> None:
    """Write what was made of ``_take``."""
    if mine is None:
        return
    if mine.dtype == torch.bool:
        tensor.copy_(torch.where(mine.unsqueeze(1), rows, tensor))
    else:
        tensor.index_copy_(0, mine, rows)


def _drops(call: LoraCall, g: int) -> bool:
    return call.drop is not None and call.drop.p[g] > 0.0
