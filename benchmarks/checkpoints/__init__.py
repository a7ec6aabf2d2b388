"""Saves of checkpoints."""
