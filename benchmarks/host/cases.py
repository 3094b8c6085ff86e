"""What the host benchmark times: projections as ``benchmarks.harness.peers`` builds them, on null GPU or CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import fastlora

from ..harness import many, peers
from ..harness.shapes import ALPHA, ANCHORS, SHAPES, Problem, Shape

DROPOUT = 0.1
ADAPTERS = 4
BLOCKS = 24  # of q, k and v each: 72 matrices
GPU_SHAPES = {"deit": ANCHORS["A1"], "roberta": ANCHORS["A2"], "llama": ANCHORS["A3"]}
TINY = Shape("tiny", "q, k, v of 4 rows", 1, 4, 32, (32, 32, 32), 4, fused=False)


@dataclass
class Step:
    """Forward and backward of any model whose forward returns a list; what ``Interleaved`` asks of a variant."""

    name: str
    model: nn.Module
    x: Tensor
    dy: Sequence[Tensor]
    every: int = 1
    tracker: None = None
    leaves: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.leaves = [self.x, *(p for p in self.model.parameters() if p.requires_grad)]

    def forget(self) -> None:
        """Nothing is kept between calls."""

    def call(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None
        torch.autograd.backward(self.model(self.x), self.dy)


@dataclass
class TrackerStep(Step):
    """``tracker.step()`` alone, each after a forward and backward that are not timed."""

    statistics: fastlora.Tracker | None = None

    def forget(self) -> None:
        super().call()

    def call(self) -> None:
        self.statistics.step()


@dataclass
class Autocast(Step):
    """The forward under autocast, as trainers run it: no kernel is called past the dispatcher."""

    def __post_init__(self) -> None:
        super().__post_init__()
        torch.set_autocast_dtype(self.x.device.type, self.x.dtype)

    def call(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None
        kind = self.x.device.type
        torch.set_autocast_enabled(kind, True)
        y = self.model(self.x)
        torch.set_autocast_enabled(kind, False)
        torch.autograd.backward(y, self.dy)


@dataclass
class Batch(many.Mixed):
    """Four adapters in one batch, inside a context that was opened before: layers share its order of rows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._open = contextlib.ExitStack()
        self._open.enter_context(fastlora.use_adapters(self.model, self.ids))

    def run(self) -> list[Tensor]:
        y = self.model(self.x)
        torch.autograd.backward(y, self.dy)
        return y

    def close(self) -> None:
        self._open.close()


def _as_step(kind: type[Step], name: str, variant: peers.Variant) -> Step:
    return kind(name, variant.model, variant.x, variant.dy)


def with_dropout(problem: Problem) -> Step:
    """``fastlora.inject`` with dropout of the adapters' input."""
    model = peers.Model(problem)
    config = fastlora.LoraConfig(
        r=problem.shape.rank, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules="qkv", split_qkv=True
    )
    fastlora.inject(model, config)
    built = Step("dropout", model.train(), problem.x.clone().requires_grad_(), problem.split(problem.dy, dim=2))
    built.call()
    model(built.x)
    return built


def peft_with_dropout(problem: Problem) -> Step:
    from peft import LoraConfig, get_peft_model

    model = peers.Model(problem)
    targets = list(model.attn.names)
    config = LoraConfig(r=problem.shape.rank, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=targets)
    base = get_peft_model(model, config, autocast_adapter_dtype=False).get_base_model().train()
    return Step("peft_dropout", base, problem.x.clone().requires_grad_(), problem.split(problem.dy, dim=2))


def batch(problem: Problem) -> Batch:
    factors = many.draw_factors(problem, [problem.shape.rank] * ADAPTERS)
    ids = torch.arange(problem.shape.batch) % ADAPTERS
    built = Batch(problem, factors, ids, name="four_adapters")
    built.call()
    built.model(built.x)  # the check for adapters that never learn looks here, and is over
    return built


def group(problem: Problem) -> list:
    """The variants of one q, k, v group on the null GPU."""
    return [
        peers.frozen(problem),
        peers.handwritten(problem),
        peers.peft(problem),
        peers.peft(problem, "peft_fp32", autocast_adapter_dtype=True),
        peers.ours(problem),
        peers.ours(problem, "control"),
        peers.ours(problem, "probes", peers.TRACKED["probes"]),
        peers.ours(problem, "act_var", peers.TRACKED["act_var"]),
        batch(problem),
        _as_step(Autocast, "autocast", peers.ours(problem)),
        _as_step(Autocast, "peft_autocast", peers.peft(problem)),
        with_dropout(problem),
        peft_with_dropout(problem),
    ]


