"""Where the time of a step goes: traces, stopwatches, throughput."""
