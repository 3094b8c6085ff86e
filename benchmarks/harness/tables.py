"""Markdown tables and the cells in them."""

from __future__ import annotations

from collections.abc import Iterator


def table(header: list[str], rows: list[list[str]], words: tuple[int, ...] = (0,)) -> Iterator[str]:
    """Columns of words are aligned to the left, numbers to the right."""
    yield "| " + " | ".join(header) + " |"
    yield "|" + "|".join("---" if i in words else "---:" for i in range(len(header))) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def cell(ratio: dict[str, float] | None, digits: int = 3) -> str:
    if ratio is None:
        return ""
    return f"{ratio['median']:.{digits}f} [{ratio['p10']:.{digits}f}, {ratio['p90']:.{digits}f}]"
