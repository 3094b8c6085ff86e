"""Who multiplies by the frozen weight on a CPU, measured once; the operator frozen_linear."""

from __future__ import annotations

import functools
import os
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .._utils.errors import unknown_choice
from .._utils.torch_compat import (
    as_no_view,
    onednn_linear,
    onednn_linear_add,
    onednn_pack,
    onednn_reason,
    without_autocast,
    without_graph,
)
from .autograd import LIBRARY, low_precision

AUTO, UNPACKED = "auto", "unpacked"
NONE = "none"  # somebody else multiplies: forward and backward are zero
LINEAR, ONEDNN, PACKED = "linear", "onednn", "onednn_packed"
NAMES = (LINEAR, ONEDNN, PACKED)
CHOICES = (AUTO, UNPACKED, *NAMES)
_OVERRIDE = "FASTLORA_CPU_ENGINE"  # names one of NAMES for every product whose layer names none

# Another engine replaces F.linear, whose bits are the base model's, only if it saves at least this share of its time.
# At 0.05 of the best of five runs, noise chose engines that were 3 to 8 % slower over a whole step; at 0.15 a packed
# weight that saves 12 % was passed over (results/floor.md). Nearer than this, further runs decide.
_WORTH_CHANGING = 0.08
_CLEAR = 0.15
_TIMING_ROUNDS = (5, 15)
_ONEDNN_DTYPES = (torch.float32, torch.bfloat16)


@dataclass
class _Packed:
    """oneDNN's copies of one weight, valid while the weight is as it was."""

    original: Tensor
    by_direction: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """The engine of one kind of product, with the seconds that each candidate took."""

    name: str
    seconds: dict[str, float]

    def __str__(self) -> str:
        if not self.seconds:
            return self.name
        return f"{self.name} ({', '.join(f'{n} {s * 1e3:.3g} ms' for n, s in self.seconds.items())})"


