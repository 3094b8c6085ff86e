"""Makes Triton's interpreter compute with bf16.

Unpatched, ``tl.dot`` multiplies the raw bits of bf16 operands and a conversion from fp32 truncates; and its runtime
loop bounds refuse one-element arrays under numpy 2.4.
"""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def _raised(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


class _Integer(type):
    def __instancecheck__(cls, value) -> bool:
        return isinstance(value, int)


class _int(int, metaclass=_Integer):
    def __new__(cls, value=0, *rest):
        return int(value.reshape(-1)[0]) if isinstance(value, np.ndarray) else int(value, *rest)


def apply() -> None:
    """Patch the interpreter, once."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "_knows_bfloat16", False):
        return
    builder._knows_bfloat16 = True
    dot, convert = builder.create_dot, interpreter._convert_float
    builder.create_dot = lambda self, a, b, d, *rest, **named: dot(self, _raised(a), _raised(b), d, *rest, **named)

    def nearest(values, source, target, mode):
        if source == tl.float32 and target == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(values).view(np.float32)).bfloat16()
            return rounded.view(torch.uint16).numpy()
        return convert(values, source, target, mode)

    interpreter._convert_float = nearest
    interpreter.int = _int
