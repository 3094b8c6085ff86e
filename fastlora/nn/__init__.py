"""Drop-in modules."""

from .attention import MultiheadAttention, TransformerEncoderLayer
from .layer_view import Conv1D
from .frozen import FrozenLinear
from .linear import Linear, QKVLinear

__all__ = ["Conv1D", "FrozenLinear", "Linear", "MultiheadAttention", "QKVLinear", "TransformerEncoderLayer"]
