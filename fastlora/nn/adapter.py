"""An adapter on a layer: factors by slice, initialisation, and the operand lists kept between calls."""

from __future__ import annotations

import itertools
import math
import operator
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .._utils.errors import check_integer, wrong_value
from .._utils.torch_compat import forward_hooks, wants_plain_operators
from ..config import LoraConfig
from ..ops.bound import BoundCall, Traced
from ..ops.node import NODE
from ..ops.row_norms import RowLengths

START = "start_"  # before the name of a slice: the buffer that keeps the factor it started with
WHOLE = "weight"  # name of the one slice of a matrix that is not split


class Slices(dict[str, int]):
    """Rows of each slice of a matrix, by name.

    The matrix holds ``blocks`` equal blocks of rows, each with its part of every slice in order: one block is
    [q; k; v], one a head is [q_1; k_1; v_1; q_2; ...].
    """

    def __init__(self, rows: Mapping[str, int], blocks: int = 1):
        super().__init__(rows)
        self.blocks = blocks

    def __eq__(self, other: object) -> bool:
        return isinstance(other, dict) and dict.__eq__(self, other) and self.blocks == getattr(other, "blocks", 1)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None

    def __reduce__(self) -> tuple:
        return Slices, (dict(self), self.blocks)

    def __repr__(self) -> str:
        return dict.__repr__(self) + (f" in {self.blocks} blocks" if self.blocks > 1 else "")

    def runs(self, name: str) -> list[slice]:
        """Runs of rows of the matrix that make up a slice: one, or one a block."""
        names, stride = [*self], sum(self.values()) // self.blocks
        start = sum(self[other] for other in names[: names.index(name)]) // self.blocks
        stop = start + self[name] // self.blocks
        return [slice(start + first, stop + first) for first in range(0, self.blocks * stride, stride)]

    def rows(self, name: str) -> slice | Tensor:
        """Rows of the matrix that a slice covers: a range, or int64 indices where slices interleave."""
        runs = self.runs(name)
        return (
            runs[0] if len(runs) == 1 else torch.cat([torch.arange(run.start, run.stop, device="cpu") for run in runs])
        )

    def columns(self, y: Tensor, name: str) -> Tensor:
        """The columns of y [M, N] that are a slice's: a view where they are together."""
        run = self.runs(name)[0]
        return y.unflatten(1, (self.blocks, -1))[:, :, run].flatten(1)

    def interleave(self, parts: Sequence[Tensor]) -> Tensor:
        """Rows of each slice, one after another in ``parts`` [N_i, *], as they lie in the matrix [N, *]."""
        return torch.cat([part.unflatten(0, (self.blocks, -1)) for part in parts], dim=1).flatten(0, 1)


class Factors(nn.Module):
    """A or B of one adapter: one parameter a slice, ``None`` where the rank is 0.

    With B go a ``bias`` [N] (``lora_bias``) and a ``magnitude`` [N] (``use_dora``), where the adapter has them.
    """

    def __init__(self, tensors: Mapping[str, Tensor | None]):
        super().__init__()
        self.slices = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor))

    def forward(self) -> dict[str, Tensor | None]:
        """The factor of every slice, as attributes give them: through parametrisations, pruning and replicas."""
        return self.tensors()

    def tensors(self) -> dict[str, Tensor | None]:
        """The factor of every slice as it is stored, whatever hooks a call would run, as those of pruning."""
        return {name: getattr(self, name) for name in self.slices}

    def own(self, adapter: str) -> Mapping[str, nn.Parameter | None]:
        """The parameters to write to, by name; ``ValueError`` where others compute what a call would read."""
        names = (*self.slices, "bias", "magnitude")
        if any(name not in self._parameters and getattr(self, name, None) is not None for name in names):
            raise ValueError(
                f"adapter: the factors of {adapter!r} are parametrized or pruned and would lose what is written to "
                "them; remove the parametrization first"
            )
        return self._parameters

    def beside(self) -> dict[str, Tensor]:
        """What stands beside the slices, by name: ``bias``, ``magnitude``."""
        found = {name: getattr(self, name, None) for name in ("bias", "magnitude")}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def start(self, name: str, value: Tensor) -> None:
        """Give a slice's factor a ``value``, and remember it: a part of the weight that is taken out of it."""
        getattr(self, name).copy_(value)
        self.register_buffer(START + name, value)

    def starts(self) -> dict[str, Tensor]:
        """The factors that were taken out of the weight at the start, by slice (``initialize_corda``)."""
        return {n.removeprefix(START): b for n, b in self._buffers.items() if n.startswith(START) and b is not None}

    def extra_repr(self) -> str:
        return ", ".join(f"{n}: {'rank 0' if p is None else tuple(p.shape)}" for n, p in self.tensors().items())


