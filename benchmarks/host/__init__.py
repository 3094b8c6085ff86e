"""What a layer costs the host: a null GPU, and the benchmark of the way from a module to its launches."""
