"""Benchmarks of tokenizing, loading and corrupting data."""
