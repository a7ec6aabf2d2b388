"""The plan of a run, computed without a GPU: what it needs and how fast it can be."""
