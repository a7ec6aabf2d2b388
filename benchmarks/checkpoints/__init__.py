"""Benchmarks of saves of checkpoints."""
