"""lora_linear and lora_grouped: the functions, and the one operator behind them with its shapes and its formula."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._utils.torch_compat import autocasting
from . import reference
from .autograd import LIBRARY, Operator, like
from .backends import choose
from .backends.planned import planned
from .layout import AdapterBatch, Dropout, Gradients, GroupLayout, LoraCall, Need, Rows, as_rows, picks_columns

# Lists run over adapters, then projections (A, B, Z, scale) or weights (V); P, sign, p and probes over adapters.
# rows is [ids, order, ranges] of the adapters' rows, empty where one adapter has all; drop is nothing, one seed, or
# the rows' keys; streams tell the masks of projections with one key apart, 0, 1, ... where empty; blocks are those of
# the weights' rows, 1 where empty.
LIBRARY.define(
    "lora_linear(Tensor x, Tensor[] W, Tensor?[] bias, Tensor[] A, Tensor[] B, Tensor[] Z, Tensor[] V, Tensor[] P, "
    "Tensor[] sign, Tensor? drop, Tensor[] rows, int[] starts, float[] scale, float[] p, int[] streams, int[] blocks, "
    "str backend, str engine) -> Tensor[]"
)
LIBRARY.define(
    "lora_linear_backward(Tensor?[] dy, Tensor x, Tensor h, Tensor[] W, Tensor[] A, Tensor[] B, int[] probes, "
    "Tensor? drop, Tensor[] rows, int[] starts, float[] scale, float[] p, int[] streams, int[] blocks, bool[] need, "
    "str backend, str engine) -> Tensor[]"
)


def _call(x, W, bias, A, B, P, probes, drop, rows, starts, scale, p, streams, blocks, engine, moments) -> LoraCall:
    layout, dropout = GroupLayout(W, B, starts, blocks), None
    if drop is not None:
        dropout = Dropout(drop, p, streams or range(layout.projections))
    return LoraCall(x, W, bias, A, B, P, probes, scale, layout, Rows(*rows) if rows else None, dropout, engine, moments)


def _forward(x, W, bias, A, B, Z, V, P, sign, drop, rows, starts, scale, p, streams, blocks, backend, engine):
    chosen, _ = choose(backend, x.device, x.dtype)
    call = _call(x, W, bias, A, B, P, probe_counts(P), drop, rows, starts, scale, p, streams, blocks, engine, bool(V))
    outputs, h, moments = planned(chosen).forward(call)
    flip_signs(h, sign, call.layout, call.rows)
    return [*outputs, h, *moments]


def flip_signs(h: Tensor, sign: Sequence[Tensor], layout: GroupLayout, rows: Rows | None) -> None:
    """Multiply the adapters' probe columns of h, which take no part in y, by their signs."""
    for g, signs in enumerate(sign):
        if signs.numel():
            _flip(h, signs, layout.of(g).rank, None if rows is None else rows.ids == g)