class _One(nn.Module):
    def __init__(self, width: int, dtype: torch.dtype):
        super().__init__()
        self.fc = nn.Linear(width, width, dtype=dtype)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.fc(x)]


def one_linear(dtype: torch.dtype = torch.bfloat16, batch: int = 64, tokens: int = 64, width: int = 768) -> list[Step]:
    """A single adapted Linear: frozen, PEFT's and ours."""
    from peft import LoraConfig, get_peft_model

    def peft(model: nn.Module) -> nn.Module:
        config = LoraConfig(r=8, lora_alpha=ALPHA, target_modules=["fc"])
        return get_peft_model(model, config, autocast_adapter_dtype=False).get_base_model()

    def ours(model: nn.Module) -> nn.Module:
        fastlora.inject(model, fastlora.LoraConfig(r=8, lora_alpha=ALPHA, target_modules=["fc"]))
        return model

    makers: dict[str, Callable] = {"frozen": lambda model: model, "peft": peft, "fastlora": ours}
    built = []
    for name, make in makers.items():
        x = torch.empty(batch, tokens, width, dtype=dtype).requires_grad_()
        step = Step(name, make(_One(width, dtype)), x, [torch.empty(batch, tokens, width, dtype=dtype)])
        step.call()
        step.model(x)  # the check for adapters that never learn looks here, and is over
        built.append(step)
    return built


class _Blocks(nn.Module):
    def __init__(self, problem: Problem):
        super().__init__()
        self.blocks = nn.ModuleList(peers.Attention(problem) for _ in range(BLOCKS))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [y for block in self.blocks for y in block(x)]


def tracker_steps(problem: Problem) -> list[TrackerStep]:
    """``tracker.step()`` of 24 blocks, with probes and with act_var beside them."""
    built = []
    for name, statistics in peers.TRACKED.items():
        model = _Blocks(problem)
        fastlora.inject(model, fastlora.LoraConfig(r=8, lora_alpha=ALPHA, target_modules="qkv"))
        dy = problem.split(problem.dy, dim=2) * BLOCKS
        step = TrackerStep(f"{name}_step", model, problem.x.clone().requires_grad_(), dy)
        step.forget()
        model(step.x)
        step.statistics = fastlora.track(model, statistics=statistics, every=1)
        built.append(step)
    return built


def on_cpu(problem: Problem) -> list:
    """The variants of one q, k, v group on the CPU."""
    return [
        peers.frozen(problem),
        peers.handwritten(problem),
        peers.peft(problem),
        peers.ours(problem),
        peers.ours(problem, "control"),
        peers.ours(problem, "probes", peers.TRACKED["probes"]),
        peers.ours(problem, "act_var", peers.TRACKED["act_var"]),
        with_dropout(problem),
        peft_with_dropout(problem),
    ]


@dataclass(frozen=True)
class Case:
    """Variants that take turns; ``target`` is the one that ``Interleaved`` puts in the middle of a round.

    ``engine``: who multiplies by the frozen weight on the CPU; None: as FASTLORA_CPU_ENGINE says, or the fastest.
    ``longer``: rounds for each that is asked for: a second in which the processor is slow must not decide a short case.
    """

    title: str
    build: Callable[[], list]
    null: bool
    target: str = "fastlora"
    calls: int = 20
    engine: str | None = None
    longer: int = 1


def _group(name: str) -> Case:
    shape = GPU_SHAPES[name]
    return Case(shape.model, lambda: group(Problem(shape, torch.bfloat16)), null=True)


def _cpu(shape: Shape, dtype: torch.dtype, engine: str | None = None) -> Case:
    matmul = "" if engine is None else ", every matmul by F.linear"
    title = f"{shape.model}, {str(dtype).removeprefix('torch.')}{matmul}"
    return Case(title, lambda: on_cpu(Problem(shape, dtype)), null=False, engine=engine)


CASES: dict[str, Case] = {
    "tiny": _cpu(TINY, torch.float32),
    "s4_fp32": _cpu(SHAPES["S4"], torch.float32),
    "s4_bf16": _cpu(SHAPES["S4"], torch.bfloat16),
    "s4_fp32_linear": _cpu(SHAPES["S4"], torch.float32, "linear"),
    "s4_bf16_linear": _cpu(SHAPES["S4"], torch.bfloat16, "linear"),
    **{name: _group(name) for name in GPU_SHAPES},
    "linear": Case("one Linear, 768 to 768", one_linear, null=True, longer=5),
    "tracker": Case(
        f"tracker.step() of {3 * BLOCKS} matrices",
        lambda: tracker_steps(Problem(ANCHORS["A2"], torch.bfloat16)),
        null=True,
        target="probes_step",
        calls=2,
    ),
}