class MatmulEngines:
    """Chooses and runs ``x W^T + bias`` and ``dy W``; keeps choices and packed weights."""

    def __init__(self) -> None:
        self._choices: dict[tuple, Choice] = {}
        self._packed: dict[int, tuple[weakref.ref, _Packed]] = {}

    @functools.cached_property
    def override(self) -> str:
        """What the environment says, read once: reading it for every product of a small layer is 1 % of a step."""
        return os.environ.get(_OVERRIDE, "")

    def forward(self, x: Tensor, W: Tensor, bias: Tensor | None, engine: str = AUTO) -> Tensor:
        """``x W^T + bias``: x [*, K], W [N, K] -> [*, N]."""
        if engine == NONE:
            return x.new_zeros((*x.shape[:-1], W.shape[0]))
        rows = x.shape[0] if x.dim() == 2 else x.shape[:-1].numel()
        name = self.settled("forward", rows, W, engine)
        if name is None:
            name = self._measured("forward", rows, W, engine, lambda name: self._forward(name, x, W, bias, rows))
        return self._forward(name, x, W, bias, rows)

    def backward(self, dy: Tensor, W: Tensor, engine: str = AUTO, into: Tensor | None = None) -> Tensor:
        """``into + dy W``: dy [M, N], W [N, K] -> [M, K]; may write into ``into``."""
        if engine == NONE:
            return dy.new_zeros((dy.shape[0], W.shape[1])) if into is None else into
        rows = dy.shape[0]
        name = self.settled("backward", rows, W, engine)
        if name is None:
            name = self._measured("backward", rows, W, engine, lambda name: self._backward(name, dy, W, rows, None))
        return self._backward(name, dy, W, rows, into)

    def _forward(self, name: str, x: Tensor, W: Tensor, bias: Tensor | None, rows: int) -> Tensor:
        if name == LINEAR:
            y = F.linear(x, W, bias)
        else:
            weight = W if name == ONEDNN else self._pack("forward", W, rows)
            y = onednn_linear(x.reshape(rows, W.shape[1]), weight, bias)
            if x.dim() != 2:
                y = y.view(*x.shape[:-1], W.shape[0])
        return as_no_view(y)  # an in-place ReLU behind the layer may change it

    def _backward(self, name: str, dy: Tensor, W: Tensor, rows: int, into: Tensor | None) -> Tensor:
        if name == LINEAR:
            return torch.mm(dy, W) if into is None else into.addmm_(dy, W)
        weight = W.t() if name == ONEDNN else self._pack("backward", W, rows)
        if into is None:
            return onednn_linear(dy, weight, None)
        return onednn_linear_add(dy, into, weight)

    def settled(self, direction: str, rows: int, W: Tensor, engine: str) -> str | None:
        """The engine of a product, where nothing has to be measured for it."""
        wanted = self.override if engine in (AUTO, UNPACKED) else engine
        if not wanted and W.is_cpu and not W.requires_grad:
            choice = self._choices.get(self._key(direction, rows, W, engine))
            if choice is not None:
                return choice.name
        if not W.is_cpu or rows == 0:
            return LINEAR
        if wanted == NONE:
            return NONE
        if W.dtype not in _ONEDNN_DTYPES:
            return LINEAR
        if wanted:
            return _checked(wanted)
        return LINEAR if W.requires_grad or onednn_reason() is not None else None

    def _measured(self, direction: str, rows: int, W: Tensor, engine: str, run: Callable[[str], Tensor]) -> str:
        choice = _time(NAMES if engine == AUTO else (LINEAR, ONEDNN), run)
        self._choices[self._key(direction, rows, W, engine)] = choice
        if choice.name != PACKED:
            self.drop(W, direction)
        return choice.name

    @staticmethod
    def _key(direction: str, rows: int, W: Tensor, engine: str) -> tuple:
        return (direction, rows.bit_length(), W.shape, W.dtype, engine, torch.get_num_threads())

    def settled_on_linear(self, rows: int, W: Tensor, engine: str) -> bool:
        """Whether both directions were measured and the library's own linear won: nothing is left to decide."""
        found = [self._choices.get(self._key(d, rows, W, engine)) for d in ("forward", "backward")]
        won = all([choice is not None and choice.name == LINEAR for choice in found])
        return won and not self.override

    def _pack(self, direction: str, W: Tensor, rows: int) -> Tensor:
        """The packed copy of a weight for one direction, made anew whenever the weight has changed."""
        key, entry = id(W), self._packed.get(id(W))
        if entry is None or entry[0]() is not W or not _same_bits(entry[1].original, W):
            original = W.detach().clone(memory_format=torch.contiguous_format)
            entry = (weakref.ref(W, lambda _: self._packed.pop(key, None)), _Packed(original))
            self._packed[key] = entry
        packs = entry[1].by_direction
        if direction not in packs:
            source = W.detach() if direction == "forward" else W.detach().t().contiguous()
            packs[direction] = onednn_pack(source, rows)
        return packs[direction]

    def drop(self, W: Tensor, direction: str | None = None) -> None:
        """Free packed copies of a weight."""
        entry = self._packed.get(id(W))
        if entry is not None and entry[0]() is W:
            for key in [direction] if direction else list(entry[1].by_direction):
                entry[1].by_direction.pop(key, None)
            if not entry[1].by_direction:
                self._packed.pop(id(W), None)

    def packed_bytes(self, W: Tensor | None = None) -> int:
        """Memory of the packed copies of one weight, or of all, and of the copy that tells edits."""
        entries = [e for e in self._packed.values() if e[0]() is not None and (W is None or e[0]() is W)]
        return sum(p.numel() * p.element_size() for _, e in entries for p in (e.original, *e.by_direction.values()))

    def choices(self, W: Tensor) -> dict[str, Choice]:
        """What was chosen for weights of this shape: direction and rows -> choice."""
        return {
            f"{key[0]}, up to {2 ** key[1] - 1} rows": choice
            for key, choice in self._choices.items()
            if key[2:4] == (W.shape, W.dtype)
        }


def _same_bits(original: Tensor, W: Tensor) -> bool:
    """Whether a weight is as it was, every element: edits through ``.data``, NumPy and of inference tensors leave no
    trace. This costs less than a hash of the weight, and a copy of it."""
    if original.dtype != W.dtype or original.shape != W.shape:
        return False
    size = W.element_size()
    whole = W.is_contiguous() and W.numel() * size % 8 == 0 and W.storage_offset() * size % 8 == 0
    bits = torch.int64 if whole else torch.int32 if size == 4 else torch.int16
    return torch.equal(*[(t.view(-1) if whole else t).view(bits) for t in (original, W.detach())])


