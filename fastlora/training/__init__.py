"""Schedules and diagnostics of a run, and probabilities that mean what they say."""

from .diagnostics import Diagnostics
from .schedule import Cosine
from .temperature import ece, fit_temperature, reliability

__all__ = ["Cosine", "Diagnostics", "ece", "fit_temperature", "reliability"]
