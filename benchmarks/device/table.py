"""The measured rows as Markdown: every row, the ratios, and each target with its verdict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .cases import CASES

DRY = ("cpu", "null GPU")  # devices of a dry run, which measures nothing
STEPS = ("deit_base_step", "llama_8_layers_step")
HEAD = "| case | variant | pass | mode | median ms | p10 | p90 | host us | GB/s | TFLOP/s | of roofline | peak MiB |"


class Target(NamedTuple):
    """``variant`` over ``base`` (a variant, or "[N,K]") on one case, by median or peak memory: at most ``limit``."""

    name: str
    case: str
    variant: str
    base: str
    limit: float
    key: str = "median_ms"
    passes: str = "both"


def _targets() -> list[Target]:
    separate, fused = ("roberta_base_qkv", "llama3_8b_qkv"), "deit_base_qkv"
    peft = {fused: 0.50, "roberta_base_qkv": 0.42, "llama3_8b_qkv": 0.70}
    gradstat = "exact gradstat over one weight-gradient matmul"
    return [
        *(Target("separate q, k, v over the frozen layers", c, "fastlora", "frozen", 1.00) for c in separate),
        Target("one fused qkv over the frozen layer", fused, "fastlora", "frozen", 1.25),
        *(Target("over PEFT bf16", case, "fastlora", "peft_bf16", limit) for case, limit in peft.items()),
        *(Target("probes over the same without", case, "fastlora_probe", "fastlora", 1.01) for case in CASES),
        *(Target(gradstat, case, "gradstat", "wgrad_library", 1.15, passes="forward") for case in CASES),
        *(
            Target("gradstat's memory beyond x and dy, over one bf16 [N,K]", case, "gradstat", "[N,K]", 1.00,
                   "peak_mib", "forward")
            for case in CASES
        ),
        *(
            Target("peak memory over PEFT bf16", case, "fastlora", "peft_bf16", 0.75, "peak_mib")
            for case in (*CASES, *STEPS)
        ),
    ]  # fmt: skip


TARGETS = _targets()


def _finder(rows: list[dict[str, Any]]) -> Callable[[str, str, str, str], dict[str, Any] | None]:
    found = {(r["case"], r["variant"], r["pass"], r["mode"]): r for r in rows}
    return lambda *key: found.get(key)


def measured(target: Target, rows: list[dict[str, Any]]) -> float | None:
    """What a target speaks of, from CUDA graphs (memory: from the eager run); None if it was not measured."""
    find, mode = _finder(rows), "eager" if target.key == "peak_mib" else "graph"
    top = find(target.case, target.variant, target.passes, mode)
    if target.base == "[N,K]":
        case = CASES[target.case]
        given, one = 2 * case.rows * (case.width + case.total) / 2**20, 2 * case.width * case.total / 2**20
        return (top[target.key] - given) / one if top and top[target.key] else None
    bottom = find(target.case, target.base, target.passes, mode)
    return top[target.key] / bottom[target.key] if top and bottom and bottom[target.key] else None


def _verdicts(result: dict[str, Any]) -> list[str]:
    """Every target by name; they bind on an H200."""
    lines = ["| target (H200, CUDA graphs) | case | at most | measured | verdict |", "|---|---|---|---|---|"]
    elsewhere = "" if "H200" in result["device"] else ", not on an H200"
    rows = [] if result["device"] in DRY else result["rows"]
    for target in TARGETS:
        value = measured(target, rows)
        verdict = "open: not measured" if value is None else ("met" if value <= target.limit else "missed") + elsewhere
        shown = "-" if value is None else f"{value:.3f}"
        lines.append(f"| {target.name} | {target.case} | {target.limit:.2f} | {shown} | {verdict} |")
    return lines


def _ratios(rows: list[dict[str, Any]]) -> list[str]:
    """The same ratios for every case in both modes."""
    find = _finder(rows)
    lines = ["| case | mode | over frozen | over PEFT bf16 | probes | gradstat over matmul | memory over PEFT bf16 |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for case, mode in sorted({(r["case"], r["mode"]) for r in rows}):

        def ratio(a: str, b: str, key: str = "median_ms", passes: str = "both", at=(case, mode)) -> str:
            top, bottom = find(at[0], a, passes, at[1]), find(at[0], b, passes, at[1])
            return f"{top[key] / bottom[key]:.3f}" if top and bottom and bottom[key] else "-"

        shown = [
            ratio("fastlora", "frozen"),
            ratio("fastlora", "peft_bf16"),
            ratio("fastlora_probe", "fastlora"),
            ratio("gradstat", "wgrad_library", passes="forward"),
            ratio("fastlora", "peft_bf16", "peak_mib"),
        ]
        lines.append(f"| {case} | {mode} | {' | '.join(shown)} |")
    return lines


def table(result: dict[str, Any], ceilings: tuple[float, float], missing: list[str]) -> str:
    """Markdown of a result; ``ceilings``: measured bytes and operations a second; ``missing``: what has no row, why."""
    lines = [f"# {result['device']}, driver {result['driver']}, {result['versions']}", ""]
    lines += [f"Measured ceilings: {ceilings[0] / 1e9:.0f} GB/s, {ceilings[1] / 1e12:.0f} TFLOP/s.", ""]
    lines += [HEAD, "|---" * 12 + "|"]
    for r in result["rows"]:
        times = f"{r['median_ms']:.4f} | {r['p10_ms']:.4f} | {r['p90_ms']:.4f} | {r['host_us']:.0f}"
        rates = f"{r['gbps']:.0f} | {r['tflops']:.1f} | {r['roofline']:.2f} | {r['peak_mib']:.0f}"
        lines.append(f"| {r['case']} | {r['variant']} | {r['pass']} | {r['mode']} | {times} | {rates} |")
    lines += ["", *_ratios(result["rows"]), "", *_verdicts(result), ""]
    lines += ["A `_step` is a whole training step with AdamW; its GB/s and TFLOP/s count the frozen matrices alone."]
    return "\n".join([*lines, "", *(f"- missing: {entry}" for entry in missing)]) + "\n"