def _flip(h: Tensor, signs: Tensor, rank: int, mine: Tensor | None) -> None:
    """Of one adapter: h [M, width], signs [S, k], one a sample and probe; its rows (None: all)."""
    k = signs.shape[1]
    if mine is None:
        probe = h.view(signs.shape[0], -1, h.shape[1]).narrow(2, rank, h.shape[1] - rank)
        probe.mul_(signs.to(h.dtype).repeat(1, probe.shape[2] // k).unsqueeze(1))
        return
    each = signs.to(h.dtype).repeat_interleave(h.shape[0] // signs.shape[0], 0)
    h.narrow(1, rank, k).mul_(torch.where(mine.unsqueeze(1), each, 1.0))


def _forward_fake(x, W, bias, A, B, Z, V, P, sign, drop, rows, starts, scale, p, streams, blocks, backend, engine):
    layout = GroupLayout(W, B, starts)
    outputs = [x.new_empty((*x.shape[:-1], w.shape[0])) for w in W]
    adapters = len(A) // layout.projections if V else 0
    moments = [x.new_empty((2, w.shape[0] + 1), dtype=torch.float64) for _ in range(adapters) for w in W]
    width = layout.width([m.numel() if picks_columns(m) else m.shape[0] for m in P])
    return [*outputs, x.new_empty((_rows(x), width)), *moments]


def _rows(x: Tensor) -> int:
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    return rows


def probe_counts(P: Sequence[Tensor]) -> list[int]:
    """Columns of Q by adapter: rows of P, or columns of x for each projection."""
    return [m.shape[1] if picks_columns(m) else m.shape[0] for m in P]


def _backward(dy, x, h, W, A, B, probes, drop, rows, starts, scale, p, streams, blocks, need, backend, engine):
    chosen, _ = choose(backend, x.device, x.dtype)
    need, seen = Need(*need), as_rows(x)
    grads = [None if g is None else as_rows(g if g.dtype == x.dtype else g.to(x.dtype)) for g in dy]
    call = _call(x, W, [None] * len(W), A, B, (), probes, drop, rows, starts, scale, p, streams, blocks, engine, False)
    dx, dA, dB, dZ = like_operands(call, planned(chosen).backward(call, h, grads, need), need)
    out = [*([dx] if need.dx else []), *dA, *dB, *dZ]
    if need.dW:
        out += [torch.zeros_like(w) if g is None else torch.mm(g.t(), seen) for g, w in zip(grads, W, strict=True)]
    if need.dbias:
        out += [x.new_zeros(w.shape[0]) if g is None else g.sum(0) for g, w in zip(grads, W, strict=True)]
    return out


def like_operands(call: LoraCall, found: Gradients, need: Need) -> tuple[Tensor | None, list, list, list]:
    """The needed gradients in the shape and dtype of x, A, B and Z, zeros where nothing contributed."""
    dx, dA, dB, Q = found
    dZ: list[Tensor] = []
    if need.dZ:
        acc, columns = reference.accumulate_dtype(call.x.dtype), _columns(call.probes, len(call.B))
        dZ = [
            call.x.new_zeros((b.shape[0], k), dtype=acc) if q is None else q
            for q, b, k in zip(Q or [None] * len(call.B), call.B, columns, strict=True)
        ]
    return (
        dx.view(call.x.shape) if need.dx else None,
        list(map(like, dA, call.A)) if need.dA else [],
        list(map(like, dB, call.B)) if need.dB else [],
        dZ,
    )


def _columns(probes: Sequence[int], factors: int) -> list[int]:
    """Probe columns of every factor, from those of every adapter."""
    each = factors // len(probes) if probes else 0
    return [k for k in probes for _ in range(each)] or [0] * factors


def _backward_fake(dy, x, h, W, A, B, probes, drop, rows, starts, scale, p, streams, blocks, need, backend, engine):
    need, acc = Need(*need), reference.accumulate_dtype(x.dtype)
    out = [x.new_empty(x.shape)] if need.dx else []
    if need.dA:
        out += [torch.empty_like(a, memory_format=torch.contiguous_format) for a in A]
    if need.dB:
        out += [torch.empty_like(b, memory_format=torch.contiguous_format) for b in B]
    if need.dZ:
        out += [x.new_empty((b.shape[0], k), dtype=acc) for b, k in zip(B, _columns(probes, len(B)), strict=True)]
    if need.dW:
        out += [x.new_empty(w.shape) for w in W]
    if need.dbias:
        out += [x.new_empty((w.shape[0],)) for w in W]
    return out


def _backward_rest(rest: tuple) -> tuple:
    P, _, *shared = rest[:-2]
    return probe_counts(P), *shared


def _formula(x, W, bias, A, B, Z, rest):
    P, sign, drop, rows, _, scale, p, streams, blocks, _, _ = rest
    if rows:
        return reference.lora_grouped(x, W, bias, A, B, scale, rows[0], Z, P, sign, drop, p, streams, blocks)
    first = [found[0] if found else None for found in (P, sign)]
    return reference.lora_linear(x, W, bias, A, B, scale, Z, *first, drop, p[0] if p else 0.0, streams, blocks)


def _probe_leaves(B: Sequence[Tensor], rest: tuple) -> list[Tensor]:
    columns = _columns(probe_counts(rest[0]), len(B))
    return [b.new_zeros((b.shape[0], k)).requires_grad_() for b, k in zip(B, columns, strict=True)]


LORA_LINEAR = Operator("lora_linear", _forward, _backward, _backward_rest, _formula, _probe_leaves)
LORA_LINEAR.register(_forward_fake, _backward_fake)


def lora_linear(
    x: Tensor,
    W: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scale: Sequence[float],
    *,
    p: float = 0.0,
    Z: Sequence[Tensor] = (),
    V: Sequence[Tensor] = (),
    P: Tensor | None = None,
    sign: Tensor | None = None,
    blocks: Sequence[int] = (),
    backend: str = "auto",
    engine: str = "auto",
) -> list[Tensor]:
    r"""Linears that share ``x``, each with its low-rank update, in one call.

    .. math:: y_i = x W_i^\top + b_i + s_i\, \mathrm{dropout}(x)\, A_i^\top B_i^\top

    =========  ==============  ==========================================================
    x          [*, K]          one floating dtype with W and bias
    W, bias    [N_j, K] [N_j]  one entry a weight; bias entries may be None
    A, B       [r_i,K] [N_i,r] one entry a projection; projections tile the weights' rows
    scale                      one float a projection
    Z          [N_i, k]        zero leaves; their gradient is ``Q_i = G_{W_i} P^T``
    V          [2, N_j + 1]    zero float64 leaves; their gradient is the column sums of y
                               and y^2, with the number of rows in the last column
    P          [k, K]          probe rows (needed with Z); or int64 [projections, k], columns of
                               x instead of ``x P^T``, each projection's own
    sign       [S, k]          one sign per (sample of dimension 0, probe)
    blocks                     one integer a weight (1 without): how many equal blocks its rows
                               are, each with its part of every projection in order
    =========  ==============  ==========================================================

    ``backend`` is one of ``fastlora.backends.BACKENDS``; ``engine`` names who multiplies by W on a CPU
    (``fastlora.engines``). Returns one output [*, N_j] a weight. Dropout masks depend on a seed drawn from torch's
    generator, the projection, the row and the column. Raises ``TypeError`` or ``ValueError`` naming the argument,
    ``RuntimeError`` for a backend that cannot run.
    """
    check_input(x, W[0])
    scale = [float(s) for s in scale]
    return checked_linear(x, W, bias, A, B, scale, float(p), Z, V, P, sign, backend, engine, (), blocks)


def checked_linear(
    x, W, bias, A, B, scale, p, Z=(), V=(), P=None, sign=None, backend="auto", engine="auto", streams=(), blocks=()
) -> list[Tensor]:
    """``lora_linear`` of an input that was checked; scales and p are floats."""
    seed = new_seed(x.device) if p > 0.0 else None
    probes, signs = [[] if given is None else [given] for given in (P, sign)]
    rest = [], [], scale, [p], streams, blocks, backend, engine
    out = LORA_LINEAR.apply(x, W, bias, A, B, Z, V, probes, signs, seed, *rest)
    return out[: len(W)]


def lora_grouped(
    x: Tensor,
    W: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scale: Sequence[float],
    batch: AdapterBatch,
    *,
    p: Sequence[float] = (),
    dropout_salt: int = 0,
    streams: Sequence[int] = (),
    starts: Sequence[int] = (),
    blocks: Sequence[int] = (),
    Z: Sequence[Tensor] = (),
    V: Sequence[Tensor] = (),
    P: Sequence[Tensor] = (),
    sign: Sequence[Tensor] = (),
    backend: str = "auto",
    engine: str = "auto",
) -> list[Tensor]:
    r"""``lora_linear`` with an adapter for each row, ``batch`` saying which.

    .. math:: y_{im} = x_m W_i^\top + b_i + s_{gi}\, \mathrm{dropout}_g(x_m)\, A_{gi}^\top B_{gi}^\top,\qquad g = g(m)

    A, B, scale and Z run over the batch's adapters, then projections, V over adapters, then weights; P, sign and p
    over adapters, with [0, K] and [0, 0] where an adapter is not measured. ``dropout_salt`` tells the layers of one
    ``row_seeds`` apart, ``streams`` the projections of one salt (0, 1, ... without); ``starts`` are the
    ``column_starts`` of the batch's adapters, worked out here without; ``blocks`` as in ``lora_linear``. Gradients of
    an adapter come from its own rows. Raises as ``lora_linear`` does, and for ids that do not fit x.
    """
    check_input(x, W[0])
    rows, keys = batch.rows(x), None
    if any(p):
        keys = batch.keys(x, new_seed(x.device), dropout_salt)
    out = LORA_LINEAR.apply(
        x, W, bias, A, B, Z, V, P, sign, keys, list(rows), starts, [float(s) for s in scale],
        [float(q) for q in p] or [0.0] * len(batch.names), streams, blocks, backend, engine,
    )  # fmt: skip
    return out[: len(W)]


def new_seed(device: torch.device) -> Tensor:
    """A dropout seed from torch's generator, as a tensor: a checkpoint's restored state draws it again."""
    return torch.randint(2**62, (), dtype=torch.int64, device=device)


def check_input(x: Tensor, W: Tensor) -> None:
    """Refuse an input that the frozen weight cannot take, by name."""
    if x.dim() == 0 or x.shape[-1] != W.shape[1]:
        raise ValueError(f"x: expected last dimension {W.shape[1]} (in_features), got shape {tuple(x.shape)}")
    if x.device != W.device:
        raise ValueError(f"x: is on {x.device}, the weight on {W.device}; move one of them")
    if x.dtype != W.dtype and not autocasting(x):
        raise ValueError(f"x: has dtype {x.dtype}, the weight {W.dtype}; cast one of them or use torch.autocast")
