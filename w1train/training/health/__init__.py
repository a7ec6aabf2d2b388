"""Health: the code that notices and reports what goes wrong in a run, and lets the run continue where this is possible."""
