"""Measurements of the time and memory of a training step: traces, stopwatches, throughput."""
