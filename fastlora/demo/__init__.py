"""``fastlora demo``: scikit-learn's digits, a small vision transformer, five ways to adapt it, one report."""

from .page import rich_tables
from .recipe import MissingExtra, Settings, require
from .run import run

__all__ = ["MissingExtra", "Settings", "require", "rich_tables", "run"]
