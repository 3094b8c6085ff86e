"""docs/troubleshoot.md has every message of the package: read out of the source, matched with the page's patterns."""

from __future__ import annotations

import ast
import importlib
import pathlib
import re

import pytest

import fastlora

ROOT = pathlib.Path(fastlora.__file__).parent
PAGE = ROOT.parent / "docs" / "troubleshoot.md"
DIALECT = "…: expected …, got …"
CHECKS = {"wrong_type", "wrong_value", "unknown_choice", "wrong"}
# Signals between a plan's recorder and its caller, which nobody sees, and the command line's own parser.
INTERNAL = {"NotPlannable", "Traced", "argparse.ArgumentTypeError"}
# Whose text is another's: an error of a tensor on the device, of the system, of an attribute's name.
HANDED_ON = {("_utils/torch_compat.py", "RuntimeError"), ("_utils/files.py", "OSError"),
             ("ops/backends/planned.py", "AttributeError"), ("nn/experts.py", "AttributeError"),
             ("_utils/distributed.py", "error")}  # fmt: skip

SHORT = {"--model: …", "… needs …: …"}  # patterns of one word


def template(node: ast.AST, scope: dict[str, str]) -> str:
    """A message as the source has it, with ``…`` for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part, scope) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left, scope) + template(node.right, scope)
    if isinstance(node, ast.IfExp):
        return template(node.body, scope)
    node = node.value if isinstance(node, ast.FormattedValue) else node
    name = node.func if isinstance(node, ast.Call) else node
    return scope.get(name.attr if isinstance(name, ast.Attribute) else getattr(name, "id", ""), "…")


def texts_of(tree: ast.Module, module: str) -> dict[str, str]:
    """Constants of a module, texts that are given a name before they are raised, and what ``_text(...)`` returns."""
    found = {k: v for k, v in vars(importlib.import_module(module)).items() if k.isupper() and isinstance(v, str)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "text":
            found["text"] = template(node.value, {})
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name in ("_text", "_none_yet"):
            found[node.name] = next(template(n.value, found) for n in ast.walk(node) if isinstance(n, ast.Return))
    return found


def messages(file: pathlib.Path) -> set[str]:
    """Every message that a file can raise or warn with."""
    module = ".".join(("fastlora", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
    tree, found = ast.parse(file.read_text()), set()
    scope = texts_of(tree, module)
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            call = node.exc if isinstance(node.exc, ast.Call) else None
            kind = ast.unparse(call.func if call else node.exc)
            if kind in INTERNAL:
                continue
            argument = call.args[-1 if kind == "OSError" else 0] if call else None
            text = DIALECT if kind in CHECKS else "…" if argument is None else template(argument, scope)
            if kind == "OSError" and "text" in scope and isinstance(call.args[1], ast.Name):
                text = scope["text"]
            handed = (file.relative_to(ROOT).as_posix(), kind) in HANDED_ON or node.cause is not None
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("logger.warning", "warnings.warn"):
            texts = [template(a, scope) for a in node.args]
            text = texts[1] if texts[0] == "%s" else re.sub(r"%[.\d]*[sdrgf]", "…", texts[0])
            handed = False
        else:
            continue
        text = re.sub("…+", "…", text).replace("%%", "%")
        if len(re.findall(r"\w{2,}", text)) > 1 or not handed:
            found.add(text)
    return found


def every_message() -> dict[str, str]:
    return {text: str(file) for file in sorted(ROOT.rglob("*.py")) for text in messages(file)}


def patterns(page: str) -> list[str]:
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    return [pattern for row in rows for pattern in re.findall("`([^`]+)`", row.split(" | ")[0])]


def matches(pattern: str, message: str) -> bool:
    parts = [re.escape(part) for part in re.sub("…+", "…", pattern).split("…")]
    return re.fullmatch(".*".join(parts), message, re.DOTALL) is not None


def covered(message: str, known: list[str]) -> bool:
    if re.search(r"\bexpected .*\bgot\b", message, re.DOTALL):
        return True  # the dialect of all arguments: says itself what to pass
    return any(matches(pattern, message) for pattern in known)


def test_every_message_has_its_row():
    known = patterns(PAGE.read_text())
    assert DIALECT in known
    missing = [f"{file}: {text}" for text, file in every_message().items() if not covered(text, known)]
    assert not missing, "\n".join(missing)


def test_every_row_is_a_message():
    """None is left behind by a message that has changed, and none takes everything."""
    texts = every_message()
    for pattern in patterns(PAGE.read_text()):
        assert len(re.findall("[A-Za-z_]{2,}", pattern)) > 1 or pattern in SHORT, pattern
        assert any(matches(pattern, text) for text in texts), pattern


def test_every_row_has_cause_and_cure():
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert len(rows) > 60
    for row in rows:
        cells = row.strip("| ").split(" | ")
        assert len(cells) == 3 and all(len(cell) > 5 for cell in cells), row


@pytest.mark.parametrize("source, found", [
    ('raise ValueError(f"model: {path!r} melts")', {"model: … melts"}),
    ('raise wrong_value("x", "a number", x)', {DIALECT}),
    ('logger.warning("slow: %s", why)', {"slow: …"}),
    ("raise ValueError(reason)", {"…"}),
    ('raise ValueError(f"{where}: {error}") from error', set()),
])  # fmt: skip
def test_messages_are_found(source, found, monkeypatch):
    """Also that a text which nobody can read out of the source is no way past the page."""
    monkeypatch.setattr(f"{__name__}.texts_of", lambda tree, module: {})

    class File(type(ROOT)):
        def read_text(self, *_):
            return source

    assert messages(File(ROOT / "config.py")) == found
    assert not any(covered(text, ["model: … freezes"]) for text in found - {DIALECT})
