"""Pure functions of numbers: scores, and budgets of ranks."""
