"""The operator, its reference, its backends."""
