"""Drop-in modules."""

from .linear import Linear, QKVLinear

__all__ = ["Linear", "QKVLinear"]
