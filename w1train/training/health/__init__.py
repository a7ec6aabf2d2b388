"""Health: what goes wrong in a run is noticed, said, and survived where that is possible."""
