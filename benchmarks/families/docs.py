"""Rows of families as lines, and as a page of the documentation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..harness.tables import table
from .checks import NONE, OK

COLUMNS = ("slices", "gradients", "statistics", "peft", "checkpointing", "compile")
Rows = Mapping[str, Mapping[str, Any]]

_HEAD = """\
# Families of models

What the roles find in small random models of every family, and whether the numbers are right. One command writes this
page, and goes on where the file of rows ends:

```
OMP_NUM_THREADS=1 python -m benchmarks.families --json benchmarks/results/families.json --docs docs/families.md
```

- **roles**: how many matrices `"qkv"`, `"attention"`, `"mlp"`, `"mixer"` and `"experts"` take; a parameter of
  [experts](experts.md) counts as one. `fastlora.roles(model)` shows the rest.
- **slices**: the rows of each slice of a fused matrix were changed, and only what that slice feeds moved; of a
  convolution over channels, only its part of the split that the forward makes.
- **gradients**, **statistics**: outputs, every gradient and exact `grad_sq` in float64, against a model whose weights
  are W + s B A.
- **peft**: PEFT runs our file, and `fastlora.load` PEFT's, with the same outputs.
- **checkpointing**, **compile**: the same gradients with blocks recomputed, and of `torch.compile(backend="aot_eager")`
  (asked for by `--compile`; `as NAME`: the attention's code is that of a row that was). Of roles in no other one.

`ok` holds for every role of the row; `-` means that there is nothing to check: no fused matrix, no recomputation in the
library, a tower that the pass does not run, or a column not asked for. Everything else is the reason.

diffusers is an extra, which the tests do without; its rows are of diffusers 0.42.
"""


def one_line(row: Mapping[str, Any]) -> str:
    """A row as it is printed while it is made."""
    bad = [f"{column}={row[column]}" for column in COLUMNS if row[column] not in (OK, NONE)]
    reasons = [*bad, *([row["reason"]] if row["reason"] else [])]
    return "; ".join([_roles(row) or "no roles", *reasons, f"left {','.join(row['left'][:6])}"])


def page(rows: Rows) -> str:
    """The whole page."""
    old = sum("attention" not in row for row in rows.values())
    earlier = f"\n{old} rows are of an earlier run, which did not ask for experts.\n" if old else ""
    return _HEAD + earlier + "\n" + "\n".join(_sections(rows)) + "\n"


def _sections(rows: Rows) -> Iterator[str]:
    compiled = {
        code: key.partition("/")[2] for key, row in rows.items() if row["compile"] == OK
        for code in row.get("attention", "").split()
    }  # fmt: skip

    def cells(name: str, row: Mapping[str, Any]) -> list[str]:
        codes = row.get("attention", "").split()
        alike = row["compile"] == NONE and bool(codes) and set(codes) <= compiled.keys()
        shown = {**row, "compile": f"as {compiled[codes[0]]}"} if alike else row
        return [name, _roles(row), *[_cell(shown[c]) for c in (*COLUMNS, "reason")]]

    for library in ("transformers", "timm", "open_clip", "torchvision", "torch", "diffusers"):
        own = {key.partition("/")[2]: row for key, row in rows.items() if key.startswith(library + "/")}
        found = {name: row for name, row in own.items() if row["roles"] and not row.get("structure")}
        counted = {name: row for name, row in own.items() if row["roles"] and row.get("structure")}
        right = sum(all(row[c] in (OK, NONE) for c in COLUMNS) for row in found.values())
        yield f"## {library}: {len(found)} families with roles, {right} of them without a remark in any column\n"
        yield from table(
            ["family", "roles", *COLUMNS, "remark"],
            [cells(name, row) for name, row in found.items()],
            words=tuple(range(9)),
        )
        yield ""
        if counted:
            yield "Counted in the structure of the default size; no number was checked, because no small model ran:\n"
            yield from table(
                ["family", "roles", "why it was not run"],
                [[name, _roles(row), _cell(row["reason"])] for name, row in counted.items()],
                words=(0, 1, 2),
            )
            yield ""
        without = {name: row for name, row in own.items() if not row["roles"]}
        if without:
            yield "Without roles, or not built small by the generic sizes of the command:\n"
            yield from table(
                ["family", "reason"],
                [[name, _cell(row["reason"] or "no linear of a known block")] for name, row in without.items()],
                words=(0, 1),
            )
            yield ""


def _roles(row: Mapping[str, Any]) -> str:
    return " ".join(f"{role}:{count}" for role, count in row["roles"].items())


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("<", "").replace(">", "")
