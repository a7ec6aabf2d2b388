"""Attention backends, side by side."""
