"""BoundCall: an adapted group whose operands are known before its input is, run without the dispatcher."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._utils.torch_compat import (
    apply_directly,
    autocasting,
    counts_versions,
    differentiated_again,
    nothing_watches,
    untracked,
    version_of,
    wants_plain_operators,
    without_autocast,
)
from .autograd import LoraRest, differentiable_backward, low_precision, moment_gradients
from .backends import choose
from .backends.plan import Plans
from .layout import Dropout, GroupLayout, LoraCall, Need, Rows, as_rows
from .lora import LORA_LINEAR, flip_signs, like_operands, probe_counts, rows_behind_moments
from .matmul import ENGINES, LINEAR

_PLAIN = (Tensor, torch.nn.Parameter)


class Traced(Exception):
    """A transform or a tracer looks on, which has to see the operands being looked up."""


class BoundCall:
    """The adapted linears of one group with their weights, factors and scales; called with an input.

    What depends on these alone is worked out here, once. Frozen weights take no part in the graph: they are kept for
    the backward, with a check of their versions. A group whose weights are trained, or that a mode, a tracer, autocast
    or a subclass watches, goes through the operator instead.
    """

    def __init__(
        self,
        W: Sequence[Tensor],
        bias: Sequence[Tensor | None],
        A: Sequence[Tensor],
        B: Sequence[Tensor],
        scale: Sequence[float],
        backend: str,
        engine: str,
        starts: Sequence[int] = (),
        streams: Sequence[int] = (),
        blocks: Sequence[int] = (),
    ):
        self.W, self.bias, self.A, self.B = tuple(W), tuple(bias), tuple(A), tuple(B)
        self.scale, self.backend, self.engine = [float(s) for s in scale], backend, engine
        self.layout = GroupLayout(W, B, starts, blocks)
        self.streams = tuple(streams) or tuple(range(self.layout.projections))
        self.dtype, self.device = W[0].dtype, W[0].device
        self.no_dropout = [0.0] * (len(A) // self.layout.projections)
        self.frozen = [t for t in (*W, *bias) if t is not None]
        self.plain = all([type(t) in _PLAIN for t in (*self.frozen, *A, *B)])
        self.chosen: Any = None
        self.plans: Plans | None = None
        first = self.layout.of(0)
        self.where = (first.outputs, first.places, self.scale)
        self.counted = [w for w in W if counts_versions(w)]
        self._settled: set[tuple] = set()
        self._needs: dict[tuple, Need] = {}

    def __call__(
        self,
        x: Tensor,
        rows: Rows | None = None,
        key: Tensor | None = None,
        p: Sequence[float] = (),
        Z: Sequence[Tensor] = (),
        V: Sequence[Tensor] = (),
        P: Sequence[Tensor] = (),
        sign: Sequence[Tensor] = (),
    ) -> Sequence[Tensor]:
        """y_j [*, N_j]; the arguments are those of the operator ``lora_linear``."""
        if (
            not self.plain
            or type(x) not in _PLAIN
            or x.dtype is not self.dtype
            or not nothing_watches()
            or autocasting(x)
            or True in [t.requires_grad for t in self.frozen]
        ):
            return self._watched(x, rows, key, p, Z, V, P, sign)
        if self.chosen is None:
            self._choose()
        run = _Run(self)
        if P or V or rows is not None or key is not None:
            run.set(rows, key, p, P, sign, len(Z), len(V))
        if torch.is_grad_enabled():
            return _apply(run, x, *self.A, *self.B, *Z, *V)
        with untracked():
            return run.forward(x)[: len(self.W)]

    def _watched(self, x, rows, key, p, Z, V, P, sign) -> Sequence[Tensor]:
        """The call through the operator; without autocast where the weights have its dtype already."""
        if autocasting(x) and torch.get_autocast_dtype(x.device.type) is self.dtype:
            with without_autocast(x.device.type):
                return self(low_precision(x, self.dtype), rows, key, p, Z, V, P, sign)
        if wants_plain_operators():
            raise Traced
        given = (Z, V, *self.rest(rows, key, p, P, sign))
        return LORA_LINEAR.apply(x, self.W, self.bias, self.A, self.B, *given)[: len(self.W)]

    def whole(self, direction: int, x: Tensor) -> Callable | None:
        """What does a direction (0: forward) in one call, once each product is known to be the library's."""
        if self.chosen.whole is None:
            return None
        rows = x.numel() // max(x.shape[-1], 1)
        key = (direction, rows.bit_length(), torch.get_num_threads(), ENGINES.override)
        if key not in self._settled:
            name = ("forward", "backward")[direction]
            if any([ENGINES.settled(name, rows, w, self.engine) != LINEAR for w in self.W]):
                return None
            self._settled.add(key)
        return self.chosen.whole[direction]

    def _choose(self) -> None:
        self.chosen, _ = choose(self.backend, self.device, self.dtype)
        absent = tuple([b is None for b in self.bias])
        layout = tuple(self.layout.starts), self.layout.blocks
        scope = (self.chosen.name, len(self.W), absent, tuple(self.scale), *layout, self.engine)
        self.plans = Plans(scope) if self.chosen.plannable else None

    def rest(self, rows, key, p, P, sign) -> tuple:
        """The operands of the operator behind V."""
        given, layout = [] if rows is None else list(rows), self.layout
        where = p or self.no_dropout, self.streams, layout.blocks
        return P, sign, key, given, layout.starts, self.scale, *where, self.backend, self.engine

    def need(self, wanted: tuple[bool, ...], leaves: int) -> Need:
        """Which gradients a backward is asked for; ``wanted`` is for x, A, B, Z and V in turn."""
        found = self._needs.get((wanted, leaves))
        if found is None:
            a = 1 + len(self.A)
            b = a + len(self.B)
            parts = (wanted[:1], wanted[1:a], wanted[a:b], wanted[b : b + leaves])
            found = self._needs[(wanted, leaves)] = Need(*[True in part for part in parts], False, False)
        return found


