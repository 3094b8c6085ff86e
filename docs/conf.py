"""Sphinx: the guides as they are, and a page for each public name from its docstring; links lead both ways."""

import pathlib
import re
import shutil
import sys

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import fastlora  # noqa: E402  the path above finds it
from fastlora.testing import enable_torchvision  # noqa: E402

enable_torchvision()  # for the pages of the callbacks, whose libraries import it
shutil.rmtree(HERE / "reference" / "names", ignore_errors=True)  # of names that are no more

project = "fastlora"
release = version = fastlora.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "_templates"]
html_theme = "furo"
html_title = f"fastlora {release}"
html_show_sourcelink = False
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True

NAMES = re.findall(r"^   (fastlora\.[\w.]+)$", (HERE / "reference" / "index.md").read_text(), re.MULTILINE)
SHORT = {name.removeprefix("fastlora."): name for name in NAMES}
SPAN = re.compile(r"(?<![`\[{}\w])`(?:fastlora\.)?(" + "|".join(map(re.escape, SHORT)) + r")(?:\(\))?`(?![`\]])")


def prose(text: str) -> list[str]:
    """A page in parts, of which every second one is fenced code."""
    return re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)


def link_names(app, page: str, source: list[str]) -> None:
    """A public name between backticks leads to its page."""
    if page.startswith("reference"):
        return
    parts = prose(source[0])
    for i in range(0, len(parts), 2):
        lines = parts[i].split("\n")
        parts[i] = "\n".join(
            line if line.startswith("#") else SPAN.sub(lambda m: f"{{py:obj}}`{m[1]} <{SHORT[m[1]]}>`", line)
            for line in lines
        )
    source[0] = "".join(parts)


def link_guides(app, kind: str, name: str, found, options, lines: list[str]) -> None:
    """And from a name's page to the guides that speak of it."""
    if name not in NAMES:
        return
    short = name.rpartition(".")[2]
    pattern = re.compile(rf"\b{re.escape(name)}\b|`{re.escape(short)}\b")
    pages = sorted(path.stem for path in HERE.glob("*.md") if pattern.search(path.read_text()))
    if pages:
        lines += ["", "In the guides: " + ", ".join(f":doc:`/{page}`" for page in pages) + ".", ""]


def setup(app) -> None:
    app.connect("source-read", link_names)
    app.connect("autodoc-process-docstring", link_guides)
