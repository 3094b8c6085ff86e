"""Reports from the results of the benchmarks, and the floor of a CPU."""
