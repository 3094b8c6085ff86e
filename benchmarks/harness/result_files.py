"""Result files: JSON with one row a line, so that a change of a row is a change of one line.

    python -m benchmarks.harness.result_files FILE ...

rewrites files of other origin (those of ``make demo``) in this form. Standard library only: the tools and the scripts
for a GPU import it without the rest.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def read(path: Path) -> Any:
    """The document of a file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, document: Any) -> None:
    """Write a document, one row a line; the file is not touched where something in it is no JSON."""
    text = dumps(document)
    path.write_text(text, encoding="utf-8")


def dumps(document: Any) -> str:
    """The text of a document.

    A list of objects and an object of objects are tables: each entry begins a line of its own, and is one line unless
    it holds a table itself. Values beside a table share a line; the entries of the document itself do not.
    """
    return _text(json.loads(json.dumps(document)), 0) + "\n"


def _is_table(value: Any) -> bool:
    entries = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return bool(entries) and all(isinstance(entry, dict) for entry in entries)


def _has_table(value: Any) -> bool:
    if isinstance(value, dict):
        return _is_table(value) or any(map(_has_table, value.values()))
    return isinstance(value, list) and (_is_table(value) or any(map(_has_table, value)))


def _text(value: Any, depth: int) -> str:
    if depth and not _has_table(value) or not value or not isinstance(value, (dict, list)):
        return json.dumps(value)
    if isinstance(value, dict):
        entries = [(f"{json.dumps(key)}: {_text(item, depth + 1)}", _has_table(item)) for key, item in value.items()]
    else:
        entries = [(_text(item, depth + 1), _has_table(item)) for item in value]
    indent, alone = " " * (depth + 1), depth == 0 or _is_table(value)
    lines: list[str] = []
    packed = False  # whether the last line takes further entries
    for text, tall in entries:
        if packed and not tall:
            lines[-1] += f", {text}"
        else:
            lines.append(indent + text)
        packed = not (alone or tall)
    body = ",\n".join(lines)
    return f"{{\n{body}\n{indent[1:]}}}" if isinstance(value, dict) else f"[\n{body}\n{indent[1:]}]"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        write(Path(name), read(Path(name)))
