"""``fastlora COMMAND``."""
