"""Rules that the values of a configuration keep, one file for each subject."""
