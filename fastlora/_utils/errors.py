"""Checks of arguments, and the one sentence of their errors: ``argument: expected ..., got ...``.

``TypeError`` where a value is of none of the accepted types, ``ValueError`` where it is of one and will not do. What
has to be one of a few (a choice) is a wrong value whatever its type.
"""

from __future__ import annotations

import difflib
import math
import numbers
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch

_SHORT = reprlib.Repr()
_SHORT.maxstring, _SHORT.maxlong, _SHORT.maxother = 300, 60, 80
_WRITTEN = (type(None), bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, torch.dtype)


def shown(value: Any) -> str:
    """A value as errors show it: scalars, text and short containers as Python writes them, others by their type."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return _SHORT.repr(value) if isinstance(value, _WRITTEN) else type(value).__name__


def wrong_type(argument: str, accepted: str, value: Any) -> TypeError:
    """``argument: expected ..., got ...`` for a value of another type."""
    return TypeError(f"{argument}: expected {accepted}, got {shown(value)}")


def wrong_value(argument: str, accepted: str, value: Any, more: str = "") -> ValueError:
    """``argument: expected ..., got ...`` for a value of a right type; ``more``: a hint behind it."""
    return ValueError(f"{argument}: expected {accepted}, got {shown(value)}{more}")


def suggestion(name: Any, known: Iterable[Any]) -> str:
    """`` (did you mean ...?)`` for the nearest known name, or nothing."""
    near = difflib.get_close_matches(str(name), [k for k in known if isinstance(k, str)], n=1, cutoff=0.4)
    return f" (did you mean {near[0]!r}?)" if near and isinstance(name, str) and near[0] != name else ""


def unknown_choice(argument: str, value: Any, accepted: Iterable[Any], more: str = "") -> ValueError:
    """``argument: expected one of ..., got ...`` with the nearest; ``more``: what else would do."""
    accepted = accepted if isinstance(accepted, (list, tuple)) else tuple(accepted)
    return wrong_value(argument, f"one of {accepted}{more}", value, suggestion(value, accepted))


def check_choice(argument: str, value: Any, accepted: Iterable[Any], more: str = "") -> Any:
    """``value`` if it is one of those accepted: equal as text, else the same object."""
    accepted = accepted if isinstance(accepted, (list, tuple)) else tuple(accepted)
    if not any(value is a or (isinstance(a, str) and isinstance(value, str) and value == a) for a in accepted):
        raise unknown_choice(argument, value, accepted, more)
    return value


def check_instance(argument: str, value: Any, kind: type | tuple[type, ...], accepted: str) -> Any:
    """``value`` if it is of a type; ``accepted`` says which: "a torch.nn.Module"."""
    if not isinstance(value, kind):
        raise wrong_type(argument, accepted, value)
    return value


def check_model(model: Any) -> torch.nn.Module:
    """``model`` if it is a ``torch.nn.Module``."""
    return check_instance("model", model, torch.nn.Module, "a torch.nn.Module")


def check_integer(argument: str, value: Any, minimum: int | None = None, accepted: str = "an integer") -> int:
    """``value`` as an int of at least ``minimum``; ``accepted`` says what it counts, or what else would do."""
    accepted += "" if minimum is None else f" >= {minimum}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise wrong_type(argument, accepted, value)
    if minimum is not None and value < minimum:
        raise wrong_value(argument, accepted, int(value))
    return int(value)


def check_number(
    argument: str,
    value: Any,
    minimum: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
    accepted: str = "a finite number",
) -> float:
    """``value`` if it is a finite number within bounds: at least ``minimum``, over ``above``, under ``below``."""
    bounds = [f"{sign} {bound}" for sign, bound in ((">=", minimum), (">", above), ("<", below)) if bound is not None]
    accepted += f" {' and '.join(bounds)}" if bounds else ""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise wrong_type(argument, accepted, value)
    low = (minimum is None or value >= minimum) and (above is None or value > above)
    if not (_finite(value) and low and (below is None or value < below)):
        raise wrong_value(argument, accepted, value)
    return value


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


def check_flag(argument: str, value: Any) -> bool:
    """``value`` if it is True or False."""
    return check_instance(argument, value, bool, "True or False")


def check_mapping(argument: str, value: Any, of: str) -> Mapping[Any, Any]:
    """``value`` if it is a mapping; ``of``: "matrix keys to ranks"."""
    return check_instance(argument, value, Mapping, f"a mapping of {of}")


def listed(items: Iterable[str], limit: int = 5) -> str:
    """The first few names, and how many more there are."""
    items = list(items)
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
