"""BoundCall: an adapted group whose operands are known before its input is, run without the dispatcher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._utils.torch_compat import (
    apply_directly,
    autocasting,
    counts_versions,
    nothing_watches,
    untracked,
    version_of,
)
from .autograd import LoraRest, differentiable_backward, moment_gradients
from .backends import choose
from .backends.plan import Plans
from .layout import Dropout, GroupLayout, LoraCall, Need, Rows, as_rows
from .lora import LORA_LINEAR, flip_signs, like_operands, probe_counts, rows_behind_moments

_PLAIN = (Tensor, torch.nn.Parameter)


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
    ):
        self.W, self.bias, self.A, self.B = tuple(W), tuple(bias), tuple(A), tuple(B)
        self.scale, self.backend, self.engine = [float(s) for s in scale], backend, engine
        self.layout = GroupLayout(W, B, starts)
        self.dtype, self.device = W[0].dtype, W[0].device
        self._no_dropout = [0.0] * (len(A) // self.layout.projections)
        self._frozen = [t for t in (*W, *bias) if t is not None]
        self._plain = all([type(t) in _PLAIN for t in (*self._frozen, *A, *B)])
        self._needs: dict[tuple, Need] = {}
        self._chosen: Any = None
        self.plans: Plans | None = None

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
        p = p or self._no_dropout
        if (
            not self._plain
            or type(x) not in _PLAIN
            or x.dtype != self.dtype
            or not nothing_watches()
            or autocasting(x)
            or True in [t.requires_grad for t in self._frozen]
        ):
            given = (Z, V, *self.rest(rows, key, p, P, sign))
            return LORA_LINEAR.apply(x, self.W, self.bias, self.A, self.B, *given)[: len(self.W)]
        if self._chosen is None:
            self._chosen, _ = choose(self.backend, self.device, self.dtype)
            self.plans = Plans() if self._chosen.plannable else None
        run = _Run(self, rows, key, p, P, sign, len(Z), len(V))
        if torch.is_grad_enabled():
            return _apply(run, x, *self.A, *self.B, *Z, *V)
        with untracked():
            return run.forward(x)[0]

    def rest(self, rows, key, p, P, sign) -> tuple:
        """The operands of the operator behind V."""
        given = [] if rows is None else list(rows)
        return P, sign, key, given, self.layout.starts, self.scale, p, self.backend, self.engine

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

    __slots__ = ("P", "bound", "drop", "leaves", "moments", "probes", "rows", "sign", "versions")

    def __init__(self, bound: BoundCall, rows, key, p, P, sign, leaves: int, moments: int):
        self.bound, self.rows, self.P, self.sign = bound, rows, P, sign
        self.drop = None if key is None else Dropout(key, p)
        self.leaves, self.moments = leaves, moments
        self.probes = tuple(probe_counts(P)) if P else ()
        self.versions = [version_of(w) if counts_versions(w) else None for w in bound.W]

    def call(self, x: Tensor, moments: bool) -> LoraCall:
        b = self.bound
        return LoraCall(
            x, b.W, b.bias, b.A, b.B, self.P, self.probes, b.scale, b.layout, self.rows, self.drop, b.engine, moments
        )

    def forward(self, x: Tensor) -> tuple[Sequence[Tensor], Tensor, Sequence[Tensor]]:
        """y, h and the moments of y."""
        bound = self.bound
        if bound.plans is None:
            return _forward(bound._chosen, self.call(x, self.moments > 0), self.sign)
        given = Given(x, bound.W, bound.bias, bound.A, bound.B, self.P, self.sign, self.rows or (), self._key())
        key = ("forward", self.moments > 0, self._p(), given.shape())

        def compute(tensors: list[Tensor]) -> list[Tensor]:
            y, h, moments = _forward(bound._chosen, *self._rebuilt(given.like(tensors), self.moments > 0))
            return [*y, h, *moments]

        out, count = bound.plans.run(key, given.tensors(), compute), len(bound.W)
        return out[:count], out[count], out[count + 1 :]

    def backward(self, x: Tensor, h: Tensor, dy: Sequence[Tensor | None], need: Need) -> tuple:
        """The gradients of x, A, B and Z that are needed."""
        bound = self.bound
        if bound.plans is None:
            return _backward(bound._chosen, self.call(x, False), h, dy, need)
        given = Given(x, bound.W, (), bound.A, bound.B, (), (), self.rows or (), self._key(), h, dy)
        key = ("backward", need, self.probes, self._p(), given.shape())

        def compute(tensors: list[Tensor]) -> list[Tensor | None]:
            again = given.like(tensors)
            call, _ = self._rebuilt(again, False)
            dx, dA, dB, dZ = _backward(bound._chosen, call, again.h, again.dy, need)
            return [dx, *dA, *dB, *dZ]

        dx, *rest = bound.plans.run(key, given.tensors(), compute)
        a = len(bound.A) if need.dA else 0
        b = a + (len(bound.B) if need.dB else 0)
        return dx, rest[:a], rest[a:b], rest[b:]

    def _p(self) -> tuple[float, ...]:
        return () if self.drop is None else tuple(self.drop.p)

    def _key(self) -> Tensor | None:
        return None if self.drop is None else self.drop.key

    def _rebuilt(self, given: Given, moments: bool) -> tuple[LoraCall, Sequence[Tensor]]:
        """The call of other tensors that are like its own."""
        b = self.bound
        bias = given.bias or b.bias
        drop = None if self.drop is None else Dropout(given.key, self.drop.p)
        rows = Rows(*given.rows) if given.rows else None
        call = LoraCall(
            given.x,
            given.W,
            bias,
            given.A,
            given.B,
            given.P,
            self.probes,
            b.scale,
            b.layout,
            rows,
            drop,
            b.engine,
            moments,
        )
        return call, given.sign

    def check_versions(self) -> None:
        for w, version in zip(self.bound.W, self.versions, strict=True):
            if version is not None and version_of(w) != version:
                raise RuntimeError(
                    "weight: expected as it was in the forward, since the backward multiplies by it; it was changed in "
                    "place after the forward"
                )


class Given(NamedTuple):
    """The tensors of a call, as one list and back."""

    x: Tensor
    W: Sequence[Tensor]
    bias: Sequence[Tensor | None]
    A: Sequence[Tensor]
    B: Sequence[Tensor]
    P: Sequence[Tensor]
    sign: Sequence[Tensor]
    rows: Sequence[Tensor]
    key: Tensor | None
    h: Tensor | None = None
    dy: Sequence[Tensor | None] = ()

    def _parts(self) -> tuple[Sequence[Tensor | None], ...]:
        one = ((self.x,), (self.key,), (self.h,))
        return (*one, self.W, self.bias, self.A, self.B, self.P, self.sign, self.rows, self.dy)

    def tensors(self) -> list[Tensor]:
        """All of them that are there."""
        return [t for part in self._parts() for t in part if t is not None]

    def shape(self) -> tuple:
        """How many there are of each, and which of them are not there."""
        return tuple([tuple([t is None for t in part]) for part in self._parts()])

    def like(self, tensors: Sequence[Tensor]) -> Given:
        """The same call of other tensors."""
        rest = iter(tensors)
        x, key, h, *parts = [[None if t is None else next(rest) for t in part] for part in self._parts()]
        W, bias, A, B, P, sign, rows, dy = parts
        return Given(x[0], W, bias, A, B, P, sign, rows, key[0], h[0], dy)


def _forward(backend: Any, call: LoraCall, sign: Sequence[Tensor]) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    y, h, moments = backend.forward(call)
    if sign:
        flip_signs(h, sign, call)
    return y, h, moments


def _backward(backend: Any, call: LoraCall, h: Tensor, dy: Sequence[Tensor | None], need: Need) -> tuple:
    dtype = call.x.dtype
    grads = [g if g is None else as_rows(g if g.dtype == dtype else g.to(dtype)) for g in dy]
    return like_operands(call, backend.backward(call, h, grads, need), need)


class _Bound(torch.autograd.Function):
    """y with gradients for x, A, B, Z and V."""

    @staticmethod
    def forward(ctx, run: _Run, x: Tensor, *leaves: Tensor):
        with untracked():
            y, h, moments = run.forward(x)
        ctx.run = run
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, h, *leaves[: len(leaves) - run.leaves - run.moments], *moments)
        return tuple(y)

    @staticmethod
    def backward(ctx, *dy):
        run, bound, needs = ctx.run, ctx.run.bound, ctx.needs_input_grad
        ctx.spent = True
        if all([g is None for g in dy]):
            return (None,) * len(needs)
        x, h, *saved = ctx.saved_tensors
        run.check_versions()
        count = len(bound.A)
        moments = saved[2 * count :]
        if torch.is_grad_enabled():
            return (None, *_again(run, needs[1:], dy, x, saved[:count], saved[count : 2 * count], moments))
        with untracked():
            dx, dA, dB, dZ = run.backward(x, h, dy, bound.need(needs[1:], run.leaves))
            if moments:
                counts = rows_behind_moments(x, None if run.rows is None else run.rows.ranges, len(moments))
                moments = moment_gradients(moments, counts)
        none = (None,) * count
        found = [dA or none, dB or none, dZ or (None,) * run.leaves, moments]
        if None in dy:
            found = _without_unused(found, dy, bound.layout)
        return (None, dx, *[g for part in found for g in part])


def _without_unused(found: list, dy: Sequence[Tensor | None], layout: GroupLayout) -> list[list[Tensor | None]]:
    """No gradient, as if it had run alone, for what belongs to an output that took no part in the backward."""
    outputs, n = layout.of(0).outputs, layout.projections
    *factors, moments = found
    used = [[None if dy[outputs[i % n]] is None else g for i, g in enumerate(part)] for part in factors]
    return [*used, [None if dy[i % len(dy)] is None else m for i, m in enumerate(moments)]]


def _again(run: _Run, needs, dy, x, A, B, moments) -> tuple:
    """create_graph: gradients that can be differentiated again."""
    bound, weights = run.bound, len(run.bound.W)
    drop = run.drop or (None, bound._no_dropout)
    rest = bound.rest(run.rows, *drop, run.P, run.sign)
    call = LoraRest(LORA_LINEAR, (weights, len(A), run.leaves, run.moments), rest, None, None)
    wanted = (needs[0], *[False] * (2 * weights), *needs[1:])
    dx, *found = differentiable_backward(call, wanted, dy, x, bound.W, bound.bias, A, B, moments)
    return dx, *found[2 * weights :]


_apply = apply_directly(_Bound)
