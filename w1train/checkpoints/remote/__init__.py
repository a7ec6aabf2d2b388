"""Copies of checkpoints in object storage."""
