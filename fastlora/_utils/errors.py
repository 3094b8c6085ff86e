"""Argument checks and their one sentence form: unknown names with the nearest, ranks, flags, finite numbers."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable
from typing import Any


def suggestion(name: Any, known: Iterable[Any]) -> str:
    """`` (did you mean ...?)`` for the nearest known name, or nothing."""
    near = difflib.get_close_matches(str(name), [k for k in known if isinstance(k, str)], n=1, cutoff=0.4)
    return f" (did you mean {near[0]!r}?)" if near and isinstance(name, str) and near[0] != name else ""


def unknown_choice(argument: str, value: Any, accepted: Iterable[Any], more: str = "") -> ValueError:
    """``argument: expected one of ..., got ...`` with the nearest; ``more``: what else would do."""
    accepted = accepted if isinstance(accepted, (list, tuple)) else tuple(accepted)
    return ValueError(f"{argument}: expected one of {accepted}{more}, got {value!r}{suggestion(value, accepted)}")


def check_rank(value: Any, name: str, minimum: int = 1) -> int:
    """``value`` as a rank; ``ValueError`` naming the argument otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}: expected an integer rank >= {minimum}, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name}: expected a rank >= {minimum}, got {value}")
    return value


def check_finite(value: Any, name: str) -> float:
    """``value`` as a number that is neither NaN nor infinite; ``ValueError`` naming the argument otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not _finite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return value


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


def check_flag(value: Any, name: str) -> bool:
    """``value`` as True or False; ``ValueError`` naming the argument otherwise."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {value!r}")
    return value


def listed(items: Iterable[str], limit: int = 5) -> str:
    """The first few names, and how many more there are."""
    items = list(items)
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def check_number(name: str, value: Any) -> float:
    good = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    if not good:
        raise ValueError(f"{name}: expected a finite number >= 0, got {value!r}")
    return float(value)


def checked(name: str, value: Any, accepted: tuple) -> Any:
    if value not in accepted:
        raise unknown_choice(name, value, accepted)
    return value


def positive(name: str, value: Any, accepted: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected {accepted}, got {value!r}")
    return value
