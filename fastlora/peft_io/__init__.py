"""Adapters in and out: PEFT files, PEFT in memory, other layouts."""

from .convert import from_peft, load_layout, to_peft
from .load import load
from .save import save

__all__ = ["from_peft", "load", "load_layout", "save", "to_peft"]
