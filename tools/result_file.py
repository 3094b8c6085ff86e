"""What the tools found, as files in the form of ``benchmarks/results``: one row a line."""

from __future__ import annotations

import sys
from pathlib import Path

# Behind everything else: the checkout must not hide the package that is installed.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks.harness.result_files import dumps, read, write  # noqa: E402

__all__ = ["dumps", "read", "write"]