class _Run:
    """One call of a ``BoundCall`` besides its differentiable tensors."""

    rows = key = None
    p = P = sign = probes = ()
    leaves = moments = 0
    plain = True  # all rows are one adapter's, without dropout
    options: Any = False  # what a plan depends on beside its tensors

    def __init__(self, bound: BoundCall):
        self.bound = bound
        self.versions = [version_of(w) for w in bound.counted]

    def set(self, rows, key, p, P, sign, leaves: int, moments: int) -> None:
        """What most calls have not."""
        self.rows, self.key, self.p, self.P, self.sign = rows, key, p, P, sign
        self.leaves, self.moments = leaves, moments
        self.probes = tuple(probe_counts(P)) if P else ()
        self.plain = rows is None and key is None
        streams = None if key is None else self.bound.streams
        self.options = (
            moments > 0 if self.plain and not P else (moments > 0, rows is None, streams, *p, self.probes, len(sign))
        )

    def forward(self, x: Tensor) -> Sequence[Tensor]:
        """[*y, h, *moments]."""
        bound = self.bound
        if bound.plans is None:
            if self.plain and not self.moments and (whole := bound.whole(0, x)) is not None:
                P = self.P[0] if self.P else None
                out = whole(x, bound.W, bound.bias, bound.A, P, bound.B, *bound.where, False)
                if out:
                    if self.sign:
                        flip_signs(out[len(bound.W)], self.sign, bound.layout, None)
                    return out
            return _forward(self, x, bound.W, bound.bias, bound.A, bound.B, self.P, self.sign, self.rows, self.key)
        tensors = [x, *bound.frozen, *bound.A, *bound.B]
        if self.options.__class__ is tuple:
            tensors += [*self.P, *self.sign, *(self.rows or ()), *([] if self.key is None else [self.key])]
        return bound.plans.run((0, self.options), tensors, self._forward_of)

    def _forward_of(self, tensors: list[Tensor]) -> Sequence[Tensor]:
        """The forward of tensors that stand for this call's own."""
        take, bound = iter(tensors), self.bound
        x, W = next(take), [next(take) for _ in bound.W]
        bias = [None if b is None else next(take) for b in bound.bias]
        A, B, P, sign = [[next(take) for _ in own] for own in (bound.A, bound.B, self.P, self.sign)]
        rows = None if self.rows is None else Rows(*[next(take) for _ in self.rows])
        return _forward(self, x, W, bias, A, B, P, sign, rows, None if self.key is None else next(take))

    def backward(
        self, x: Tensor, h: Tensor, A: Sequence[Tensor], B: Sequence[Tensor], dy, there, need: Need
    ) -> Sequence:
        """[dx, *dA, *dB, *dZ], those of what is not needed left out but for dx; ``there``: which dy are not None."""
        bound = self.bound
        if bound.plans is None:
            if (
                self.key is None
                and self.rows is None
                and False not in there
                and (whole := bound.whole(1, x)) is not None
            ):
                probes = self.probes[0] if need.dZ else 0
                out = whole(dy, x, h, bound.W, A, B, *bound.where, probes, need.dx, need.dA, need.dB)
                if out:
                    return out if need.dx else [None, *out]
            return _backward(self, x, h, bound.W, A, B, dy, need, self.rows, self.key)
        tensors = [x, h, *bound.W, *A, *B, *[g for g in dy if g is not None]]
        if self.options.__class__ is tuple:
            tensors += [*(self.rows or ()), *([] if self.key is None else [self.key])]
        return bound.plans.run(
            (1, self.options, need, there),
            tensors,
            lambda given: self._backward_of(given, dy, need),
        )

    def _backward_of(self, tensors: list[Tensor], dy, need: Need) -> Sequence[Tensor | None]:
        """The backward of tensors that stand for this call's own."""
        take, bound = iter(tensors), self.bound
        x, h = next(take), next(take)
        W, A, B = [[next(take) for _ in own] for own in (bound.W, bound.A, bound.B)]
        grads = [None if g is None else next(take) for g in dy]
        rows = None if self.rows is None else Rows(*[next(take) for _ in self.rows])
        return _backward(self, x, h, W, A, B, grads, need, rows, None if self.key is None else next(take))

    def check_versions(self) -> None:
        if [version_of(w) for w in self.bound.counted] != self.versions:
            raise RuntimeError(
                "weight: expected as it was in the forward, since the backward multiplies by it; it was changed in "
                "place after the forward"
            )


