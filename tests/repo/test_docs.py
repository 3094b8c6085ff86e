"""The pages run as they stand, and the reference leaves no public name out."""

from __future__ import annotations

import dataclasses
import html
import inspect
import os
import pathlib
import re
import subprocess
import sys

import pytest

import fastlora
from fastlora.cli.__main__ import COMMANDS, main
from fastlora.integrations import __all__ as integrations
from fastlora.model.summary import Summary

DOCS = pathlib.Path(__file__).parents[2] / "docs"
REFERENCE = DOCS / "reference" / "index.md"
# Pages with tests of their own: these need a process group, or a library that is optional.
ELSEWHERE = {"your_trainer", "scale_out", "migration", "quantized"}
PAGES = sorted(p.stem for p in DOCS.glob("*.md") if p.stem not in ELSEWHERE and "```python" in p.read_text())


def blocks(text: str) -> list[str]:
    """Python code of a page, each block at its own line so that errors point into the page."""
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return ["\n" * (text[: match.start(1)].count("\n")) + match[1] for match in found]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, scope = DOCS / f"{page}.md", {"__name__": page}
    for block in blocks(path.read_text()):
        exec(compile(block, str(path), "exec"), scope)


def test_every_guide_has_code():
    guides = {"drop_in", "statistics", "ranks", "many_adapters", "your_trainer"}
    assert guides <= {path.stem for path in DOCS.glob("*.md")}
    assert all(len(blocks((DOCS / f"{guide}.md").read_text())) >= 3 for guide in guides)


def test_every_block_is_found():
    for path in DOCS.glob("*.md"):
        text = path.read_text()
        assert len(blocks(text)) == text.count("```python"), path.name


def test_an_error_points_into_the_page():
    with pytest.raises(ZeroDivisionError) as error:
        exec(compile(blocks("# Title\n\n```python\n1 / 0\n```\n")[0], "page", "exec"), {})
    assert error.traceback[-1].lineno + 1 == 4


def test_the_reference_names_every_public_name_and_no_other():
    text = REFERENCE.read_text()
    names = re.findall(r"^\.\. auto(?:class|function|module):: fastlora\.(\w+)$", text, re.MULTILINE)
    assert sorted(names) == sorted(fastlora.__all__)
    kinds = dict(re.findall(r"^\.\. auto(\w+):: fastlora\.(\w+)$", text, re.MULTILINE))
    assert set(kinds) == {"class", "function", "module"}
    assert all(inspect.getdoc(getattr(fastlora, name)) for name in names)


def test_the_site_builds_without_a_warning(tmp_path):
    for library in ("sphinx", "furo", "myst_parser"):
        pytest.importorskip(library)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(DOCS.parent)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
    page = (tmp_path / "reference" / "index.html").read_text()
    assert all(f'id="fastlora.{name}"' in page or f'id="module-fastlora.{name}"' in page for name in fastlora.__all__)
    fields = [f"LoraConfig.{f.name}" for f in dataclasses.fields(fastlora.LoraConfig)]
    fields += [f"model.summary.Summary.{f.name}" for f in dataclasses.fields(Summary)]
    fields += [f"Tracker.{name}" for name in inspect.get_annotations(fastlora.Tracker)]
    assert all(f'id="fastlora.{name}"' in page for name in (*fields, *(f"integrations.{n}" for n in integrations)))
    assert_types_and_defaults(page)
    index = (tmp_path / "index.html").read_text()
    assert all(f"{path.stem}.html" in index for path in DOCS.glob("*.md") if path.stem != "index")


def assert_types_and_defaults(page):
    """Of every field, beside its name."""
    shown = html.unescape(re.sub(r"\s+", " ", re.sub("<[^>]*>", "", page)))
    for kind in (fastlora.LoraConfig, Summary):
        for field in dataclasses.fields(kind):
            has = field.default is not dataclasses.MISSING
            kind_of = field.type.replace("torch.", "")
            assert f"{field.name}: {kind_of}{f' = {field.default!r}' if has else ''}" in shown, field.name
    for name, kind in inspect.get_annotations(fastlora.Tracker).items():
        assert f"{name}: {kind}" in shown, name


def test_every_page_with_code_is_run_by_some_test():
    """What is left to other files is named there."""
    own = pathlib.Path(__file__)
    others = [path.read_text() for path in DOCS.parent.glob("tests/*/test_*.py") if path != own]
    for page in ELSEWHERE:
        assert any(f"{page}.md" in text for text in others), page


def test_the_commands_of_the_pages_exist(tmp_path, monkeypatch, capsys):
    """``fastlora inspect adapter`` after the page has saved one, and no command that there is not."""
    monkeypatch.chdir(tmp_path)
    scope = {"__name__": "drop_in"}
    for block in blocks((DOCS / "drop_in.md").read_text()):
        exec(compile(block, "drop_in", "exec"), scope)
    capsys.readouterr()
    assert main(["inspect", "adapter"]) == 0
    assert "body.0" in capsys.readouterr().out
    named = {name for path in DOCS.glob("*.md") for name in re.findall(r"`fastlora (\w+)", path.read_text())}
    assert {"inspect", "doctor"} <= named <= set(COMMANDS)


def test_the_traced_call_is_where_it_says():
    """Every `path:line` of CONTRIBUTING.md is the definition that stands beside it."""
    rows = re.findall(r"\| `([\w/.]+):(\d+)` \| `([\w.]+)` \|", (DOCS.parent / "CONTRIBUTING.md").read_text())
    assert len(rows) >= 8
    for path, number, name in rows:
        line = (DOCS.parent / path).read_text().splitlines()[int(number) - 1]
        assert re.match(rf"\s*(def|class) {name.rpartition('.')[2]}\b", line), f"{path}:{number} is {line!r}"
