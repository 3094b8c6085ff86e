"""The same adapted projections built by us and by others: the variants that the layer benchmarks compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlora

from .shapes import Problem, Projection

TRACKED = {"probes": ("grad_sq",), "act_var": ("grad_sq", "act_var")}
INFORMATIVE = 3  # rows that no target is about run in every third round: both orders of a round come up
LABELS = {
    "frozen": "frozen nn.Linear",
    "peft": "PEFT, adapters in the base dtype",
    "peft_fp32": "PEFT, default (fp32 adapters)",
    "peft_compiled": "PEFT under torch.compile",
    "handwritten": "hand-written torch",
    "function": "hand-written autograd.Function",
    "naive": "PEFT + requires_grad on W, squared",
    "hooks": "fastlora + hooks that form dyᵀx, squared",
    "fastlora": "fastlora",
    "fastlora_compiled": "fastlora under torch.compile",
    "python": 'fastlora, backend="eager"',
    "control": "fastlora again (control: same code)",
    "probes": "fastlora + probes",
    "probes_step": "fastlora + probes + tracker.step()",
    "model_head": "head only: no backward through the blocks",
    "model_accelerated": "fastlora, accelerate_frozen",
    "model_probes": "fastlora + probes + tracker.step()",
    "act_var": "fastlora + probes + act_var",
    "act_var_step": "fastlora + probes + act_var + tracker.step()",
    "exact": "fastlora + exact grad_sq, kept",
    "exact_step": "fastlora + exact grad_sq + tracker.step()",
}


class Attention(nn.Module):
    """Calls q, k and v, or the fused qkv, on one tensor, as attention modules do."""

    def __init__(self, problem: Problem):
        super().__init__()
        names = ("qkv",) if problem.shape.fused else ("q", "k", "v")
        for name, weight, bias in zip(names, problem.split(problem.weight), problem.split(problem.bias), strict=True):
            layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=problem.dtype)
            layer.weight.data.copy_(weight)
            layer.bias.data.copy_(bias)
            setattr(self, name, layer)
        self.names = names

    def forward(self, x: Tensor) -> list[Tensor]:
        return [getattr(self, name)(x) for name in self.names]


class Model(nn.Module):
    """The smallest model that holds the attention block."""

    def __init__(self, problem: Problem):
        super().__init__()
        self.attn = Attention(problem)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.attn(x)


@dataclass
class Variant:
    """A model with its adapters; ``call`` is one forward and backward with fresh gradients.

    ``every``: measured in each n-th round.
    """

    name: str
    model: nn.Module
    problem: Problem
    projections: list[Projection]
    tracker: fastlora.Tracker | None = None
    every: int = 1
    x: Tensor = field(init=False)
    dy: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.x = self.problem.x.clone().requires_grad_()
        self.dy = self.problem.split(self.problem.dy, dim=2)
        self._leaves = [self.x, *(t for p in self.projections for t in (p.A, p.B))]

    def call(self) -> None:
        for leaf in self._leaves:
            leaf.grad = None
        torch.autograd.backward(self.model(self.x), self.dy)

    def forget(self) -> None:
        """Drop the statistics of the last call, so that those of repeated calls do not add up."""
        if self.tracker is not None:
            self.tracker.discard()

    def gradients(self) -> dict[str, Tensor]:
        """Output and gradients of one call, named as ``Problem.expected`` names them."""
        for leaf in self._leaves:
            leaf.grad = None
        outputs = self.model(self.x)
        torch.autograd.backward(outputs, self.dy)
        found = {"y": torch.cat(outputs, dim=-1).detach().flatten(0, 1), "dx": self.x.grad.flatten(0, 1)}
        for i, p in enumerate(self.projections):
            found |= {f"dA[{i}]": p.A.grad, f"dB[{i}]": p.B.grad}
        return found

    def saved_bytes(self) -> int:
        """What autograd keeps from forward to backward besides parameters; x counts: somebody has to keep it."""
        parameters = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = self.model(self.x)
        torch.autograd.backward(outputs, self.dy)
        return sum(kept.values())


@dataclass
class Looking(Variant):
    """Probes by columns whose every step looks at the columns' norms, as one in eight does."""

    def forget(self) -> None:
        super().forget()
        for layer in self.tracker.layers.values():
            layer.probes["default"].step.refreshes_norms = True


@dataclass
class NaiveStatistics(Variant):
    """Squared gradients as one gets them otherwise: frozen weights ask for theirs, [N, K] each."""

    grad_sq: list[Tensor] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        shape, self.parts = self.problem.shape, []
        weights = [m.base_layer.weight.requires_grad_() for m in self.model.attn.children()]
        for i, rows in enumerate(_columns(list(shape.outputs))):
            self.parts.append((weights[0], rows) if shape.fused else (weights[i], slice(None)))

    def call(self) -> None:
        for weight, _ in self.parts:
            weight.grad = None
        super().call()
        self.grad_sq = [weight.grad[rows].square().sum() for weight, rows in self.parts]


