"""Errors about names that are not known: what would do, and the nearest of it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def suggestion(name: Any, known: Iterable[Any]) -> str:
    """`` (did you mean ...?)`` for the nearest known name, or nothing."""
    near = difflib.get_close_matches(str(name), [k for k in known if isinstance(k, str)], n=1, cutoff=0.4)
    return f" (did you mean {near[0]!r}?)" if near and isinstance(name, str) and near[0] != name else ""


def unknown(argument: str, value: Any, accepted: Iterable[Any], more: str = "") -> ValueError:
    """``argument: expected one of ..., got ...`` with the nearest; ``more``: what else would do."""
    accepted = accepted if isinstance(accepted, (list, tuple)) else tuple(accepted)
    return ValueError(f"{argument}: expected one of {accepted}{more}, got {value!r}{suggestion(value, accepted)}")
