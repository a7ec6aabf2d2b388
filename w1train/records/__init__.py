"""Records of a run, and the sinks that they go to: files, console, W&B, TensorBoard."""
