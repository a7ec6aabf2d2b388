"""Measurements of the framework. Each writes a dated report to benchmarks/results."""
