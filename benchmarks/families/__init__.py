"""A table of model families: what each role finds in them, and whether the numbers are right."""
