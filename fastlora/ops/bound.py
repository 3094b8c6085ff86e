"""BoundCall: an adapted group whose operands are known before its input is, run without the dispatcher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._utils.torch_compat import apply_directly, autocasting, nothing_watches, untracked
from .autograd import LoraRest, differentiable_backward, moment_gradients
from .backends import choose
from .backends.planned import planned
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
            self._chosen = planned(choose(self.backend, self.device, self.dtype)[0])
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
        self.probes = probe_counts(P) if P else ()
        self.versions = [None if w.is_inference() else w._version for w in bound.W]

    def call(self, x: Tensor, moments: bool) -> LoraCall:
        b = self.bound
        return LoraCall(
            x, b.W, b.bias, b.A, b.B, self.P, self.probes, b.scale, b.layout, self.rows, self.drop, b.engine, moments
        )

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        call = self.call(x, self.moments > 0)
        y, h, moments = self.bound._chosen.forward(call)
        if self.sign:
            flip_signs(h, self.sign, call)
        return y, h, moments

    def check_versions(self) -> None:
        for w, version in zip(self.bound.W, self.versions, strict=True):
            if version is not None and w._version != version:
                raise RuntimeError(
                    "weight: expected as it was in the forward, since the backward multiplies by it; it was changed in "
                    "place after the forward"
                )


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
        need, call = bound.need(needs[1:], run.leaves), run.call(x, False)
        with untracked():
            grads = [g if g is None else as_rows(g if g.dtype == x.dtype else g.to(x.dtype)) for g in dy]
            dx, dA, dB, dZ = like_operands(call, bound._chosen.backward(call, h, grads, need), need)
            if moments:
                counts = rows_behind_moments(x, None if run.rows is None else run.rows.ranges, len(moments))
                moments = moment_gradients(moments, counts)
        none = (None,) * count
        found = [dA or none, dB or none, dZ or (None,) * run.leaves, moments]
        if any([g is None for g in dy]):  # not `in`, which compares tensors
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
