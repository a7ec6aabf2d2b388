"""The base of a process: device, process groups, files, signals, the run directory's lock, named ranges of time."""
