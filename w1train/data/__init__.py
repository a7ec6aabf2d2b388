"""The data path: from token files to packed batches."""
