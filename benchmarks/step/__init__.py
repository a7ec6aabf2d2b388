"""Benchmarks of a whole training step."""
