"""Benchmarks on a GPU; `benchmarks/device.sh` runs them."""