def _forward(run: _Run, x, W, bias, A, B, P, sign, rows, key) -> list[Tensor]:
    bound, drop = run.bound, None if key is None else Dropout(key, run.p, run.bound.streams)
    call = LoraCall(
        x, W, bias, A, B, P, run.probes, bound.scale, bound.layout, rows, drop, bound.engine, run.moments > 0
    )
    y, h, moments = bound.chosen.forward(call)
    if sign:
        flip_signs(h, sign, bound.layout, rows)
    if moments and rows is None:
        count = x.shape[:-1].numel()
        moments = [torch.cat([m, _count(count, m.dtype, m.device)], dim=1) for m in moments]
    elif moments:
        moments = moment_gradients(moments, rows_behind_moments(x, rows.ranges, len(moments)))
    return [*y, h, *moments]


@functools.cache
def _counts() -> Callable[[int, torch.dtype, torch.device], Tensor]:
    from ..kernels.constants import device_constant  # importing the package loads no kernels

    return device_constant(maxsize=256)(
        lambda rows, dtype, device: torch.full((2, 1), rows, dtype=dtype, device=device)
    )


def _count(rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The number of rows beside the column sums: what a moment leaf [2, N + 1] accumulates."""
    return _counts()(rows, dtype, device)


def _backward(run: _Run, x, h, W, A, B, dy, need: Need, rows, key) -> list[Tensor | None]:
    bound, drop, dtype = run.bound, None if key is None else Dropout(key, run.p, run.bound.streams), x.dtype
    call = LoraCall(
        x, W, (), A, B, (), run.probes, bound.scale, bound.layout, rows, drop, bound.engine, False
    )  # fmt: skip
    grads = [g if g is None else as_rows(g if g.dtype == dtype else g.to(dtype)) for g in dy]
    dx, dA, dB, dZ = like_operands(call, bound.chosen.backward(call, h, grads, need), need)
    return [dx, *dA, *dB, *dZ]


class _Bound(torch.autograd.Function):
    """y with gradients for x, A, B, Z and V."""

    @staticmethod
    def forward(ctx, run: _Run, x: Tensor, *leaves: Tensor):
        with untracked():
            out = run.forward(x)
        count = len(run.bound.W)
        ctx.run = run
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *out[count:], *leaves[: 2 * len(run.bound.A)])
        return tuple(out[:count])

    @staticmethod
    def backward(ctx, *dy):
        run, needs = ctx.run, ctx.needs_input_grad
        bound, count = run.bound, len(run.bound.A)
        ctx.spent = True
        there = tuple([g is not None for g in dy])  # ``None in dy`` would ask every tensor whether it equals None
        if True not in there:
            return (None,) * len(needs)
        x, h, *saved = ctx.saved_tensors
        moments, A, B = saved[: run.moments], saved[run.moments : run.moments + count], saved[run.moments + count :]
        run.check_versions()
        if differentiated_again(dy):
            return (None, *_again(run, needs[1:], dy, x, A, B), *moments)
        need = bound.need(needs[1:], run.leaves)
        with untracked():
            found = run.backward(x, h, A, B, dy, there, need)
        if need.dA and need.dB and need.dZ is (run.leaves > 0) and False not in there:
            return (None, *found, *moments)
        return (None, found[0], *_placed(found[1:], need, dy, bound.layout, count, run.leaves, moments))


def _placed(found, need: Need, dy, layout: GroupLayout, count: int, leaves: int, moments) -> list[Tensor | None]:
    """Gradients of A, B, Z and V: None for what is not needed, and, as if it had run alone, for what belongs to an
    output that took no part in the backward."""
    rest, outputs, n = iter(found), layout.of(0).outputs, layout.projections
    factors = [
        [next(rest) for _ in range(size)] if wanted else [None] * size
        for wanted, size in ((need.dA, count), (need.dB, count), (need.dZ, leaves))
    ]
    used = [None if dy[outputs[i % n]] is None else g for part in factors for i, g in enumerate(part)]
    return [*used, *[None if dy[i % len(dy)] is None else m for i, m in enumerate(moments)]]


def _again(run: _Run, needs, dy, x, A, B) -> Sequence[Tensor | None]:
    """Gradients of the written-out formula."""
    bound, weights = run.bound, len(run.bound.W)
    rest = bound.rest(run.rows, run.key, run.p, run.P, run.sign)
    call = LoraRest(LORA_LINEAR, (weights, len(A), run.leaves, 0), rest, None, None)
    wanted = (needs[0], *[False] * (2 * weights), *needs[1:])
    dx, *found = differentiable_backward(call, wanted, dy, x, bound.W, bound.bias, A, B, ())
    return dx, *found[2 * weights :]


_apply = apply_directly(_Bound)