def _checked(name: str) -> str:
    if name not in NAMES:
        raise unknown_choice("FASTLORA_CPU_ENGINE or engine", name, CHOICES)
    reason = None if name == LINEAR else onednn_reason()
    if reason is not None:
        raise RuntimeError(f"engine {name!r} was asked for and cannot run: {reason}")
    return name


def _time(candidates: Sequence[str], run: Callable[[str], Tensor]) -> Choice:
    """Best of a few runs of each candidate, in alternating order; the library's own linear keeps ties."""
    seconds = dict.fromkeys(candidates, float("inf"))
    for name in candidates:
        run(name)
    few, most = _TIMING_ROUNDS
    for turn in range(most):
        for name in candidates if turn % 2 == 0 else tuple(reversed(candidates)):
            start = time.perf_counter()
            run(name)
            seconds[name] = min(seconds[name], time.perf_counter() - start)
        best = min(seconds, key=seconds.__getitem__)
        saved = 1 - seconds[best] / seconds[LINEAR]
        if turn + 1 >= few and not 0 < saved < _CLEAR:
            break
    return Choice(best if saved >= _WORTH_CHANGING else LINEAR, seconds)


# One per process, as a library's own kernel caches are: choices depend on the machine, packed copies on the weights.
ENGINES = MatmulEngines()

LIBRARY.define("frozen_linear(Tensor x, Tensor W, Tensor? bias, str engine) -> Tensor")
LIBRARY.define("frozen_linear_backward(Tensor dy, Tensor W, str engine) -> Tensor")


def _forward_fake(x, W, bias, engine):
    return x.new_empty((*x.shape[:-1], W.shape[0]))


def _backward_kernel(dy, W, engine):
    rows = dy.reshape(-1, W.shape[0]).to(W.dtype)
    return ENGINES.backward(rows, W, engine).view(*dy.shape[:-1], W.shape[1])


def _backward_fake(dy, W, engine):
    return W.new_empty((*dy.shape[:-1], W.shape[1]))


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, bias: Tensor | None, engine: str) -> Tensor:
        ctx.engine = engine
        ctx.save_for_backward(W)
        with without_graph():
            return torch.ops.fastlora.frozen_linear(x, W, bias, engine)

    @staticmethod
    def backward(ctx, dy: Tensor):
        (W,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return dy @ W, None, None, None
        return torch.ops.fastlora.frozen_linear_backward(dy, W, ctx.engine), None, None, None


def _autograd_kernel(x, W, bias, engine):
    if torch.is_grad_enabled() and x.requires_grad:
        return _FrozenLinear.apply(x, W, bias, engine)
    with without_graph():
        return torch.ops.fastlora.frozen_linear(x, W, bias, engine)


def _autocast_kernel(x, W, bias, engine):
    dtype = torch.get_autocast_dtype("cpu")
    low = low_precision(W, dtype)
    with without_autocast("cpu"):
        return torch.ops.fastlora.frozen_linear(
            low_precision(x, dtype),
            low,
            None if bias is None else low_precision(bias, dtype),
            engine if low is W else UNPACKED,
        )


LIBRARY.impl("frozen_linear", ENGINES.forward, "CompositeExplicitAutograd")
LIBRARY.impl("frozen_linear", _autograd_kernel, "Autograd")
LIBRARY.impl("frozen_linear", _autocast_kernel, "AutocastCPU")
LIBRARY.impl("frozen_linear_backward", _backward_kernel, "CompositeExplicitAutograd")
torch.library.register_fake("fastlora::frozen_linear", _forward_fake, lib=LIBRARY)
torch.library.register_fake("fastlora::frozen_linear_backward", _backward_fake, lib=LIBRARY)


def matmul_backward(dy: Sequence[Tensor | None], W: Sequence[Tensor], engine: str) -> Tensor | None:
    """``sum_j dy_j W_j`` over the outputs that have a gradient."""
    dx = None
    for grad, w in zip(dy, W, strict=True):
        if grad is not None:
            dx = ENGINES.backward(grad, w, engine, into=dx)
    return dx