@dataclass
class HookStatistics(Variant):
    """Squared gradients as hooks take them: x kept by the forward, dy^T x when dy comes along."""

    grad_sq: list[Tensor] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.order = list(self.problem.split(torch.arange(sum(self.problem.shape.outputs))))
        layers = [getattr(self.model.attn, name) for name in self.model.attn.names]
        for place, layer in enumerate(layers):
            layer.register_forward_hook(lambda module, args, y, place=place: self._seen(place, args[0], y))

    def _seen(self, place: int, x: Tensor, y: Tensor) -> None:
        def keep(dy: Tensor) -> None:
            gradient = dy.flatten(0, -2).t() @ x.detach().flatten(0, -2)
            parts = gradient.split(list(self.problem.shape.outputs)) if self.problem.shape.fused else [gradient]
            self.grad_sq[place : place + 1] = [part.square().sum() for part in parts]

        y.register_hook(keep)

    def call(self) -> None:
        self.grad_sq = [None] * len(self.order)
        super().call()


def _columns(sizes: list[int]) -> list[slice]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def _fill(problem: Problem, pairs: list[tuple[Tensor, Tensor]], scale: float) -> list[Projection]:
    """Give adapter parameters in output order their values."""
    columns = _columns([B.shape[0] for _, B in pairs])
    for A, B in pairs:
        for parameter, value in zip((A, B), problem.factors(B.shape[0]), strict=True):
            parameter.data.copy_(value)
    return [Projection(A, B, scale, where) for (A, B), where in zip(pairs, columns, strict=True)]


def frozen(problem: Problem) -> Variant:
    """The layers without adapters: what must be computed in any case."""
    return Variant("frozen", Model(problem), problem, [])


def peft(problem: Problem, name: str = "peft", autocast_adapter_dtype: bool = False) -> Variant:
    """PEFT's own layers. A fused qkv is one matrix there: A [r, K], dense B [3N, r]."""
    from peft import LoraConfig, get_peft_model

    model, rank = Model(problem), problem.shape.rank
    config = LoraConfig(r=rank, lora_alpha=problem.scale * rank, target_modules=list(model.attn.names))
    # The layers are timed, not the wrapper around the whole model.
    base = get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype).get_base_model()
    layers = [getattr(base.attn, n) for n in base.attn.names]
    pairs = [(layer.lora_A["default"].weight, layer.lora_B["default"].weight) for layer in layers]
    return Variant(name, base, problem, _fill(problem, pairs, problem.scale))


class HandWritten(nn.Module):
    """LoRA as one writes it in a few lines of torch; several ranks in a fused matrix are joined with cat."""

    def __init__(self, base: nn.Linear, sizes: tuple[int, ...], rank: int, scale: float):
        super().__init__()
        dtype = base.weight.dtype
        self.base, self.scale = base, scale
        self.A = nn.ParameterList([torch.empty(rank, base.in_features, dtype=dtype) for _ in sizes])
        self.B = nn.ParameterList([torch.empty(size, rank, dtype=dtype) for size in sizes])

    def forward(self, x: Tensor) -> Tensor:
        updates = [self.scale * (x @ a.t() @ b.t()) for a, b in zip(self.A, self.B, strict=True)]
        update = updates[0] if len(updates) == 1 else torch.cat(updates, dim=-1)
        return F.linear(x, self.base.weight, self.base.bias) + update


def handwritten(problem: Problem) -> Variant:
    model, shape = Model(problem), problem.shape
    pairs = []
    for i, name in enumerate(model.attn.names):
        sizes = shape.outputs if shape.fused else (shape.outputs[i],)
        layer = HandWritten(getattr(model.attn, name), sizes, shape.rank, problem.scale)
        setattr(model.attn, name, layer)
        pairs += list(zip(layer.A, layer.B, strict=True))
    return Variant("handwritten", model, problem, _fill(problem, pairs, problem.scale))


class _ProjectionsFunction(torch.autograd.Function):
    """All projections of one input in one node that keeps x alone, as the careful user writes it (Unsloth does)."""

    @staticmethod
    def forward(
        ctx, x: Tensor, scale: float, places: list[tuple[int, slice]], bases: list[nn.Linear], *factors: Tensor
    ):
        rows, count = x.flatten(0, -2), len(places)
        outputs = [F.linear(rows, base.weight, base.bias) for base in bases]
        for (j, columns), a, b in zip(places, factors[:count], factors[count:], strict=True):
            outputs[j][:, columns].addmm_(rows @ a.t(), b.t(), alpha=scale)
        ctx.save_for_backward(rows, *factors)
        ctx.call = scale, places, bases, x.shape
        return tuple(y.view(*x.shape[:-1], -1) for y in outputs)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x, *factors = ctx.saved_tensors
        scale, places, bases, shape = ctx.call
        A, B = factors[: len(places)], factors[len(places) :]
        dy = [grad.flatten(0, -2) for grad in grads]
        dx = dy[0] @ bases[0].weight
        for grad, base in zip(dy[1:], bases[1:], strict=True):
            dx.addmm_(grad, base.weight)
        dA, dB = [], []
        for (j, columns), a, b in zip(places, A, B, strict=True):
            mine = dy[j][:, columns]
            dh = (mine @ b).mul_(scale)
            dA.append(dh.t() @ x)
            dB.append(((x @ a.t()).t() @ mine).mul_(scale).t())
            dx.addmm_(dh, a)
        return dx.view(shape), None, None, None, *dA, *dB


