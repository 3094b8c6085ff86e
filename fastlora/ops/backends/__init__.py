"""What runs an operator: backends, and plans of what a backend did."""
