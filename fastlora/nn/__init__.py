"""Drop-in modules."""

from .attention import MultiheadAttention, TransformerEncoderLayer
from .frozen import FrozenLinear
from .layer_view import Conv1D
from .linear import Linear, QKVLinear

__all__ = ["Conv1D", "FrozenLinear", "Linear", "MultiheadAttention", "QKVLinear", "TransformerEncoderLayer"]
