"""Statistics over steps."""
