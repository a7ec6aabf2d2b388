"""Benchmarks of the attention backends."""
