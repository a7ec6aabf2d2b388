"""A whole training step."""
