"""The distribution's name, what is missing of it, and another project's package of the same import name."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

# The import name belongs to another project in the public index: what is installed has a name of its own.
DISTRIBUTION = "fastlora-kernels"
_PACKAGE = Path(__file__).resolve().parents[1]


def extra(name: str) -> str:
    """The command that installs this package with what an extra names."""
    return f"pip install '{DISTRIBUTION}[{name}]'"


def blame_extra(error: ModuleNotFoundError, asker: str, name: str, *libraries: str) -> None:
    """``ImportError`` that names an extra, where one of its libraries is what is missing; else nothing is said."""
    if error.name in libraries:
        raise ImportError(f"{asker} needs {libraries[0]}: {extra(name)}") from error


def foreign() -> tuple[str, Path] | None:
    """``name version`` and folder of another installed distribution that holds a package ``fastlora``, or None."""
    for found in importlib.metadata.distributions(name="fastlora"):
        if any(path.as_posix() == "fastlora/__init__.py" for path in found.files or ()):
            folder = Path(str(found.locate_file("fastlora"))).resolve()
            return f"{found.metadata['Name']} {found.version}", folder
    return None


def refuse_mixed() -> None:
    """``ImportError`` where another distribution's files lie among this package's."""
    other = foreign()
    if other is not None and other[1] == _PACKAGE:
        raise ImportError(
            f"fastlora: {other[1]} also belongs to {other[0]}, another project, and their files are mixed: "
            f"pip uninstall fastlora {DISTRIBUTION}, then install {DISTRIBUTION} again"
        )
