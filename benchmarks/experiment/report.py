"""The results as JSON, pictures and a page in Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_report(found: list[dict[str, Any]], out: Path) -> dict[str, Any]:
    raise NotImplementedError
