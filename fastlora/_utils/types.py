"""Types that the signatures of several files have in common."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

ModelT = TypeVar("ModelT", bound=nn.Module)
"""The class of a model that a function changes in place and gives back."""
