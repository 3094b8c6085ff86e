"""What runs an operator: backends, and plans of what a backend did."""

from ...backends import BACKENDS, choose

__all__ = ["BACKENDS", "choose"]
