"""The files of a checkpoint: an index in JSON, plain bytes, and the reader of what older versions wrote."""
