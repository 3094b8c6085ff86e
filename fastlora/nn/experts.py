"""Adapters on experts whose matrices are one parameter [E, N, K], by transformers' registry of implementations."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._utils.errors import unknown_choice
from ..ops.layout import Rows, moved
from ..ops.lora import lora_grouped
from ..ops.matmul import NONE
from ..ops.probe_ops import with_moments_of_runs
from .adapter import Slices
from .attention import OwnersParameters
from .linear import Adapted
from .probe import Contribution, LayerProbe, tap, token_mask
from .quantized import update_backend
from .routing import Route

IMPLEMENTATION = "fastlora"  # in transformers' registry
# Classes that the registry does not run, and what is made of them here; PEFT takes their parameters for [E, N, K].
UNREGISTERED = {"transformers.models.llama4.modeling_llama4.Llama4TextExperts": "Llama4Experts"}
BASES = ("eager", "grouped_mm", "batched_mm")  # the implementations whose products these are


class ExpertStack(OwnersParameters, nn.Module):
    """A parameter of an experts module, [E, N, K] or transposed [E, K, N], as a matrix [N, K] of each expert."""

    def __init__(self, owner: nn.Module, parameter: str):
        nn.Module.__init__(self)
        self.belong_to(owner)
        self.leaf = parameter
        experts, rows, columns = self.weight.shape
        if self.transposed:
            rows, columns = columns, rows
        self.in_features, self.out_features = columns, experts * rows
        self.training = owner.training

    @property
    def weight(self) -> nn.Parameter:
        return self.owner._parameters[self.leaf]

    @property
    def bias(self) -> None:
        """Those of the experts stay with their owner."""

    @property
    def transposed(self) -> bool:
        """Whether the parameter is [E, K, N]."""
        return getattr(self.owner, "is_transposed", True)

    @property
    def taken_for_untransposed(self) -> bool:
        """Whether PEFT takes a transposed parameter for [E, N, K], so that its A is the B here, transposed."""
        return class_path(self.owner) in UNREGISTERED or isinstance(self.owner, _Unregistered)

    def matrices(self) -> Slices:
        """Rows of each expert's matrix, by number."""
        experts = self.weight.shape[0]
        return Slices({str(e): self.out_features // experts for e in range(experts)})


class ExpertProjection(ExpertStack, Adapted):
    r"""An adapted ``ExpertStack``: every expert has its own A, B, rank, scale and statistics.

    .. math:: y_m = x_m W_e^\top + s_e\, x_m A_e^\top B_e^\top,\qquad e = e(m)

    A_e [r_e, K], B_e [N, r_e] in either layout; r_e may be 0. Made by ``inject``; its owner calls it through the
    implementation ``"fastlora"`` of transformers' registry, and keeps its parameters under their names.
    """

    measured = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        register()

    @property
    def parts(self) -> int:
        """Matrices whose rows of x differ."""
        return len(self.slices)

    def extra_repr(self) -> str:
        ranks = {name: self.ranks(name).values() for name in self.adapter_specs}
        each = ", ".join(f"r[{name}]={min(r)} to {max(r)}" for name, r in ranks.items())
        return f"{self.parts} experts, in_features={self.in_features}, {each}" + (", merged" if self.merged else "")

    def in_layout(self, matrices: Tensor) -> Tensor:
        """[E, N, K] in the parameter's own layout."""
        return matrices.transpose(1, 2) if self.transposed else matrices

    def delta(self, adapter: str | None = None) -> Tensor:
        """``s_e B_e A_e`` in the parameter's layout, in fp32 (float64 for float64)."""
        return self.in_layout(super().delta(adapter).unflatten(0, (self.parts, -1)))

    @torch.no_grad()
    def merged_weight(self, adapter: str | None = None) -> Tensor | None:
        """``W + s B A`` in the weight's dtype and layout, None where it is not finite; one expert after another."""
        acc = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        merged = torch.empty_like(self.weight)
        of_each = zip(self.in_layout(self.weight), self.in_layout(merged), self.pairs(adapter), strict=True)
        for source, target, (a, b, s) in of_each:
            target.copy_(torch.addmm(source.to(acc), b.to(acc), a.to(acc), alpha=s))
        return merged if bool(merged.isfinite().all()) else None

    def add_update(self, y: Tensor, x: Tensor, segments: Segments, route: Route) -> Tensor:
        """``y`` [S, N] with what each row's adapter and expert add to it; x [S, K]."""
        pairs = [self.pairs(name) for name in route.names]
        measured = [self._measured(name) for name in route.names]
        live = [
            (i, g, e) for i, (g, e) in enumerate(segments.present)
            if g >= 0 and (pairs[g][e][0].shape[0] or (measured[g] and measured[g].Z))
        ]  # fmt: skip
        if live:
            factors = [pairs[g][e] for _, g, e in live]
            A, B, scale = zip(*factors, strict=True)
            seen = x if x.dtype == y.dtype else x.to(y.dtype)
            zero = torch.zeros((), dtype=seen.dtype, device=seen.device).expand(B[0].shape[0], x.shape[1])
            batch = segments.select([i for i, _, _ in live])
            operands = _probe_operands([(measured[g], str(e)) for _, g, e in live], B, seen, segments)
            backend = update_backend(self)
            (update,) = lora_grouped(seen, [zero], [None], A, B, scale, batch, backend=backend, engine=NONE, **operands)
            if not torch.compiler.is_compiling() and update.grad_fn is not None:
                self.router.pending(route).add(update)
            # Autocast may leave y in float32.
            alike = update.dtype is y.dtype and not torch.compiler.is_compiling()
            y = update.add_(y) if alike else y + update
        if self.router.sharded and torch.is_grad_enabled():
            # fully_shard reduces what has a gradient here, and other ranks may have sent rows to other experts.
            reached = {(g, e) for _, g, e in live}
            absent = [t for g, of in enumerate(pairs) for e, pair in enumerate(of) if (g, e) not in reached
                      for t in pair[:2] if t.requires_grad and t.numel()]  # fmt: skip
            y = _Absent.apply(y, *absent) if absent else y
        for g, probe in enumerate(measured):
            y = y if probe is None else _observed(y, x, probe, segments, g, route)
        return y

    def _measured(self, name: str) -> LayerProbe | None:
        """The adapter's probe where this forward counts in its statistics."""
        probe = self.probes.get(name)
        return probe if probe is not None and probe.live and torch.is_grad_enabled() else None


def _probe_operands(
    live: Sequence[tuple[LayerProbe | None, str]], B: Sequence[Tensor], x: Tensor, segments: Segments
) -> dict[str, Any]:
    """Zero leaves, probe rows and signs of each segment, empty where its adapter is not measured by them."""
    probes = {id(probe): probe for probe, _ in live if probe is not None and probe.Z}
    if not probes:
        return {}
    signs = {key: segments.signs(probe) for key, probe in probes.items() if probe.step.per_sample}
    Z, P, sign = [], [], []
    for (probe, name), b in zip(live, B, strict=True):
        there = probe is not None and probe.Z
        Z.append(probe.Z[name] if there else b.new_zeros((b.shape[0], 0)))
        P.append(probe.P if there else x.new_zeros((0, x.shape[1])))
        sign.append(signs.get(id(probe), x.new_zeros((0, 0), dtype=torch.float32)))
    return {"Z": Z, "P": P, "sign": sign}


def _observed(y: Tensor, x: Tensor, probe: LayerProbe, segments: Segments, adapter: int, route: Route) -> Tensor:
    """``y``, whose backward gives each expert without rows a gradient of zero, and of the others what is asked for."""
    probe.entered(x)
    if probe.V is not None:
        if torch.compiler.is_compiling():
            raise RuntimeError("track: 'act_var' of experts runs in eager mode only; leave it out under compile")
        keep = token_mask(x.new_empty((segments.count, 0)), route)
        runs = [(e, rows) for (g, e), rows in segments.ranges() if g == adapter]
        y = with_moments_of_runs(y, probe.V, runs, None if keep is None else keep[segments.tokens], probe.backend)
    if probe.exact:
        return tap(y, x, _ByExpert(probe, segments, adapter), probe.step.micro)
    here = {str(e) for g, e in segments.present if g == adapter}
    absent = [leaf for name, leaf in probe.Z.items() if name not in here]
    return _Absent.apply(y, *absent) if absent else y


class _Absent(torch.autograd.Function):
    """Identity whose backward gives leaves of experts without rows the gradient that they have: zero."""

    @staticmethod
    def forward(ctx, y: Tensor, *leaves: Tensor) -> Tensor:
        ctx.save_for_backward(*leaves)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return (dy, *map(torch.zeros_like, ctx.saved_tensors))


class _ByExpert:
    """Takes what the exact estimator keeps of all rows, and hands it on expert by expert."""

    def __init__(self, probe: LayerProbe, segments: Segments, adapter: int):
        self.taken, self.names = probe.taken, [*probe.slices]
        self.samples = segments.samples(probe.step.samples) if probe.step.per_sample else None
        self.count = probe.step.samples
        self.rows = {str(e): rows for (g, e), rows in segments.ranges() if g == adapter}

    def append(self, call: Contribution) -> None:
        for name in self.names:
            rows = self.rows.get(name, slice(0, 0))
            samples = None if self.samples is None else (self.samples[rows], self.count)
            self.taken.append(call._replace(x=call.x[rows], dy=call.dy[rows], part=name, samples=samples))


class Segments:
    """The rows of one forward of an experts module in the order of their experts, then of their adapters.

    ``experts``, of ``number``, and ``tokens``, of ``count``: those of each row, in any order.
    ``present``: (adapter, expert) of each run of rows, adapter -1 for the base alone. Reads back how long the runs are;
    a compiler, which cannot, has all of them, of which some are empty.
    """

    def __init__(self, experts: Tensor, tokens: Tensor, count: int, number: int, route: Route):
        self.count, self.mixed = count, route.batch is not None
        adapters = 1 if route.batch is None else len(route.batch.names) + 1
        if self.mixed:  # the first of an expert's runs is of the base alone
            own = moved(route.batch.ids_of_rows(count), experts.device)
            experts = experts * adapters + own[tokens] + 1
        keys, self.order = torch.sort(experts)
        self.tokens, self.experts = tokens[self.order], keys // adapters
        numbers = torch.arange(number * adapters, device=keys.device)
        ends = torch.searchsorted(keys, numbers, right=True)
        self.offsets = ends[adapters - 1 :: adapters].to(torch.int32)
        self._pairs = [(g - self.mixed, e) for e in range(number) for g in range(adapters)]
        self._starts, self._ends, self._kept = torch.cat([ends.new_zeros(1), ends[:-1]]), ends, {}
        self.runs: list[tuple[int, int]] | None = None
        if torch.compiler.is_compiling():
            self.present = self._pairs
        else:
            below = torch.searchsorted(keys, keys.new_zeros(1))
            *ends, below = torch.cat([ends, below]).tolist()
            if below or ends[-1] < keys.shape[0]:
                raise ValueError(f"top_k_index: expected experts 0 to {number - 1}, got others")
            runs = enumerate(zip([0, *ends[:-1]], ends, strict=True))
            found = [(i, run) for i, run in runs if run[0] < run[1]]
            self.present = [self._pairs[i] for i, _ in found]
            self.runs = [run for _, run in found]

    def ranges(self) -> list[tuple[tuple[int, int], slice]]:
        """(adapter, expert) and rows of each run."""
        return [(pair, slice(*run)) for pair, run in zip(self.present, self.runs, strict=True)]

    def samples(self, count: int) -> Tensor:
        """The sample of each row, of ``count`` whose tokens follow one another."""
        if self.mixed or torch.compiler.is_compiling():
            where = "a batch of several adapters" if self.mixed else "compiled code"
            raise RuntimeError(f"track: 'fisher' of experts is not measured in {where}; take grad_sq")
        if not count or self.count % count:
            raise RuntimeError(
                f"track: 'fisher' of experts needs the samples of their {self.count} tokens, and the first tensor that "
                f"the model is called with has {count} in dimension 0; take grad_sq"
            )
        return self.tokens // (self.count // count)

    def signs(self, probe: LayerProbe) -> Tensor:
        """±1 of each row's sample and probe."""
        step = probe.step
        of_rows = self.samples(step.samples)
        return step.signs.take(step.samples, None, step.index, step.micro, of_rows.device)[of_rows]

    def select(self, chosen: list[int]) -> Batch:
        """Those of the runs as what the grouped operator takes for adapters; other rows have none."""
        key = tuple(chosen)
        if key not in self._kept:
            if self.runs is None:
                ranges = torch.stack([self._starts, self._ends], dim=1)[chosen]
                places = torch.arange(self.order.shape[0], device=self.order.device)
                inside = (places >= ranges[:, :1]) & (places < ranges[:, 1:])
                numbers = torch.arange(1, len(chosen) + 1, device=places.device).unsqueeze(1)
                ids = (inside * numbers).sum(0) - 1
            else:
                ranges = torch.tensor([self.runs[i] for i in chosen], device="cpu")  # nothing need be read back
                ids = torch.full((self.order.shape[0],), -1, device="cpu")
                for number, i in enumerate(chosen):
                    ids[slice(*self.runs[i])] = number
                ids = moved(ids, self.order.device)
            self._kept[key] = Batch(ids, ranges)
        return self._kept[key]


class Batch:
    """Runs of rows as ``lora_grouped`` sees the adapters of a batch."""

    def __init__(self, ids: Tensor, ranges: Tensor):
        self.names = range(ranges.shape[0])
        self._rows = Rows(ids, ids[:0], ranges, ranges.new_empty((0, 2)))

    def rows(self, x: Tensor) -> Rows:
        return self._rows


class ExpertsConfig:
    """A model's config as its adapted experts see it: the implementation is ours, and everything else the config's."""

    _experts_implementation = IMPLEMENTATION

    def __init__(self, base: Any):
        self.base = base

    def __getattr__(self, name: str) -> Any:
        if name == "base":  # of one that is being unpickled
            raise AttributeError(name)
        return getattr(self.base, name)


def register() -> None:
    """Make ``forward`` an implementation of transformers' registry."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, forward)


def adapt(owner: nn.Module, projection: ExpertProjection) -> None:
    """Let an experts module hold an adapted parameter, and run with it."""
    register()
    projection.router.experts = True
    owner._modules[f"{projection.leaf}_adapter"] = projection
    if class_path(owner) in UNREGISTERED:
        owner.__class__ = getattr(sys.modules[__name__], UNREGISTERED[class_path(owner)])
    elif not isinstance(owner, _Unregistered) and not isinstance(owner.config, ExpertsConfig):
        owner.config = ExpertsConfig(owner.config)


def release(projection: ExpertProjection) -> None:
    """The inverse of ``adapt``."""
    owner = projection.owner
    del owner._modules[f"{projection.leaf}_adapter"]
    if isinstance(owner, _Unregistered):
        owner.__class__ = type(owner).__mro__[2]
    elif isinstance(getattr(owner, "config", None), ExpertsConfig):
        owner.config = owner.config.base


def class_path(module: nn.Module) -> str:
    """Module and name of a class, dotted."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


class _Unregistered:
    """What ``forward`` reads of an experts class that transformers' registry does not run."""

    is_transposed = has_gate = True
    has_bias = has_post_expert_norm = _is_expert_parallel = False

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return up * self.act_fn(gate)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[E T, K] -> [E T, K]: each expert sees all tokens, zeros where not routed, and gives zeros there."""
        projections, route = _adapted(self)
        if all([projection.bypassed(route) for projection in projections.values()]):
            return super().forward(hidden_states)
        count = hidden_states.shape[0] // self.num_experts
        if torch.compiler.is_compiling():
            rows = torch.arange(hidden_states.shape[0], device=hidden_states.device)
        else:
            rows = hidden_states.detach().any(1).nonzero()[:, 0]
        segments = Segments(rows // max(count, 1), rows % max(count, 1), count, self.num_experts, route)
        rows = rows[segments.order]
        y = _through(self, projections, hidden_states[rows], segments, route, grouped=False)
        return torch.zeros_like(hidden_states).index_copy(0, rows, y.to(hidden_states.dtype))


def __getattr__(name: str) -> Any:
    # Pickle finds the classes by name; making them imports a model of transformers.
    path = next((path for path, made in UNREGISTERED.items() if made == name), None)
    if path is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, kind = path.rpartition(".")
    base = getattr(importlib.import_module(module), kind)
    text = f"transformers' ``{kind}``, whose parameters are adapted."
    globals()[name] = type(name, (_Unregistered, base), {"__module__": __name__, "__doc__": text})
    return globals()[name]


def _adapted(owner: nn.Module) -> tuple[dict[str, ExpertProjection], Route]:
    """The adapted parameters of an experts module that runs, and the way of its forward."""
    adapted = {p.leaf: p for p in owner.children() if isinstance(p, ExpertProjection)}
    first = next(iter(adapted.values()))
    if torch.compiler.is_compiling():
        return adapted, first.router.traced()
    for projection in adapted.values():
        projection.called = True
    return adapted, first.router.route(first.training)


def forward(owner: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts' forward with the updates of adapted parameters: hidden_states [T, K], routes [T, k]."""
    adapted, route = _adapted(owner)
    implementation = owner.config.base._experts_implementation or "eager"
    if implementation not in BASES:
        raise unknown_choice("experts_implementation", implementation, BASES, " with adapters")
    if owner._is_expert_parallel:
        raise ValueError("model: its experts are spread over processes (expert parallel), where adapters do not run")
    if all([projection.bypassed(route) for projection in adapted.values()]):
        plain = type(owner).forward.__wrapped__
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        base = ALL_EXPERTS_FUNCTIONS.get_interface(implementation, plain)
        return base(owner, hidden_states, top_k_index, top_k_weights)
    experts, (count, k) = top_k_index.reshape(-1), top_k_index.shape
    tokens = torch.arange(experts.shape[0], device=experts.device) // max(k, 1)
    segments = Segments(experts, tokens, count, owner.num_experts, route)
    grouped = implementation == "grouped_mm" and owner.down_proj.dtype != torch.float64  # torch has none in float64
    y = _through(owner, adapted, hidden_states[segments.tokens], segments, route, grouped)
    y = y * top_k_weights.reshape(-1)[segments.order].unsqueeze(-1)
    back = torch.empty_like(segments.order)
    back[segments.order] = torch.arange(back.shape[0], device=back.device)
    y = y[back].view(*top_k_index.shape, -1).sum(1)
    return y.to(hidden_states.dtype)


def _through(
    owner: nn.Module,
    adapted: dict[str, ExpertProjection],
    x: Tensor,
    segments: Segments,
    route: Route,
    grouped: bool,
) -> Tensor:
    """What each row's expert makes of it; x [S, K] in the order of the segments."""

    def project(name: str, x: Tensor) -> Tensor:
        y = _base(owner, name, x, segments, grouped)
        projection = adapted.get(name)
        return y if projection is None or projection.bypassed(route) else projection.add_update(y, x, segments, route)

    h = owner._apply_gate(project("gate_up_proj", x)) if owner.has_gate else owner.act_fn(project("up_proj", x))
    y = project("down_proj", h)
    return owner.post_expert_norm(y) if owner.has_post_expert_norm else y


def _base(owner: nn.Module, name: str, x: Tensor, segments: Segments, grouped: bool) -> Tensor:
    """The model's own product of each row and its expert's matrix."""
    weight, bias = getattr(owner, name), None
    if owner.has_bias:
        bias = getattr(owner, f"{name}_bias")[segments.experts]
    if grouped or segments.runs is None:
        from transformers.integrations.moe import _grouped_linear

        return _grouped_linear(x, weight, segments.offsets, bias=bias, is_transposed=owner.is_transposed)
    ends = segments.offsets.tolist()
    sizes = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    parts = [
        rows @ w if owner.is_transposed else F.linear(rows, w)
        for rows, w in zip(x.split(sizes), weight, strict=True)
        if rows.shape[0]
    ]
    y = torch.cat(parts) if parts else x.new_empty((0, weight.shape[2 if owner.is_transposed else 1]))
    return y if bias is None else y + bias
