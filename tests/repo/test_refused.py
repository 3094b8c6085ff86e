"""docs/refused.md names every refusal that is about the state of a model."""

from __future__ import annotations

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
FOLDERS = ("model", "nn", "tracking", "peft_io", "integrations")
PREFIXES = ("model: ", "optimizer: ", "track: expected no")
SHORTEST = 12


def messages():
    """(kind, the constant parts of the text) of each error."""
    files = [file for folder in FOLDERS for file in sorted((ROOT / "fastlora" / folder).rglob("*.py"))]
    for file in [ROOT / "fastlora" / "_utils" / "distributed.py", *files]:
        for node in ast.walk(ast.parse(file.read_text())):
            raised = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args
            if raised and node.func.id in ("ValueError", "RuntimeError"):
                text = node.args[0]
                parts = text.values if isinstance(text, ast.JoinedStr) else [text]
                yield node.func.id, [p.value for p in parts if isinstance(p, ast.Constant) and isinstance(p.value, str)]


def test_every_state_that_is_refused_is_listed():
    page = (ROOT / "docs" / "refused.md").read_text()
    quoted = [
        quote for pair in re.findall(r'`([^`\n]+)`|"([^"\n]+)"', page) for quote in pair if len(quote) >= SHORTEST
    ]
    missing = []
    for kind, parts in messages():
        text = "".join(parts)
        asked = (text.startswith(PREFIXES) or kind == "RuntimeError") and any(len(p) >= SHORTEST for p in parts)
        named = any(part.removeprefix("model:").strip(" ;:,") in page for part in parts if len(part) >= SHORTEST)
        if asked and not named and not any(quote in text for quote in quoted):
            missing.append(text)
    assert not missing, "\n".join(missing)
