"""Benchmarks on a GPU; `benchmarks/device.sh` runs them, with `benchmarks` as the folder of top-level packages."""
