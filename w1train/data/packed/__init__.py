"""The packing of documents into samples of one length, and blends of datasets."""
