"""What is done to a whole model."""
