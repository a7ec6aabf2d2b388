"""Pages made from the records of runs."""
