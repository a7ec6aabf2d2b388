"""The reading of files of text and JSON, compressed or not, which the data tools and the evaluation share."""
