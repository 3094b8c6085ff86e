"""Linear, QKVLinear, FrozenLinear."""

from __future__ import annotations

import copy
import math
import sys
import weakref
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .._utils.distributed import refuse_partitioned
from .._utils.errors import check_flag, check_integer, check_model, wrong_value
from .._utils.torch_compat import capturing
from ..config import LoraConfig, takes_weight
from ..ops.bound import Traced
from ..ops.lora import check_input, checked_linear, lora_grouped, new_seed
from ..ops.matmul import AUTO, PACKED, UNPACKED
from ..ops.node import Pending
from ..ops.row_norms import RowLengths
from .adapter import WHOLE, AdapterSpec, Bundle, Factors, Operands, Slices, adapter_dtype_of, new_factors
from .probe import group_operands, refuse_capture
from .routing import Route, Routed, Router
from .weight_reads import WeightReads

DEFAULT = "default"
_MERGED_AT_ONCE = 2**17  # entries of a weight: 512 KiB in fp32, the fastest of 2^15 to 2^20 for both dtypes
ENGINE_OF_PREPACK = {"auto": AUTO, True: PACKED, False: UNPACKED}


class Adapted(Routed):
    """A layer with adapters on a weight [N, K] in slices: its factors, and what follows from them."""

    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    leaf: str | None = None  # the last part of its path, where that is not its own name below its owner
    groups = 1  # of a convolution: B has r / groups columns
    parts = 1  # matrices of which each sees other rows of x
    measured = False  # whether statistics of the weight are tracked
    lookup = False  # an embedding, whose factors start the other way round: A zero, B random
    reads: WeightReads | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self.reads is not None and not torch.compiler.is_compiling():
            self.reads.note(self, sys._getframe(1))
        return super().__getattr__(name)

    def install(self, name: str, spec: AdapterSpec, A: Factors, B: Factors) -> None:
        """Put an adapter's factors in place, replacing those of the same name."""
        for side, factors in (("lora_A", A), ("lora_B", B)):
            before = getattr(self, side)
            for key, old in before[name]._parameters.items() if name in before else ():
                if old is not None and factors._parameters.get(key) is not old:
                    old.fastlora_place = weakref.ref(self), side, name, key  # for an optimizer that still holds it
        self.lora_A[name], self.lora_B[name] = A, B
        self.adapter_specs[name] = spec
        self.has_changed()
        self.router.changed(name)
        with_rank = any(p is not None for p in A.tensors().values())
        self.ranked = self.ranked | {name} if with_rank else self.ranked - {name}

    def has_changed(self) -> None:
        """Nothing is kept of what the layer's adapters and their statistics were."""
        self.bundle = None
        if self.group is not None:
            self.group.forget_operands()

    def rescale(self, name: str, scale: Mapping[str, float]) -> None:
        """Other scales for an adapter's slices."""
        self.adapter_specs[name] = self.adapter_specs[name].with_scale(scale)
        self.has_changed()

    def uninstall(self, name: str) -> None:
        """Forget an adapter; a layer that has none left runs as its base alone."""
        del self.lora_A[name], self.lora_B[name], self.adapter_specs[name]
        self.has_changed()
        self.router.changed(name)
        self.ranked = self.ranked - {name}

    @property
    def adapter_names(self) -> tuple[str, ...]:
        return tuple(self.adapter_specs)

    def ranks(self, name: str | None = None) -> dict[str, int]:
        """Rank of each slice of an adapter, the active one unless named; 0 where there is none."""
        name = self.router.default.adapter if name is None else name
        return {s: 0 if p is None else p.shape[0] for s, p in self.lora_A[name].tensors().items()}

    def pairs(self, adapter: str | None = None) -> list[tuple[Tensor, Tensor, float]]:
        """(A_i, B_i, s_i) of every slice in order; empty factors where the rank is 0 or the adapter is not here."""
        adapter = self.router.default.adapter if adapter is None else adapter
        here = adapter in self.adapter_specs
        return self.factor_pairs(adapter, *[side[adapter]() if here else {} for side in (self.lora_A, self.lora_B)])

    def factor_pairs(
        self, adapter: str, A: Mapping[str, Tensor | None], B: Mapping[str, Tensor | None]
    ) -> list[tuple[Tensor, Tensor, float]]:
        """As ``pairs``, of factors by slice; ``ValueError`` where one is missing or lies elsewhere than the weight."""
        spec, out, device = self.adapter_specs.get(adapter), [], self.weight.device
        for name, rows in self.slices.items():
            a, b = A.get(name), B.get(name)
            if a is None and b is None:
                a, b = self.empty(0, self.in_features), self.empty(rows, 0)
            elif (
                None in (a, b)
                or {a.device, b.device} != {device}
                or a.shape[1:] != (self.in_features,)
                or b.shape != (rows, a.shape[0] // self.groups)
            ):
                refuse_partitioned(self)
                raise ValueError(
                    f"adapter {adapter!r}: expected factors A [r, {self.in_features}] and B [{rows}, r] of slice "
                    f"{name!r} on {device}, where the weight is; got {_described(a)} and {_described(b)}. Move the "
                    "whole model to one device; change ranks with fastlora.set_ranks"
                )
            out.append((a, b, spec.scale[name] if spec else 1.0))
        return out

    def finishes(self, names: Sequence[str]) -> bool:
        """Whether one of these adapters has more than factors."""
        return any([name in self.ranked and self.lora_B[name].beside() for name in names])

    def rescales(self, names: Sequence[str]) -> bool:
        """Whether one of these adapters gives the rows of the weight a length (``use_dora``)."""
        return any([name in self.ranked and "magnitude" in self.lora_B[name].beside() for name in names])

    def finish(self, y: Tensor, route: Route) -> Tensor:
        """What follows on ``x W^T + s x A^T B^T``, which has no bias yet under ``use_dora``."""
        if self.rescales(route.names):
            if route.batch is not None:
                raise ValueError(
                    "ids: an adapter with use_dora scales the frozen weight's rows and cannot share a batch with "
                    "others; name one adapter for all rows"
                )
            return self.row_lengths(route.adapter)(y)
        added = [self.lora_B[n].beside().get("bias") if n in self.ranked else None for n in route.names]
        rows = [
            y.new_zeros(self.out_features) if b is None else (b * self.bias_scale(n)).to(y.dtype)
            for n, b in zip(route.names, added, strict=True)
        ]
        if route.batch is None:
            return y + rows[0]
        table = torch.stack([*rows, torch.zeros_like(rows[0])])  # the last for -1
        return y + table[route.batch.rows(y).ids].view_as(y)

    def row_lengths(self, adapter: str, pairs: Sequence[tuple[Tensor, Tensor, float]] | None = None) -> RowLengths:
        """What ``use_dora`` does to an adapter's rows, m None before it is there; with the pairs of ``self.pairs``."""
        pairs = self.pairs(adapter) if pairs is None else pairs
        parts = [(self.slices.runs(name), *pair) for name, pair in zip(self.slices, pairs, strict=True)]
        m = getattr(self.lora_B[adapter], "magnitude", None)
        return RowLengths(self.as_matrix(self.weight), parts, m, self.bias)

    def empty(self, *shape: int) -> Tensor:
        """A factor of rank 0."""
        with torch.inference_mode(False):  # it may be kept, and then be saved by a graph
            return self.weight.new_empty(shape)

    def delta(self, adapter: str | None = None) -> Tensor:
        """``s B A`` of the whole weight [N, K], of the active adapter unless named, in fp32 (float64 for float64)."""
        adapter = self.router.default.adapter if adapter is None else adapter
        acc = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        parts = [s * (b.detach().to(acc) @ a.detach().to(acc)) for a, b, s in self.pairs(adapter)]
        return self.slices.interleave(parts)

    def as_matrix(self, weight: Tensor) -> Tensor:
        """A tensor in the layout of this layer's weight as [N, K]."""
        return weight

    @torch.no_grad()
    def merged_weight(self, adapter: str | None = None) -> Tensor | None:
        """``W + s B A`` in the weight's dtype and layout, None where it is not finite.

        Summed in fp32 (float64 for float64) a few rows at a time, which stay in cache, and rounded once.
        """
        acc = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        merged = torch.empty_like(self.weight)
        source, target = self.as_matrix(self.weight), self.as_matrix(merged)
        step = max(1, _MERGED_AT_ONCE // max(self.in_features, 1))
        name = self.router.default.adapter if adapter is None else adapter
        lengths = self.row_lengths(name).factors().to(acc).unsqueeze(1) if self.rescales((name,)) else None
        for part, (a, b, s) in zip(self.slices, self.pairs(adapter), strict=True):
            a, done = a.to(acc), 0
            for first, stop in [(i, r.stop) for r in self.slices.runs(part) for i in range(r.start, r.stop, step)]:
                rows = slice(first, min(first + step, stop))
                own, out = b[done : done + rows.stop - first], target[rows]
                done += len(own)
                summed = torch.addmm(source[rows].to(acc), own.to(acc), a, alpha=s)
                out.copy_(summed if lengths is None else summed * lengths[rows])
                if not all(map(math.isfinite, map(float, out.aminmax()))):
                    return None
        return merged

    @torch.no_grad()
    def merged_bias(self, adapter: str) -> Tensor | None:
        """``bias + s b_B`` in the bias's dtype, None where the adapter has no ``lora_bias``."""
        if adapter not in self.ranked or "bias" not in self.lora_B[adapter].beside():
            return None
        return (self.bias + self.bias_scale(adapter) * self.lora_B[adapter].bias).to(self.bias.dtype)

    def bias_scale(self, adapter: str) -> float:
        """``s`` of the bias beside B: the largest of the slices that have a rank, as a file says it of the matrix."""
        ranks, scales = self.ranks(adapter), self.adapter_specs[adapter].scale
        return max((scales[name] for name in self.slices if ranks[name]), key=abs, default=1.0)

    @property
    def active_adapter(self) -> str:
        """The adapter that runs where no context says otherwise."""
        return self.router.default.adapter

    def entered(self) -> Route:
        """The way of a forward of this layer that has begun."""
        if torch.compiler.is_compiling():
            return self.router.traced()
        if not self.called:
            self.called = True
        return self.router.route(self.training)

    def bypassed(self, route: Route) -> bool:
        """Whether the forward is the base's alone: disabled, merged, or nothing to add and nothing to measure."""
        if not route.enabled or self.merged:
            return True
        if route.batch is None:
            return route.adapter not in self.ranked and route.adapter not in self.probes
        return not any([name in self.ranked or name in self.probes for name in route.batch.names])

    def dropout_p(self, route: Route) -> tuple[float, ...]:
        """Dropout probability of each adapter of a route, 0 outside training."""
        names = (route.adapter,) if route.batch is None else route.batch.names
        if not self.training:
            return (0.0,) * len(names)
        return tuple([self.adapter_specs[n].dropout if n in self.adapter_specs else 0.0 for n in names])

    def extra_repr(self) -> str:
        text = super().extra_repr()
        for name, ranks in ((name, self.ranks(name)) for name in self.adapter_specs):
            shown = ranks[WHOLE] if set(ranks) == {WHOLE} else "{" + ", ".join(f"{s}: {r}" for s, r in ranks.items()) + "}"  # fmt: skip  # noqa: E501
            text += f", r={shown}" if name == DEFAULT else f", r[{name}]={shown}"
        return text + (", merged" if self.merged else "")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    def __getstate__(self) -> dict[str, Any]:
        # A tracker belongs to the model it was made for, not to its copies; a packing refers to other layers.
        return {**self.__dict__, "probes": {}, "bundle": None}

    def __deepcopy__(self, memo: dict) -> Adapted:
        # A class without one gets one of torch.nn.utils.parametrize that copies all; its __getstate__ raises.
        kind = type(self).__bases__[0] if is_parametrized(self) else type(self)
        memo[id(self)] = replica = type(self).__new__(type(self))
        replica.__setstate__(copy.deepcopy(kind.__getstate__(self), memo))
        return replica


class Linear(Adapted, nn.Linear):
    r"""A frozen linear layer with a trainable low-rank update; drop-in for ``nn.Linear``.

    .. math:: y = x W^\top + b + s\, \mathrm{dropout}(x) A^\top B^\top,\qquad s = \alpha / r

    ``weight`` [N, K] and ``bias`` [N] keep their names; ``lora_A.default.weight`` is [r, K], ``lora_B.default.weight``
    [N, r]. The base is frozen unless ``train_base``; the other arguments are ``nn.Linear``'s and fields of
    ``LoraConfig``. Raises ``TypeError`` or ``ValueError`` naming the argument.
    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (ICLR 2022).

    >>> fastlora.nn.Linear(8, 6, r=2)(torch.ones(4, 8)).shape
    torch.Size([4, 6])
    """

    measured = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        adapter_dtype: torch.dtype | None = None,
        train_base: bool = False,
        backend: str = "auto",
        prepack: bool | str = "auto",
    ):
        config = LoraConfig(
            r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, use_rslora=use_rslora,
            init_lora_weights=init_lora_weights, adapter_dtype=adapter_dtype, backend=backend, prepack=prepack,
        )  # fmt: skip
        check_flag("train_base", train_base)
        if takes_weight(init_lora_weights):
            accepted = "one that needs no weight; fastlora.inject has it"
            raise wrong_value("init_lora_weights", accepted, init_lora_weights)
        check_integer("in_features", in_features)
        check_integer("out_features", out_features)
        if r > min(in_features, out_features):
            raise wrong_value("r", f"at most min(in_features, out_features) = {min(in_features, out_features)}", r)
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.weight.data = self.as_matrix(self.weight.data).contiguous()  # [K, N] in a Conv1D
        if not train_base:
            self.requires_grad_(False)
        slices = {WHOLE: out_features}
        attach_state(self, slices, config, Router(DEFAULT))
        spec = AdapterSpec({WHOLE: config.scaling(r)}, lora_dropout, init_lora_weights, adapter_dtype_of(config, self))
        self.install(DEFAULT, spec, *new_factors(slices, {WHOLE: r}, in_features, spec, self.weight.device))

    def forward(self, input: Tensor) -> Tensor:
        """``y = x W^T + b + s dropout(x) A^T B^T`` of the adapter that the running context chose; x [..., K]."""
        if torch.compiler.is_compiling():
            route = self.router.traced()
            if self.bypassed(route):
                return F.linear(input, self.weight, self.bias)
            return forward_traced(self, input, route)
        if not self.called:
            self.called = True
        group = self.group
        if group is not None:
            ahead = group.take(self, input)
            if ahead is not None:
                return ahead
        route = self.router.route(self.training)
        if self.bypassed(route):
            return F.linear(input, self.weight, self.bias)
        try:
            return forward_together((self,), input, route)[0] if group is None else group(self, input, route)
        except (RuntimeError, ValueError, IndexError):
            refuse_partitioned(self)
            raise


class QKVLinear(Linear):
    """A fused matrix with one adapter, and one rank, for each of its slices, as q, k and v. See :class:`Linear`.

    ``y_i = x W_i^T + b_i + s_i x A_i^T B_i^T`` for rows W_i [N_i, K] of W; one slice unless ``inject`` made it.

    >>> config = fastlora.LoraConfig(r=2, target_modules=["0"], split_qkv={"0": {"q": 8, "k": 4, "v": 4}})
    >>> fastlora.inject(nn.Sequential(nn.Linear(8, 16)), config)[0].ranks()
    {'q': 2, 'k': 2, 'v': 2}
    """


_STATE = (
    "slices", "adapter_specs", "ranked", "bundle", "router", "dropout_salt", "stream", "backend", "engine",
    "merged", "group", "called", "probes", "reads",
)  # fmt: skip


def attach_state(
    layer: nn.Linear, slices: Mapping[str, int], config: LoraConfig, router: Router, path: str = ""
) -> None:
    """Give a linear layer the attributes that the adapted forward reads."""
    layer.lora_A, layer.lora_B = nn.ModuleDict(), nn.ModuleDict()
    layer.slices = Slices(slices, getattr(slices, "blocks", 1))
    layer.adapter_specs, layer.probes, layer.reads = {}, {}, None
    layer.ranked = frozenset()  # adapters with a rank above 0
    layer.bundle = None  # of the layer alone, with the parameters it is for; a group has bundles of its own
    layer.router = router
    router.holders.add(layer)
    layer.dropout_salt = zlib.crc32(path.encode()) & 0x7FFFFFFF  # tells the dropout of layers with one row seed apart
    layer.stream = 0  # tells its dropout from that of its siblings, with whom it shares seed and salt
    layer.backend, layer.engine = config.backend, ENGINE_OF_PREPACK[config.prepack]
    layer.merged, layer.group, layer.called = (), None, False


def detach_state(layer: nn.Linear) -> None:
    """Take away what ``attach_state`` gave."""
    layer.router.holders.discard(layer)
    del layer.lora_A, layer.lora_B
    for name in _STATE:
        delattr(layer, name)


def forward_together(
    layers: Sequence[Any],
    x: Tensor,
    route: Route,
    kept: Operands | None = None,
    seed: Callable[[torch.device], Tensor] = new_seed,
    pending: Pending | None = None,
) -> Sequence[Tensor]:
    """Outputs of layers that share ``x``, from one operator call; statistics of tracked layers ride along.

    ``seed`` is asked for the call's seed where dropout is active; ``pending`` counts its graph.
    """
    first = layers[0]
    if kept is None:
        try:
            kept = _bundle_of(layers).kept(layers, route.names)
        except Traced:
            return [forward_traced(layer, x, route) for layer in layers]
    if x.dtype is not kept.dtype or x.device != kept.device or not x.dim() or x.shape[-1] != kept.depth:
        check_input(x, first.weight)
    drops = kept.drops and first.training
    p, run = kept.dropout if drops else (), None
    if route.batch is None:
        probes = kept.probes.get(route.adapter)
        steady = probes is not None and not drops and probes[0].steady(route)
        if steady and kept.run is not None:
            if capturing(kept.device_type):
                refuse_capture(kept.device_type)
            run = kept.run
        elif probes is not None or drops:
            found = {} if probes is None else probes[0].operands(probes, x, route)
            operands = {k: [v] if k in ("P", "sign") else v for k, v in found.items()}
            run = kept.call.run(None, seed(x.device) if drops else None, p, **operands)
            kept.run = run if steady else kept.run
    else:
        key = route.batch.keys(x, seed(x.device), first.dropout_salt) if drops else None
        operands = group_operands(kept.probes, layers, route, x) if kept.probes else {}
        run = kept.call.run(route.batch.rows(x), key, p, **operands)
    try:
        y = kept.call(x, run, first.router.pending(route), pending)
    except Traced:
        return [forward_traced(layer, x, route) for layer in layers]
    for name, probes in kept.probes.items():
        if probes[0].step.taps or route.mask is not None:
            y = [probe.tap(x, out, route, name) for probe, out in zip(probes, y, strict=True)]
    if kept.lengths and route.batch is None:
        y = [out if lengths is None else lengths(out) for lengths, out in zip(kept.lengths, y, strict=True)]
    elif kept.finishes:
        y = [layer.finish(out, route) for layer, out in zip(layers, y, strict=True)]
    return y


def forward_traced(layer: Any, x: Tensor, route: Route) -> Tensor:
    """As ``forward_together`` of one layer, for a compiler or tracer: the operator with the operands of now."""
    check_input(x, layer.weight)
    names = route.names
    weights = ([layer.weight], [None if layer.rescales(names) else layer.bias])
    A, B, scale = zip(*[pair for name in names for pair in layer.pairs(name)], strict=True)
    tracked = [name for name in names if name in layer.probes]
    p = layer.dropout_p(route)
    # Without a comprehension over layers: the compiler would keep them until the cyclic collector runs.
    streams = list(range(layer.stream, layer.stream + len(layer.slices)))
    options: dict[str, Any] = {"backend": layer.backend, "engine": layer.engine, "streams": streams}
    if layer.slices.blocks > 1:
        options["blocks"] = [layer.slices.blocks]
    if route.batch is None:
        if tracked:
            options |= layer.probes[names[0]].operands([layer.probes[names[0]]], x, route)
        (y,) = checked_linear(x, *weights, A, B, scale, p[0], **options)
    else:
        if tracked:
            options |= group_operands({name: [layer.probes[name]] for name in tracked}, [layer], route, x)
        salt = layer.dropout_salt
        (y,) = lora_grouped(x, *weights, A, B, scale, route.batch, p=p, dropout_salt=salt, **options)
    for name in tracked:
        y = layer.probes[name].tap(x, y, route, name)
    return layer.finish(y, route) if layer.finishes(names) else y


def _bundle_of(layers: Sequence[Any]) -> Bundle:
    """The operands of one layer, kept with it; those of a part of a layer are made anew."""
    (layer,) = layers
    if not isinstance(layer, Linear):
        return Bundle()
    # A replica has a copy of the layer's attributes, and parameters of its own.
    if layer.bundle is None or layer.bundle[0] is not layer._parameters:
        layer.bundle = (layer._parameters, Bundle())
    return layer.bundle[1]


def _described(factor: Tensor | None) -> str:
    return "none" if factor is None else f"{tuple(factor.shape)} on {factor.device}"


def adapted_layers(model: nn.Module) -> dict[str, Adapted]:
    """Every adapted layer of a model by its path; ``TypeError`` for what is no model."""
    check_model(model)
    found: dict[str, Adapted] = {}
    _collect(model, "", set(), found)
    return found


def _collect(module: nn.Module, path: str, seen: set[nn.Module], found: dict[str, Adapted]) -> None:
    # The modules of an adapted layer are its factors, of which there are many with many adapters.
    if module in seen:
        return
    seen.add(module)
    if isinstance(module, Adapted):
        found[path] = module
        return
    for name, child in module._modules.items():
        if child is not None:
            name = child.leaf or name if isinstance(child, Adapted) else name
            _collect(child, f"{path}.{name}" if path else name, seen, found)


def matrix_key(path: str, name: str) -> str:
    """The name of a matrix: module path, with the slice of a fused one in brackets."""
    return path if name == WHOLE else f"{path}[{name}]"
