"""Ranks and penalties by importance on a real pretrained model: ``python -m benchmarks.experiment --help``."""
