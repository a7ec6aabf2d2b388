"""From token files to packed batches."""
