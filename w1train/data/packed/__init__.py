"""Documents packed into samples of one length, and blends of datasets."""
