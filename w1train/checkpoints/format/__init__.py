"""The format of a checkpoint's files: an index in JSON, tensors as plain bytes, and a reader of the format of older versions."""