class FunctionAttention(nn.Module):
    """The attention block with its projections in one hand-written autograd.Function."""

    def __init__(self, attention: Attention, problem: Problem):
        super().__init__()
        shape = problem.shape
        self.bases = nn.ModuleList([getattr(attention, name) for name in attention.names])
        columns = _columns(list(shape.outputs))
        self.places = [(0, where) if shape.fused else (i, slice(None)) for i, where in enumerate(columns)]
        self.scale, dtype = problem.scale, problem.dtype
        self.A = nn.ParameterList([torch.empty(shape.rank, shape.width, dtype=dtype) for _ in columns])
        self.B = nn.ParameterList([torch.empty(n, shape.rank, dtype=dtype) for n in shape.outputs])

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(_ProjectionsFunction.apply(x, self.scale, self.places, list(self.bases), *self.A, *self.B))


def function(problem: Problem) -> Variant:
    model = Model(problem)
    model.attn = FunctionAttention(model.attn, problem)
    pairs = list(zip(model.attn.A, model.attn.B, strict=True))
    return Variant("function", model, problem, _fill(problem, pairs, problem.scale), every=INFORMATIVE)


def compiled(variant: Variant, name: str) -> Variant:
    """The same model under ``torch.compile`` at its defaults."""
    variant.name, variant.every, variant.model = name, INFORMATIVE, torch.compile(variant.model)
    return variant


def naive(problem: Problem) -> NaiveStatistics:
    """PEFT's layers, with the squared gradient of W by asking autograd for it."""
    built = peft(problem)
    return NaiveStatistics("naive", built.model, problem, built.projections, every=INFORMATIVE)


def ours(
    problem: Problem,
    name: str = "fastlora",
    statistics: tuple[str, ...] = (),
    backend: str = "auto",
    estimator: str = "probe",
    probes: int | str = "auto",
    probe_kind: str = "rademacher",
) -> Variant:
    """What ``fastlora.inject`` makes of the model, with a tracker at its defaults where statistics are asked for."""
    model, rank = Model(problem), problem.shape.rank
    config = fastlora.LoraConfig(
        r=rank, lora_alpha=problem.scale * rank, target_modules="qkv", split_qkv=True, backend=backend
    )
    fastlora.inject(model, config)
    pairs = [(a, b) for n in model.attn.names for a, b, _ in getattr(model.attn, n).pairs()]
    projections = _fill(problem, pairs, problem.scale)
    # A first step: the check for adapters that never learn watches until a forward finds gradients or changed weights,
    # which a round, clearing gradients and moving no weight, would never show it.
    torch.autograd.backward(model(problem.x), problem.split(problem.dy, dim=2))
    model(problem.x)
    tracker = None
    if statistics:
        tracker = fastlora.track(
            model, estimator=estimator, probes=probes, statistics=statistics, every=1, probe_kind=probe_kind
        )
    return Variant(name, model, problem, projections, tracker)


def looking(problem: Problem) -> Looking:
    """``columns`` with k = 8, at its most expensive."""
    built = ours(problem, "columns_8_look", ("grad_sq",), probes=8, probe_kind="columns")
    return Looking(built.name, built.model, problem, built.projections, built.tracker)


def hooks(problem: Problem) -> HookStatistics:
    """Our layers, with the squared gradient of W from hooks that a user writes."""
    built = ours(problem)
    return HookStatistics("hooks", built.model, problem, built.projections, every=INFORMATIVE)


def exact(problem: Problem) -> Variant:
    """Squared norms of the whole gradient, of every step."""
    variant = ours(problem, "exact", ("grad_sq",), estimator="exact")
    variant.every = INFORMATIVE
    return variant


def variants(problem: Problem, compile: bool = False) -> list[Variant]:
    """Every variant of a problem, in the order in which a round runs them."""
    builders: list[Callable[[Problem], Variant]] = [frozen, handwritten, function, peft]
    if problem.dtype != torch.float32:
        builders.append(lambda p: peft(p, "peft_fp32", autocast_adapter_dtype=True))
    built = [build(problem) for build in builders]
    built += [ours(problem), ours(problem, "python", backend="eager")]
    built += [ours(problem, name, kinds) for name, kinds in TRACKED.items()]
    if problem.dtype == torch.float32:
        built += [naive(problem), exact(problem)]
    if compile:
        built += [compiled(peft(problem), "peft_compiled"), compiled(ours(problem), "fastlora_compiled")]
    return [*built, ours(problem, "control")]
