"""What any torch library has; knows nothing of LoRA."""
