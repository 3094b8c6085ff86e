"""The q, k, v groups that are timed on a GPU, and who computes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor, nn

import fastlora
from fastlora.ops import backends

ALPHA = 16.0
PROBES = 8


@dataclass(frozen=True)
class Case:
    """One attention block's projections; fused: one matrix holds the three."""

    name: str
    rows: int
    width: int
    outputs: tuple[int, int, int]
    rank: int = 8
    fused: bool = False

    @property
    def total(self) -> int:
        return sum(self.outputs)

    def work(self, passes: str, adapted: bool) -> tuple[float, float]:
        """(operations, least bytes) in bf16 of the "forward", the "backward" (gradients of x, A, B) or "both"."""
        M, K, N, R = self.rows, self.width, self.total, 3 * self.rank if adapted else 0
        narrow = 2.0 * M * self.rank * N if adapted else 0.0
        forward = (2.0 * M * K * N + 2.0 * M * K * R + narrow, 2.0 * (M * K + N * K + M * N + M * R))
        # dy is read for dx, and once more for dh, dB and Q; x once for dA.
        extra = 2.0 * (M * N + M * K) if adapted else 0.0
        backward = (2.0 * M * K * N + 4.0 * M * K * R + 2.0 * narrow, 2.0 * (M * N + N * K + M * K + M * R) + extra)
        if passes == "both":
            return forward[0] + backward[0], forward[1] + backward[1]
        return forward if passes == "forward" else backward


CASES = {
    case.name: case
    for case in (
        Case("deit_base_qkv", 128 * 197, 768, (768, 768, 768), fused=True),
        Case("roberta_base_qkv", 4096, 768, (768, 768, 768)),
        Case("llama3_8b_qkv", 8192, 4096, (4096, 1024, 1024)),
    )
}
TINY = {name: Case(name, 48, 32, (16, 16, 16), 4, case.fused) for name, case in CASES.items()}


class Attention(nn.Module):
    """Calls its projections on one tensor, as attention modules do."""

    def __init__(self, case: Case, fused: bool, device: str, dtype: torch.dtype):
        super().__init__()
        sizes = {"qkv": case.total} if fused else dict(zip("qkv", case.outputs, strict=True))
        for name, size in sizes.items():
            setattr(self, name, nn.Linear(case.width, size, device=device, dtype=dtype))
        self.names = tuple(sizes)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [getattr(self, name)(x) for name in self.names]


class Model(nn.Module):
    """The smallest model that holds the block."""

    def __init__(self, case: Case, fused: bool, device: str, dtype: torch.dtype):
        super().__init__()
        self.attn = Attention(case, fused, device, dtype)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.attn(x)


class HandWritten(nn.Module):
    """LoRA in a few lines of torch, adapters in the base's dtype."""

    def __init__(self, base: nn.Linear, sizes: tuple[int, ...], rank: int):
        super().__init__()
        options = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.base, self.scale = base, ALPHA / rank
        self.A = nn.ParameterList([torch.randn(rank, base.in_features, **options) * 0.02 for _ in sizes])
        self.B = nn.ParameterList([torch.randn(size, rank, **options) * 0.02 for size in sizes])

    def forward(self, x: Tensor) -> Tensor:
        updates = [self.scale * (x @ a.t() @ b.t()) for a, b in zip(self.A, self.B, strict=True)]
        update = updates[0] if len(updates) == 1 else torch.cat(updates, dim=-1)
        return F.linear(x, self.base.weight, self.base.bias) + update


@dataclass
class Variant:
    """Something that maps x to the projections, and what must be done around a step of it."""

    name: str
    case: Case
    call: Callable[[Tensor], list[Tensor]]
    leaves: list[Tensor]
    every50: Callable[[Tensor, list[Tensor]], Any] | None = None
    keep: list[Any] = field(default_factory=list)

    def forget(self) -> None:
        """Drop the gradients and statistics of the last step."""
        for leaf in self.leaves:
            leaf.grad = None


