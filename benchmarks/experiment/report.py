"""The results as JSON, pictures and a reading in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..harness import result_files
from .analysis import Runs, analyse
from .methods import BASELINE
from .plots import FIGURES

COMMAND = "OMP_NUM_THREADS=1 python -m benchmarks.experiment --data-dir DATA"


def write_report(runs: Runs, out: Path, pictures: bool = True) -> dict[str, Any]:
    """``results.json``, ``README.md`` and the pictures, in ``out``; returns the results."""
    results = analyse(runs)
    drawn = []
    if pictures:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        for name, (caption, draw) in FIGURES.items():
            figure = draw(pyplot, results)
            if figure is not None:
                figure.savefig(out / f"{name}.png", dpi=110, bbox_inches="tight")
                pyplot.close(figure)
                drawn.append((name, caption))
    result_files.write(out / "results.json", results)
    (out / "README.md").write_text(markdown(results, drawn), encoding="utf-8")
    return results


def _percent(value: Mapping[str, float | None], signed: bool = False) -> str:
    mean = f"{100 * value['mean']:{'+' if signed else ''}.2f}"
    return mean if value["half_width"] is None else f"{mean} ± {100 * value['half_width']:.2f}"


def _number(value: Mapping[str, float | None] | None, digits: int = 3) -> str:
    if value is None:
        return "-"
    mean = f"{value['mean']:.{digits}f}"
    return mean if value["half_width"] is None else f"{mean} ± {value['half_width']:.{digits}f}"


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def table(results: Mapping[str, Any]) -> list[list[str]]:
    """Header and one row a method."""
    rows = [["method", "accuracy %", "minus uniform LoRA", "p (Holm)", "adapters", "total rank", "head", "other",
             "CPU s / step", "step ratio", "setup s", "ECE"]]  # fmt: skip
    for method in results["methods"].values():
        versus, parameters = method["against_baseline"], method["parameters"]
        rows.append([
            method["label"], _percent(method["accuracy"]), _percent(versus, signed=True) if versus else "-",
            _p(versus["p_holm"]) if versus else "-", f"{parameters['adapters']:,}",
            "-" if method["total_rank"] is None else f"{method['total_rank']:.0f}", f"{parameters['head']:,}",
            f"{parameters['other']:,}", _number(method["step_cpu_seconds"]), _number(method["step_ratio"], 2),
            _number(method["setup_cpu_seconds"], 1), _number(method["ece"]),
        ])  # fmt: skip
    return rows


def _verdict(name: str, method: Mapping[str, Any]) -> str:
    versus = method["against_baseline"]
    gain = _percent(versus, signed=True)
    if versus["p_holm"] is None:
        why = "too few seeds for a test" if versus["n"] < 2 else "the same difference on every seed"
        return f"- {method['label']}: {gain} points; {why}."
    told = f"p = {versus['p_holm']:.3f} after Holm, {versus['p']:.3f} alone"
    if versus["p_holm"] >= 0.05:
        return f"- {method['label']}: {gain} points, **no difference from uniform LoRA shown** ({told})."
    return f"- {method['label']}: {gain} points, **{'better' if versus['mean'] > 0 else 'worse'}** ({told})."


def _estimates(results: Mapping[str, Any]) -> list[str]:
    lines = []
    for when, found in results["agreement"].items():
        if found:
            lines.append(
                f"- Probes (k = {found['probes']}) against exact grad_sq on the same {found['batches']} batches, "
                f"{when} training: Spearman {_number(found['spearman'])}, rms error {_percent(found['rms_error'])} %."
            )
    if results["drift"]:
        lines.append(
            f"- Exact importance before training against its average over the steps until it is frozen: Spearman "
            f"{_number(results['drift'])}. Below 1 it says how far importance drifts."
        )
    for normalize, factors in results["factors"].items():
        if factors:
            low, middle, high = factors
            lines.append(
                f"- Factors 1 - I under `{normalize}`: {low:.3f} to {high:.3f}, median {middle:.3f}; the nearer "
                "to each other, the more the penalty is a uniform one."
            )
    if results["same_predictions"]:
        shares = ", ".join(f"{results['methods'][n]['label']} {s:.2%}" for n, s in results["same_predictions"].items())
        lines.append(
            f"- Dev sentences predicted as by plain LoRA of the same seed: {shares}. Near 100 %, the penalty is too "
            f"small (lambda {results['settings']['penalty']:g}) to tell its forms apart."
        )
    for method in results["methods"].values():
        if method["settled"]:
            low = min(method["settled"])
            lines.append(f"- {method['label']}: ranking before and after the last batch, Spearman {low:.3f} at worst.")
    return lines


def markdown(results: Mapping[str, Any], drawn: list[tuple[str, str]]) -> str:
    settings = results["settings"]
    rows = table(results)
    base = results["methods"].get(BASELINE)
    seeds = sorted({seed for method in results["methods"].values() for seed in method["seeds"]})
    lines = [
        "# Does importance help? MiniLM on SST-2",
        "",
        f"all-MiniLM-L6-v2 (6 layers, width 384), adapters on query, key and value, one epoch over "
        f"{settings['sentences']:,} SST-2 training phrases in batches of {settings['batch']}, drawn anew for each of "
        f"{len(seeds)} seeds ({', '.join(map(str, seeds))}); accuracy on the 872 sentences of the dev set, on which "
        "nothing was chosen. All methods of a seed see the same batches, classifier and dropout seed. Rank "
        f"{settings['rank']} on each of 18 matrices, or as many parameters shared out otherwise.",
        "",
        "± is the 95 % interval of the mean (t over seeds). Tests are paired by seed. Seconds are CPU time of one "
        "thread.",
        "",
        "| " + " | ".join(rows[0]) + " |",
        "|" + "---|" * len(rows[0]),
        *("| " + " | ".join(row) + " |" for row in rows[1:]),
        "",
        f"`{COMMAND}`",
        "",
        *(
            f"Ran with: {', '.join(f'{name} {value}' for name, value in found.items())}."
            for found in results["environments"]
        ),
        "",
        "## Reading",
        "",
    ]
    if base and base["accuracy"]["half_width"] is not None:
        width = 100 * base["accuracy"]["half_width"]
        lines += [f"Uniform LoRA's own interval over the seeds is ± {width:.2f} points.", ""]
    lines += [_verdict(n, m) for n, m in results["methods"].items() if m["against_baseline"]]
    lines += ["", *_estimates(results)]
    lines += [
        "",
        "Read with care: one model, one task, one epoch; one learning rate for all adapters and heads, tuned for none "
        "(the head alone is still learning when the epoch ends); AdaLoRA trains 1.5 times the rank before it prunes, "
        "which the column of adapters shows; EVA and AdaLoRA run PEFT's layers, so that their step times compare "
        "implementations as well as methods.",
    ]
    for name, caption in drawn:
        lines += ["", f"![{caption}]({name}.png)"]
    return "\n".join(lines) + "\n"
