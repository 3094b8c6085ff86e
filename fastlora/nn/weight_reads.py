"""Notices code that multiplies by an adapted layer's weight without calling the layer, where no adapter acts."""

from __future__ import annotations

import linecache
import logging
import re
from typing import Any

from torch import nn

logger = logging.getLogger(__name__)

# What only asks for a property of the weight, or sets it.
ASKS = r"(?!\.(?:dtype|device|shape|size|numel|ndim|dim|is_\w+)\b|\.data\b|\s*=[^=])"
_KNOWN = ("fastlora", "torch")  # whose owners that read are taken over


class WeightReads:
    """Where the forward of another module read the weight of the layer at ``path``; each place is warned of once."""

    def __init__(self, path: str):
        self.path = path
        self.places: list[str] = []

    def note(self, layer: Any, frame: Any) -> None:
        """Take note of the frame that reads, if it runs in another's forward and does more than ask for a property."""
        known = frame.f_globals.get("__name__", "").partition(".")[0] in _KNOWN
        if known or layer.merged or _running(frame) in (None, layer):
            return
        place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        if place in self.places or not _uses(linecache.getline(frame.f_code.co_filename, frame.f_lineno)):
            return
        self.places.append(place)
        logger.warning("the weight of %r is read besides the call, and adapters do not act there: %s", self.path, place)


def _uses(line: str) -> bool:
    if ".weight" not in line:
        return True  # by getattr, or from a file that is not there
    asked = re.sub(r"isinstance\([\w.\[\]]+\.weight\b", "", line)
    return re.search(rf"\.weight\b{ASKS}", asked) is not None


def _running(frame: Any) -> nn.Module | None:
    """The module whose forward a frame belongs to."""
    call = nn.Module.__call__.__code__
    while frame is not None and frame.f_code is not call:
        frame = frame.f_back
    return None if frame is None else frame.f_locals["self"]