def _randomise(parameters: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.02)
    return parameters


def _frozen(case: Case, name: str, device: str, dtype: torch.dtype) -> Variant:
    model = Model(case, case.fused or name == "frozen_fused", device, dtype)
    return Variant(name, case, model, [])


def _torch(case: Case, name: str, device: str, dtype: torch.dtype) -> Variant:
    model = Model(case, case.fused, device, dtype)
    for i, module in enumerate(model.attn.names):
        sizes = case.outputs if case.fused else (case.outputs[i],)
        setattr(model.attn, module, HandWritten(getattr(model.attn, module), sizes, case.rank))
    return Variant(name, case, model, [p for p in model.parameters() if p.requires_grad])


def compiled(model: nn.Module) -> Callable:
    """``torch.compile``, for a backward that is timed several times over one graph."""
    # Buffers that a compiled backward reuses for its results are gone the second time.
    torch._functorch.config.donated_buffer = False
    return torch.compile(model)


def _peft(case: Case, name: str, device: str, dtype: torch.dtype) -> Variant:
    from peft import LoraConfig, get_peft_model

    model = Model(case, case.fused, device, dtype)
    config = LoraConfig(r=case.rank, lora_alpha=ALPHA, target_modules=list(model.attn.names))
    base = get_peft_model(model, config, autocast_adapter_dtype=name == "peft_default").get_base_model()
    leaves = _randomise([p for p in base.parameters() if p.requires_grad])
    return Variant(name, case, compiled(base) if name == "peft_compiled" else base, leaves)


def _fastlora(case: Case, name: str, device: str, dtype: torch.dtype) -> Variant:
    model = Model(case, case.fused, device, dtype)
    config = fastlora.LoraConfig(r=case.rank, lora_alpha=ALPHA, target_modules="qkv", split_qkv=True)
    # No optimizer runs here: the check would search for a step at every call.
    fastlora.inject(model, config, check="off")
    leaves = _randomise([p for p in model.parameters() if p.requires_grad])
    found = Variant(name, case, model, leaves)
    if name == "fastlora_probe":
        tracker = fastlora.track(model, statistics=("grad_sq",), probes=PROBES)
        found.keep.append(tracker)
        probes = [layer.probes["default"] for layer in tracker.layers.values()]
        found.leaves += [z for probe in probes for z in probe.Z.values()]
    if name == "fastlora_exact50":
        backend, _ = backends.choose("auto", torch.device(device), dtype)
        runs = (0, case.rows)
        found.every50 = lambda x, dy: backend.gradstat(x, dy, runs)
    return found


def _weight_gradient(case: Case, name: str, device: str, dtype: torch.dtype) -> Variant:
    """Not a layer: the exact statistic, or the library's weight gradient that it is held against."""
    backend, _ = backends.choose("auto", torch.device(device), dtype)
    dy = torch.randn(case.rows, case.total, device=device, dtype=dtype)
    if name == "gradstat":
        return Variant(name, case, lambda x: [backend.gradstat(x.detach(), [dy], (0, case.rows))], [])
    return Variant(name, case, lambda x: [torch.mm(dy.t(), x)], [])


# In the order in which they are timed: what matters most comes first, should the time run out.
BUILDERS = {
    "frozen": _frozen,
    "fastlora": _fastlora,
    "fastlora_probe": _fastlora,
    "peft_bf16": _peft,
    "gradstat": _weight_gradient,
    "wgrad_library": _weight_gradient,
    "frozen_fused": _frozen,
    "torch": _torch,
    "peft_default": _peft,
    "fastlora_exact50": _fastlora,
    "peft_compiled": _peft,
}


def build(case: Case, name: str, device: str, dtype: torch.dtype) -> Variant:
    """A variant of a case."""
    torch.manual_seed(0)
    return BUILDERS[name](case, name, device, dtype)