_TAKEN = frozenset((*dir(Factors({})), "bias", "magnitude"))  # names in ``Factors`` that are no slice's


def check_slice_name(argument: str, name: Any) -> str:
    """``name`` as that of a slice, whose factors are parameters of that name."""
    if not isinstance(name, str) or not name or "." in name or name in _TAKEN or name.startswith(START):
        accepted = "names of slices without dots, and not those that modules and adapters use themselves"
        raise wrong_value(argument, accepted, name)
    return name


def adapter_dtype_of(config: LoraConfig, layer: nn.Module) -> torch.dtype:
    """float32 adapters unless the config says otherwise or the weight is float64."""
    if config.adapter_dtype is not None:
        return config.adapter_dtype
    return torch.float64 if layer.weight.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class AdapterSpec:
    """What a layer knows of an adapter besides its tensors: scaling by slice, dropout, initialisation."""

    scale: Mapping[str, float]
    dropout: float
    init: bool | str
    dtype: torch.dtype

    def with_scale(self, scale: Mapping[str, float]) -> AdapterSpec:
        return replace(self, scale=dict(scale))


def new_factors(
    slices: Mapping[str, int],
    ranks: Mapping[str, int],
    in_features: int,
    spec: AdapterSpec,
    device: torch.device,
    groups: int = 1,
    lookup: bool = False,
) -> tuple[Factors, Factors]:
    """Fresh (A, B): A Kaiming uniform (``"gaussian"``: normal / r), B zero; ``init=False`` draws B like A.

    slices: name -> N; ranks: name -> r; A [r, K], B [N, r / groups]. ``lookup``, an embedding: A zero and B normal;
    ``init=False`` draws A like B.
    """
    A: dict[str, Tensor | None] = {}
    B: dict[str, Tensor | None] = {}
    for name, out_features in slices.items():
        rank = ranks[name]
        if rank == 0:
            A[name] = B[name] = None
            continue
        a = torch.empty(rank, in_features, device=device, dtype=spec.dtype)
        b = torch.zeros(out_features, rank // groups, device=device, dtype=spec.dtype)
        if lookup:
            nn.init.normal_(a) if spec.init is False else nn.init.zeros_(a)
            nn.init.normal_(b)
        elif spec.init == "gaussian":
            nn.init.normal_(a, std=1 / rank)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        if spec.init == "orthogonal":
            a, b = _orthogonal(rank, in_features, out_features, spec.dtype, device)
        if spec.init is False and not lookup:
            nn.init.kaiming_uniform_(b, a=math.sqrt(5))
        A[name], B[name] = a, b
    return Factors(A), Factors(B)


def _orthogonal(rank: int, K: int, N: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """PEFT's: B A = 0, since A and B are random combinations of the odd and of the even rows of a rotation."""
    if rank % 2:
        raise wrong_value("r", "an even rank with init_lora_weights='orthogonal'", rank)
    Q, _ = torch.linalg.qr(torch.randn(rank, rank))
    a, b = torch.randn(K, rank // 2).mm(Q[0::2]).T / 10, torch.randn(rank // 2, N).T.mm(Q[1::2]) / 10
    return a.contiguous().to(device, dtype), b.contiguous().to(device, dtype)


def checked_ranks(
    ranks: Mapping[str, int],
    in_features: int,
    slices: Mapping[str, int],
    key: str,
    above: bool = False,
    groups: int = 1,
) -> None:
    """Refuse ranks that a matrix cannot have, naming it; ``above``: those above min(N, K) are none of them."""
    for name, rank in ranks.items():
        limit = min(in_features, slices[name])
        label = key if name == WHOLE else f"{key}[{name}]"
        if check_integer(f"rank of {label}", rank, 0) > limit and not above:
            raise wrong_value(f"rank of {label}", f"at most min(in_features, out_features) = {limit}", rank)
        if rank % groups:
            raise wrong_value(f"rank of {label}", f"a multiple of the convolution's groups = {groups}", rank)


class Bundle:
    """Layers that run together, and what their calls with given adapters take, kept while none of it is replaced.

    Weights and factors are looked up as torch means it: a parameter that is replaced, a module that is hooked,
    parametrised or replicated is noticed, and its tensors are asked for anew. Layers let go of their bundles when
    their adapters change. It holds no layer, or the layer that holds it would hold itself.
    """

    def __init__(self):
        self._kept: dict[tuple[str, ...], Operands] = {}

    def kept(self, layers: Sequence[Any], names: tuple[str, ...]) -> Operands:
        """What a call of ``layers`` with the adapters ``names`` takes; one that no layer has, has rank 0.

        Raises ``Traced`` where what is looked up belongs to a transform or a tracer, and must not be kept.
        """
        kept = self._kept.get(names)
        if kept is None or not kept.holds(layers):
            if wants_plain_operators():
                raise Traced
            self._kept.pop(names, None)
            while len(self._kept) >= _MOST_BOUND:
                self._kept.pop(next(iter(self._kept)), None)
            kept = self._kept[names] = Operands(layers, names)
        return kept


_FORWARD = itertools.repeat("forward")
_PARAMETERS = operator.attrgetter("_parameters")
_MOST_BOUND = 16  # sets of adapters for which a bundle keeps its operands


class Operands:
    """A call, and where each of its tensors was found."""

    def __init__(self, layers: Sequence[Any], names: tuple[str, ...]):
        self.stored: list[tuple[dict[str, Any], str, Any]] = []
        self.read: list[tuple[weakref.ref, str, Any]] = []
        self.factors: list[Factors] = []
        self.hooked = False
        self._own = [layer._parameters for layer in layers]
        W, bias = ([self._tensor(layer, name) for layer in layers] for name in ("weight", "bias"))
        self.finishes = any([layer.finishes(names) for layer in layers])
        rescaled = [layer.rescales(names) for layer in layers]
        bias = [None if r else b for r, b in zip(rescaled, bias, strict=True)]
        pairs: list[tuple[Tensor, Tensor, float]] = []
        self.lengths: list[RowLengths | None] = []  # of each layer; none where more than one adapter runs
        for name in names:
            for layer, rescales in zip(layers, rescaled, strict=True):
                here = name in layer.adapter_specs
                factors = [self._factors(layer, side, name) if here else {} for side in ("lora_A", "lora_B")]
                own = layer.factor_pairs(name, *factors)
                pairs += own
                if any(rescaled) and len(names) == 1:
                    self.lengths.append(self._lengths(layer, name, own) if rescales else None)
        blocks = [layer.slices.blocks for layer in layers]
        of_all = layers[0].backend, layers[0].engine, (), streams_of(layers), blocks if max(blocks) > 1 else ()
        self.call = BoundCall(W, bias, *[[pair[i] for pair in pairs] for i in range(3)], *of_all)
        self.dtype, self.device, self.depth = W[0].dtype, W[0].device, W[0].shape[1]
        self.device_type = self.device.type
        # Of the layers' statistics, by adapter; a layer whose statistics change lets go of what is kept here.
        self.probes = {n: [layer.probes[n] for layer in layers] for n in names if n in layers[0].probes}
        for mine in self.probes.values():
            for probe, weight in zip(mine, W, strict=True):
                probe.follow(weight)
        self.run: Any = None  # what a tracked call takes beside x, where the next one takes the same
        self._operands = [*W, *self.call.A, *self.call.B]
        self._kinds = list(map(_kind, self._operands))
        self._places, self._keys, self._values = ([entry[i] for entry in self.stored] for i in range(3))
        self._hooks = [hooks for f in self.factors for hooks in forward_hooks(f)]
        self._attributes = [f.__dict__ for f in self.factors]
        found = (self._places, self._keys, self._values, self._hooks, self._attributes, self._operands)
        self._guard = None if NODE is None else NODE.Guard(*found)
        first = layers[0]
        self.alike = len(layers) == 1 or all(
            [
                w.dtype is W[0].dtype
                and w.device == W[0].device
                and type(w) is type(W[0])
                and (x.router, x.backend, x.engine) == (first.router, first.backend, first.engine)
                and _dropout(x, names) == _dropout(first, names)
                for x, w in zip(layers, W, strict=True)
            ]
        )
        self.dropout = _dropout(first, names)
        self.drops = any(self.dropout)

    def _tensor(self, owner: Any, name: str) -> Any:
        found = getattr(owner, name)
        stored = owner.__dict__.get("_parameters", {})
        if name in stored:
            self.stored.append((stored, name, found))
        else:  # a property, a parametrisation or a replica's plain attribute
            self.read.append((weakref.ref(owner), name, found))
        return found

    def _factors(self, layer: Any, which: str, name: str) -> dict[str, Tensor | None]:
        side = getattr(layer, which)
        factors = side[name]
        self.stored += [(layer._modules, which, side), (side._modules, name, factors)]
        self.stored += [(m.__dict__, k, getattr(m, k)) for m, k in ((side, "_modules"), (factors, "_parameters"))]
        self.factors.append(factors)
        if hooked(factors):
            self.hooked = True
            return factors()
        return {key: self._tensor(factors, key) for key in factors.slices}

    def _lengths(self, layer: Any, name: str, pairs: list[tuple[Tensor, Tensor, float]]) -> RowLengths:
        self._tensor(layer.lora_B[name], "magnitude")
        return layer.row_lengths(name, pairs)

    def holds(self, layers: Sequence[Any]) -> bool:
        """Whether every tensor is still where it was found, and no hook has to be asked for it."""
        if self.hooked or not all(map(operator.is_, map(_PARAMETERS, layers), self._own)):
            return False
        if self._guard is not None and not self.read:
            return self._guard.holds()
        if not all(map(operator.is_, map(dict.get, self._places, self._keys), self._values)):
            return False
        for owner, name, found in self.read:
            if getattr(owner(), name, None) is not found:
                return False
        if list(map(_kind, self._operands)) != self._kinds:
            return False
        return not any(self._hooks) and not any(map(dict.__contains__, self._attributes, _FORWARD))


def _kind(tensor: Tensor) -> tuple:
    """What a parameter may change and stay the same object."""
    return tensor.dtype, tensor.device, tensor.shape


def _dropout(layer: Any, names: Sequence[str]) -> list[float]:
    specs = [layer.adapter_specs.get(name) for name in names]
    return [0.0 if spec is None else spec.dropout for spec in specs]


def streams_of(layers: Sequence[Any]) -> list[int]:
    """The number by which dropout knows each projection of layers that run together."""
    return [layer.stream + i for layer in layers for i in range(len(layer.slices))]


def hooked(module: nn.Module) -> bool:
    """Whether calling a module does more than its class's forward."""
    return any(forward_hooks(module)) or "forward" in module.__dict__
