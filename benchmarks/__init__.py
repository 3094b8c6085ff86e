"""Benchmarks against peers: ``pytest --benchmark-only`` from the root."""
