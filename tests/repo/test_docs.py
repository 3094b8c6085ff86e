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
import fastlora.integrations
from fastlora.cli.__main__ import COMMANDS, main
from fastlora.model.summary import Summary

DOCS = pathlib.Path(__file__).parents[2] / "docs"
REFERENCE = DOCS / "reference" / "index.md"
# Pages with tests of their own: these need a process group, or a library that is optional.
ELSEWHERE = {"diffusers", "your_trainer", "scale_out", "migration", "quantized"}
NEEDS = {"from_peft": "peft"}
PAGES = sorted(p.stem for p in DOCS.glob("*.md") if p.stem not in ELSEWHERE and "```python" in p.read_text())


def blocks(text: str) -> list[str]:
    """Python code of a page, each block at its own line so that errors point into the page."""
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return ["\n" * (text[: match.start(1)].count("\n")) + match[1] for match in found]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    if page in NEEDS:
        pytest.importorskip(NEEDS[page])
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
    """Those of ``fastlora``; those of its public modules; and classes that public functions return."""
    listed = re.findall(r"^   fastlora\.([\w.]+)$", REFERENCE.read_text(), re.MULTILINE)
    assert len(listed) == len(set(listed))
    modules = {"nn": fastlora.nn, "training": fastlora.training, "integrations": fastlora.integrations}
    public = {name for name in fastlora.__all__ if not inspect.ismodule(getattr(fastlora, name))}
    public |= {f"{part}.{name}" for part, module in modules.items() for name in module.__all__}
    public |= {f"integrations.{part}.FastLoraCallback" for part in ("hf", "lightning")}
    results = {"model.summary.Summary", "model.summary.Row", "model.recommend.Recommendation",
               "model.recommend.Recommended", "training.diagnostics.GroupDiagnostics",
               "training.temperature.Reliability"}  # fmt: skip
    assert set(listed) == public | results


QUESTIONS = {
    "install": "install", "start": "start in 60 seconds", "from_peft": "from PEFT in 5 changes",
    "estimators": "which estimator when", "ranks": "choose ranks", "many_adapters": "multi-task batch training",
    "quantized": "quantized", "scale_out": "scale out", "serve": "serve", "troubleshoot": "troubleshoot",
    "speed": "benchmarks", "design": "design",
}  # fmt: skip


@pytest.mark.parametrize("page", QUESTIONS)
def test_a_page_for_each_question_that_the_index_leads_to(page):
    index = (DOCS / "index.md").read_text()
    assert re.search(rf"^(?:.*<)?{page}>?$", index, re.MULTILINE)
    title = (DOCS / f"{page}.md").read_text().partition("\n")[0].removeprefix("# ").lower()
    words = {word.rstrip("s") for word in re.findall(r"[a-z0-9]{4,}", QUESTIONS[page].lower())}
    assert words & {word.rstrip("s") for word in re.findall(r"[a-z0-9]{4,}", title)}, title


def test_the_site_builds_without_a_warning(tmp_path):
    for library in ("sphinx", "furo", "myst_parser", "transformers", "lightning"):
        pytest.importorskip(library)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(DOCS.parent)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
    listed = re.findall(r"^   (fastlora\.[\w.]+)$", REFERENCE.read_text(), re.MULTILINE)
    pages = {name: (tmp_path / "reference" / "names" / f"{name}.html").read_text() for name in listed}
    assert all(f'id="{name}"' in page and "_modules/" in page for name, page in pages.items()), "a page, and its source"
    fields = {name: [f.name for f in dataclasses.fields(kind)] for name, kind in WITH_FIELDS.items()}
    fields["fastlora.Tracker"] = list(inspect.get_annotations(fastlora.Tracker))
    for name, found in fields.items():
        assert all(f'id="{name}.{field}"' in pages[name] for field in found), name
    assert_types_and_defaults(pages)
    index = (tmp_path / "index.html").read_text()
    assert all(f"{path.stem}.html" in index for path in DOCS.glob("*.md") if path.stem != "index")
    assert (tmp_path / "search.html").exists() and (tmp_path / "searchindex.js").stat().st_size > 100_000
    assert "reference/names/fastlora.set_ranks.html" in (tmp_path / "ranks.html").read_text()
    assert "../../ranks.html" in pages["fastlora.set_ranks"].partition("In the guides")[2]


WITH_FIELDS = {"fastlora.LoraConfig": fastlora.LoraConfig, "fastlora.model.summary.Summary": Summary}


def assert_types_and_defaults(pages):
    """Of every field, beside its name."""
    text = {name: html.unescape(re.sub(r"\s+", " ", re.sub("<[^>]*>", "", page))) for name, page in pages.items()}
    for name, kind in WITH_FIELDS.items():
        shown = text[name]
        for field in dataclasses.fields(kind):
            has = field.default is not dataclasses.MISSING
            kind_of = field.type.replace("torch.", "")
            assert f"{field.name}: {kind_of}{f' = {field.default!r}' if has else ''}" in shown, field.name
    for name, kind in inspect.get_annotations(fastlora.Tracker).items():
        assert f"{name}: {kind}" in text["fastlora.Tracker"], name


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
