"""Drop-in modules."""

from .frozen import FrozenLinear
from .linear import Linear, QKVLinear

__all__ = ["FrozenLinear", "Linear", "QKVLinear"]
