"""What a process stands on: device, process groups, seeds, the run directory's lock."""
