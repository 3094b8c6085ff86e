"""The demo's results as a table for the terminal and as one self-contained HTML page."""

from __future__ import annotations

import html
from pathlib import Path
from statistics import mean
from typing import Any

COLUMNS = (
    "method", "accuracy %", "per class %", "adapters", "head", "other", "ECE before", "ECE after", "s / step",
    "statistics",
)  # fmt: skip


def table_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row of text for every method, in the order of ``COLUMNS``."""
    rows = []
    for name, method in results["methods"].items():
        figures, parameters = method["summary"], method["parameters"]
        classes = figures["per_class"]
        rows.append(
            (
                method["label"],
                _percent(figures["accuracy"]),
                f"{100 * classes['mean']:.1f} ± {100 * classes['deviation']:.1f}",
                f"{parameters['adapters']:,}",
                f"{parameters['head']:,}",
                f"{parameters['other']:,}",
                _plus_minus(figures["ece_before"], ".3f"),
                _plus_minus(figures["ece_after"], ".3f"),
                f"{figures['seconds_per_step']['mean']:.4f}",
                _statistics_cell(name, method, results),
            )
        )
    return rows


def rich_tables(results: dict[str, Any], width: int | None) -> list[Any]:
    """The same table for a terminal of ``width`` columns, or for a file (None): as many tables as no cell is cut in.

    Each begins with the method; the first has the title, the last the note.
    """
    from rich.table import Table

    rows = table_rows(results)
    tables = []
    for columns in _folded(rows, width):
        first = not tables
        tables.append(Table(title=_title(results) if first else None, caption_justify="left"))
        for index in columns:
            tables[-1].add_column(COLUMNS[index], justify="left" if index == 0 else "right", no_wrap=True)
        for row in rows:
            tables[-1].add_row(*(row[index] for index in columns))
    tables[-1].caption = table_note(results)
    return tables


def _folded(rows: list[tuple[str, ...]], width: int | None) -> list[list[int]]:
    """Columns of each table: as many as fit beside the first one."""
    sizes = [max(len(line[index]) for line in (COLUMNS, *rows)) + 3 for index in range(len(COLUMNS))]
    tables, used = [[0]], sizes[0] + 1
    for index in range(1, len(COLUMNS)):
        if width is not None and used + sizes[index] > width and len(tables[-1]) > 1:
            tables.append([0])
            used = sizes[0] + 1
        tables[-1].append(index)
        used += sizes[index]
    return tables


def table_note(results: dict[str, Any]) -> str:
    case = results["cost"][0]
    return (
        f"Accuracy and ECE on {results['data']['test']} test images: mean ± deviation over {_seeds(results)}; "
        "per class: mean ± deviation over the five classes. adapters, head, other: trainable parameters. "
        f"Temperature fitted on {results['data']['validation']} validation images. s / step: median wall-clock. "
        "statistics: FC calibrates once; FW's probes ride along until the warm-up ends, their cost is the median "
        f"(quartiles) of paired ratios of a step with to a step without, {case['rounds']} interleaved rounds."
    )


def _statistics_cell(name: str, method: dict[str, Any], results: dict[str, Any]) -> str:
    if name == "fc":
        return f"once, {method['summary']['setup_seconds']['mean']:.1f} s"
    if name == "fw":
        cost = results["cost"][0]["variants"]["probe"]
        return f"x{cost['ratio']:.3f} ({cost['lower']:.3f}-{cost['upper']:.3f})"
    return "-"


def _plus_minus(value: dict[str, float | None], form: str) -> str:
    if value["deviation"] is None:
        return f"{value['mean']:{form}}"
    return f"{value['mean']:{form}} ± {value['deviation']:{form}}"


def _percent(value: dict[str, float | None]) -> str:
    deviation = value["deviation"]
    return _plus_minus({"mean": 100 * value["mean"], "deviation": deviation and 100 * deviation}, ".1f")


def _seeds(results: dict[str, Any]) -> str:
    count = len(results["settings"]["seeds"])
    return "one seed" if count == 1 else f"{count} seeds"


def _title(results: dict[str, Any]) -> str:
    return f"Digits 5 to 9 on a frozen transformer that knows 0 to 4 ({_seeds(results)})"


def write_page(results: dict[str, Any], captions: dict[str, str], out: Path) -> Path:
    """Write ``out/index.html`` with table, text and the pictures ``out/<name>.svg`` inside; returns its path."""
    page = out / "index.html"
    page.write_text(_page(results, captions, out), encoding="utf-8")
    return page


def _page(results: dict[str, Any], captions: dict[str, str], out: Path) -> str:
    pictures = []
    for name, caption in captions.items():
        drawing = (out / f"{name}.svg").read_text().replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)
        pictures.append(f"<figure>{drawing}<figcaption>{html.escape(caption)}</figcaption></figure>")
    checks = "".join(
        f'<li class="{"ok" if c["holds"] else "bad"}">{html.escape(c["claim"])}: {html.escape(c["value"])}</li>'
        for c in results["claims"]
    )
    findings = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in results["findings"])
    facts = results["environment"] | results["settings"]
    return _TEMPLATE.format(
        title=html.escape(_title(results)),
        intro=html.escape(_intro(results)),
        table=_html_table(COLUMNS, table_rows(results)),
        note=html.escape(table_note(results)),
        checks=checks,
        rule=html.escape(results["rule"]),
        findings=findings,
        figures="\n".join(pictures),
        adapter=html.escape(_adapter(results)),
        settings=_html_table(("setting", "value"), [(k, str(v)) for k, v in facts.items()]),
    )


def _intro(results: dict[str, Any]) -> str:
    data, base = results["data"], results["base"]
    return (
        f"A vision transformer with {base['parameters']:,} parameters was trained on {data['base']} images of the "
        f"digits 0 to 4 and reaches {100 * mean(base['accuracy']):.1f} % on {data['held_out']} held-out ones. "
        f"Frozen, it was adapted to 5 to 9 with {data['train']} images in five ways, "
        f"in {results['wall_seconds']:.0f} s all told."
    )


def _adapter(results: dict[str, Any]) -> str:
    saved = results["adapter"]
    return (
        f"The {results['methods'][saved['method']]['label']} adapter of seed {saved['seed']} lies in "
        f"{saved['folder']}/ as {', '.join(saved['files'])}. Read back into a fresh copy of the base its logits "
        f"differ by at most {saved['reload_max_difference']:.1e}."
    )


def _html_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide" tabindex="0"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>fastlora demo</title>
<style>
:root {{ color-scheme: light dark; --text: #1c1e21; --soft: #5c6167; --page: #fff; --line: #d9dce0;
 --ok: #0a7d4f; --bad: #b3261e }}
@media (prefers-color-scheme: dark) {{
 :root {{ --text: #e6e8ea; --soft: #a3a9b0; --page: #16181b; --line: #373b40; --ok: #4cc38a; --bad: #ff8a80 }} }}
body {{ font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page);
 max-width: 72rem; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.5rem }} h2 {{ font-size: 1.15rem; margin-top: 2rem }}
.wide {{ overflow-x: auto; max-width: 100% }}
table {{ border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }}
th, td {{ padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }}
th {{ white-space: normal; vertical-align: bottom }}
th:first-child, td:first-child {{ text-align: left; position: sticky; left: 0; background: var(--page) }}
.note, figcaption {{ color: var(--soft); font-size: .85rem }}
figure {{ margin: 1.5rem 0 }} svg {{ max-width: 100%; height: auto }} li, p {{ overflow-wrap: anywhere }}
.ok::marker {{ content: "\\2713  "; color: var(--ok) }} .bad::marker {{ content: "\\2717  "; color: var(--bad) }}
.bad {{ color: var(--bad) }}
</style></head><body>
<h1>{title}</h1>
<p>{intro}</p>
{table}
<p class="note">{note}</p>
<h2>What must hold</h2><ul>{checks}</ul>
<h2>What the numbers say</h2><p>{rule}</p><ul>{findings}</ul>
<h2>Pictures</h2>
{figures}
<h2>The adapter</h2><p>{adapter}</p>
<h2>Recipe and machine</h2>
<details><summary>all settings</summary>{settings}</details>
</body></html>
"""
