"""Sphinx: the guides as they are, and the reference from docstrings."""

import pathlib
import sys

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from fastlora import __version__  # noqa: E402  the path above finds it
from fastlora.testing import enable_torchvision  # noqa: E402

enable_torchvision()  # for the pages of the callbacks, whose libraries import it

project = "fastlora"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"fastlora {release}"
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
