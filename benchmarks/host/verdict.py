"""The targets of the host path, and what was measured against each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

GROUPS = ("roberta", "deit", "llama")


class Target(NamedTuple):
    """At most ``limit`` times ``base`` of the same round, or microseconds where there is none, in every case."""

    text: str
    cases: tuple[str, ...]
    variant: str
    base: str | None
    limit: float


TARGETS = (
    Target("null GPU, over the frozen layers as written", GROUPS, "fastlora", "frozen", 1.5),
    Target("null GPU, with probes, over the frozen layers", GROUPS, "probes", "frozen", 1.5),
    Target("null GPU, over PEFT bf16", GROUPS, "fastlora", "peft", 0.5),
    Target("null GPU, with probes, over PEFT bf16", GROUPS, "probes", "peft", 0.5),
    Target("null GPU, probes over the same without", GROUPS, "probes", "fastlora", 1.03),
    Target("null GPU, probes + act_var over the same without", GROUPS, "act_var", "fastlora", 1.08),
    Target("null GPU, one adapted Linear over PEFT's", ("linear",), "fastlora", "peft", 0.8),
    Target("null GPU, four adapters in one batch over one adapter", GROUPS, "four_adapters", "fastlora", 1.3),
    Target("null GPU, tracker.step() for 72 matrices, µs", ("tracker",), "probes_step", None, 150.0),
    Target("null GPU, through autocast over the same without", GROUPS, "autocast", "fastlora", 1.3),
    Target("null GPU, dropout p = 0.1 over p = 0", GROUPS, "dropout", "fastlora", 1.12),
    Target("CPU, M = 4, K = N = 32, over the frozen layers", ("tiny",), "fastlora", "frozen", 1.6),
    Target("CPU, M = 4, K = N = 32, over PEFT", ("tiny",), "fastlora", "peft", 0.45),
    Target("CPU, S4 fp32, over the frozen layer", ("s4_fp32",), "fastlora", "frozen", 1.08),
    Target("CPU, S4 bf16, over the frozen layer", ("s4_bf16",), "fastlora", "frozen", 1.15),
    Target("CPU, S4 fp32, the same with the frozen layer's matmul", ("s4_fp32_linear",), "fastlora", "frozen", 1.08),
    Target("CPU, S4 bf16, the same with the frozen layer's matmul", ("s4_bf16_linear",), "fastlora", "frozen", 1.15),
    Target("CPU, S4 fp32, dropout p = 0.1 over p = 0", ("s4_fp32",), "dropout", "fastlora", 1.12),
    Target("CPU, S4 bf16, dropout p = 0.1 over p = 0", ("s4_bf16",), "dropout", "fastlora", 1.12),
)


class Verdict(NamedTuple):
    target: Target
    case: str
    found: Mapping[str, float]

    @property
    def met(self) -> bool:
        return self.found["median"] <= self.target.limit


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    """Every target in every case that was measured."""
    by_name = {(row["case"], row["variant"]): row for row in rows}
    found = []
    for target in TARGETS:
        for case in target.cases:
            row = by_name.get((case, target.variant))
            if row is not None:
                found.append(Verdict(target, case, row[f"over_{target.base}" if target.base else "us"]))
    return found
