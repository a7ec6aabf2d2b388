"""The plan of a run, computed without a GPU: what the run needs, and how fast it can be."""
