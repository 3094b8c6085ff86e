"""The operators of adapted linears and their backends."""
