"""BoundCall: an adapted group whose operands are known before its input is, run without the dispatcher."""

from __future__ import annotations

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
from .autograd import LoraRest, differentiable_backward, low_precision
from .backends import choose
from .backends.plan import Plans
from .layout import Dropout, GroupLayout, LoraCall, Need, Rows, as_rows
from .lora import LORA_LINEAR, flip_signs, like_operands, probe_counts
from .matmul import ENGINES, LINEAR
from .node import NODE, Pending

_PLAIN = (Tensor, torch.nn.Parameter)
MOST_OPTIONS = 64  # of which a group keeps the numbers of plans


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
        self._group: Any = None
        self._alone: tuple | None = None  # what a node takes of a call with nothing beside x, where that is known
        self._numbers: dict[Any, Any] = {}  # of plans, by what they depend on beside tensors
        self._settled: set[tuple] = set()
        self._needs: dict[tuple, Need] = {}

    def run(self, rows=None, key=None, p=(), Z=(), V=(), P=(), sign=()) -> _Run | None:
        """What a call takes beside x, None for nothing; the arguments are those of the operator ``lora_linear``.

        It may be kept for more calls, as long as its tensors are what they take.
        """
        return _Run(self, rows, key, p, Z, V, P, sign) if P or V or rows is not None or key is not None else None

    def __call__(
        self, x: Tensor, run: _Run | None = None, pending: Pending | None = None, also: Pending | None = None
    ) -> Sequence[Tensor]:
        """y_j [*, N_j]; ``run`` as the method gives it, and two that count the graph."""
        Z, V, node = ((), (), self._alone) if run is None else (run.Z, run.V, run.node)
        counters = None if pending is None else pending.native, None if also is None else also.native
        if self._group is not None:
            found = NODE.run(self._group, x, Z, V, self, run, *(node or self._node(run, x)), *counters)
            if found is not None:
                return found
        if (
            not self.plain
            or type(x) not in _PLAIN
            or x.dtype is not self.dtype
            or not nothing_watches()
            or autocasting(x)
            or True in [t.requires_grad for t in self.frozen]
        ):
            return self._watched(x, run, pending, also)
        if self.chosen is None:
            self._choose()
        whole = run or _Run(self)
        if not torch.is_grad_enabled():
            with untracked():
                return whole.forward(x)[: len(self.W)]
        if NODE is None:
            return _counted(_apply(whole, x, *self.A, *self.B, *Z, *V), pending, also)
        with untracked():
            out = whole.forward(x)
        if self._group is None:
            self._group = NODE.Group(self.W, self.bias, self.A, self.B, self.counted, *self.where, self.streams)
        return NODE.attach(self._group, x, Z, V, self, run, *self._node(run, x), *counters, list(out))

    def _node(self, run: _Run | None, x: Tensor) -> tuple:
        """What a node takes of a call: numbers of plans, directions that are one call of the library's, number of
        probes, p, and what the forward takes beside the tensors of every call, its last in the backward too."""
        if self.plans is not None:
            if run is None:
                self._alone = self.numbers(False), 0, 0, 0.0, (), 0
                return self._alone
            run.node = self.numbers(run.options), 0, sum(run.probes[:1]), 0.0, run.more, run.later
            return run.node
        if run is None:
            return None, self.whole_directions(x), 0, 0.0, (), 0
        if run.rows is not None:
            return None, 0, 0, 0.0, (), 0
        whole, seed = self.whole_directions(x), run.drop[:1]
        p = run.p[0] if seed else 0.0
        return None, whole & 2 if run.sign else whole, sum(run.probes[:1]), p, (*run.P, *seed), len(seed)

    def numbers(self, options: Any) -> Any:
        """Where the node finds the numbers of plans."""
        found = self._numbers.get(options)
        if found is None:
            if len(self._numbers) > MOST_OPTIONS:
                self._numbers.clear()  # options that differ at every call, as a dropout that is annealed
            found = self._numbers[options] = NODE.Plans()
        return found

    def differentiated(
        self, run: _Run | None, needs: Sequence[bool], dy: Sequence[Tensor | None], saved: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        """Gradients of x, A, B, Z and V; ``saved``: x, h, moments, A and B."""
        run, count, needs = run or _Run(self), len(self.A), tuple(needs)
        x, h, *saved = saved
        moments, A, B = saved[: run.moments], saved[run.moments : run.moments + count], saved[run.moments + count :]
        if differentiated_again(dy):
            return [*_again(run, needs, dy, x, A, B), *moments]
        need = self.need(needs, run.leaves)
        there = tuple([g is not None for g in dy])  # ``None in dy`` would ask every tensor whether it equals None
        with untracked():
            found = run.backward(x, h, A, B, dy, there, need)
        if need.dA and need.dB and need.dZ is (run.leaves > 0) and False not in there:
            return [*found, *moments]
        return [found[0], *_placed(found[1:], need, dy, self.layout, count, run.leaves, moments)]

    def _watched(self, x: Tensor, run: _Run | None, *pending: Pending | None) -> Sequence[Tensor]:
        """The call through the operator; without autocast where the weights have its dtype already."""
        if autocasting(x) and torch.get_autocast_dtype(x.device.type) is self.dtype:
            with without_autocast(x.device.type):
                return self(low_precision(x, self.dtype), run, *pending)
        if wants_plain_operators():
            raise Traced
        run = run or _Run(self)
        given = (run.Z, run.V, *self.rest(run.rows, run.key, run.p, run.P, run.sign))
        y = LORA_LINEAR.apply(x, self.W, self.bias, self.A, self.B, *given)[: len(self.W)]
        return _counted(y, *pending)

    def whole(self, direction: int, x: Tensor) -> Callable | None:
        """What does a direction (0: forward) in one call, where that is how it goes."""
        return self.chosen.whole[direction] if self.whole_directions(x) >> direction & 1 else None

    def whole_directions(self, x: Tensor) -> int:
        """Which directions go in one call, 1 for the forward and 2 for the backward: once each product is known to be
        the library's."""
        if self.chosen.whole is None:
            return 0
        elements = x.numel()
        key = (elements.bit_length(), torch.get_num_threads(), ENGINES.override)
        if key in self._settled:
            return 3
        rows = elements // max(x.shape[-1], 1)
        by_library = [
            all([ENGINES.settled(name, rows, w, self.engine) == LINEAR for w in self.W])
            for name in ("forward", "backward")
        ]
        if all(by_library):
            self._settled.add(key)
        return by_library[0] + 2 * by_library[1]

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
    """What one call of a ``BoundCall`` takes besides its input, and whatever follows from that."""

    def __init__(self, bound: BoundCall, rows=None, key=None, p=(), Z=(), V=(), P=(), sign=()):
        self.bound, self.rows, self.key, self.p = bound, rows, key, p
        self.Z, self.V, self.P, self.sign = Z, V, P, sign
        self.leaves, self.moments = len(Z), len(V)
        self.probes = tuple(probe_counts(P)) if P else ()
        self.drop = () if key is None else (key, p[0], bound.streams)  # for one adapter's rows
        later = [*(rows or ()), *([] if key is None else [key])]
        # What a plan takes beside the tensors of every call, the last ``later`` of them in the backward too.
        self.more, self.later = [*P, *sign, *later], len(later)
        self.options: Any = self.moments > 0  # what a plan depends on beside its tensors
        if self.more:
            streams = None if key is None else bound.streams
            self.options = (self.moments > 0, rows is None, streams, *p, self.probes, len(sign))
        # What a node takes of it, where that is known.
        self.node: tuple | None = None if self.more or V else bound._alone

    def forward(self, x: Tensor) -> Sequence[Tensor]:
        """[*y, h, *moments]."""
        bound = self.bound
        if bound.plans is None:
            if self.rows is None and (whole := bound.whole(0, x)) is not None:
                P = self.P[0] if self.P else None
                out = whole(x, bound.W, bound.bias, bound.A, P, bound.B, *bound.where, self.moments > 0, *self.drop)
                if out:
                    if self.sign:
                        flip_signs(out[len(bound.W)], self.sign, bound.layout, None)
                    return out
            return _forward(self, x, bound.W, bound.bias, bound.A, bound.B, self.P, self.sign, self.rows, self.key)
        return self._planned((0, self.options), [x, *bound.frozen, *bound.A, *bound.B, *self.more], self._forward_of)

    def _planned(self, key: tuple, tensors: list[Tensor], compute: Callable, need: int = -1) -> Sequence:
        """What a plan does; the node is told the plan's number. ``need``: of a backward, by the node's bits."""
        plans = self.bound.plans
        out = plans.run(key, tensors, compute)
        number = None if NODE is None or need is None else plans.number(key, tensors[0].dtype)
        if number is not None:
            numbers = self.bound.numbers(self.options) if self.node is None else self.node[0]
            numbers.keep(number[0], need, number[1])
        return out

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
            if self.rows is None and False not in there and (whole := bound.whole(1, x)) is not None:
                probes = self.probes[0] if need.dZ else 0
                out = whole(dy, x, h, bound.W, A, B, *bound.where, probes, need.dx, need.dA, need.dB, *self.drop)
                if out:
                    return out if need.dx else [None, *out]
            return _backward(self, x, h, bound.W, A, B, dy, need, self.rows, self.key)
        later = self.more[len(self.more) - self.later :]
        tensors = [x, h, *bound.W, *A, *B, *[g for g in dy if g is not None], *later]
        bits = None if False in there else need.dx + 2 * need.dA + 4 * need.dB + 8 * need.dZ
        key = (1, self.options, need, there)
        return self._planned(key, tensors, lambda given: self._backward_of(given, dy, need), bits)

    def _backward_of(self, tensors: list[Tensor], dy, need: Need) -> Sequence[Tensor | None]:
        """The backward of tensors that stand for this call's own."""
        take, bound = iter(tensors), self.bound
        x, h = next(take), next(take)
        W, A, B = [[next(take) for _ in own] for own in (bound.W, bound.A, bound.B)]
        grads = [None if g is None else next(take) for g in dy]
        rows = None if self.rows is None else Rows(*[next(take) for _ in self.rows])
        return _backward(self, x, h, W, A, B, grads, need, rows, None if self.key is None else next(take))


def _forward(run: _Run, x, W, bias, A, B, P, sign, rows, key) -> list[Tensor]:
    bound, drop = run.bound, None if key is None else Dropout(key, run.p, run.bound.streams)
    call = LoraCall(
        x, W, bias, A, B, P, run.probes, bound.scale, bound.layout, rows, drop, bound.engine, run.moments > 0
    )
    y, h, moments = bound.chosen.forward(call)
    if sign:
        flip_signs(h, sign, bound.layout, rows)
    return [*y, h, *moments]


def _backward(run: _Run, x, h, W, A, B, dy, need: Need, rows, key) -> list[Tensor | None]:
    bound, drop, dtype = run.bound, None if key is None else Dropout(key, run.p, run.bound.streams), x.dtype
    call = LoraCall(
        x, W, (), A, B, (), run.probes, bound.scale, bound.layout, rows, drop, bound.engine, False
    )  # fmt: skip
    grads = [g if g is None else as_rows(g if g.dtype == dtype else g.to(dtype)) for g in dy]
    dx, dA, dB, dZ = like_operands(call, bound.chosen.backward(call, h, grads, need), need)
    return [dx, *dA, *dB, *dZ]


class LoRA(torch.autograd.Function):
    """Where the node in C++ is not there: y with gradients for x, A, B, Z and V."""

    @staticmethod
    def forward(ctx, run: _Run, x: Tensor, *leaves: Tensor):
        with untracked():
            out = run.forward(x)
        count = len(run.bound.W)
        ctx.run, ctx.versions = run, [version_of(w) for w in run.bound.counted]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *out[count:], *leaves[: 2 * len(run.bound.A)])
        return tuple(out[:count])

    @staticmethod
    def backward(ctx, *dy):
        ctx.spent = True
        if all([g is None for g in dy]):
            return (None,) * len(ctx.needs_input_grad)
        saved = ctx.saved_tensors
        if [version_of(w) for w in ctx.run.bound.counted] != ctx.versions:
            raise RuntimeError(
                "weight: expected as it was in the forward, since the backward multiplies by it; it was changed in "
                "place after the forward"
            )
        return (None, *ctx.run.bound.differentiated(ctx.run, ctx.needs_input_grad[1:], dy, saved))


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


_apply = apply_directly(LoRA)


def _counted(y: Sequence[Tensor], *pending: Pending | None) -> Sequence[Tensor]:
    for counter in pending:
        if counter is not None:
            counter.add(y[0])
    return y
