"""Rules for the values of a configuration, in one file for each subject."""
