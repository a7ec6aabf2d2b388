"""The checks of all that a run needs outside of its configuration, made before torch is imported: files, disks, visible_gpus.

A check is a rule, like those of the configuration, so that all problems are in one list. The checks only read, and ask no network. They are
not a promise: the run checks the same things again when it opens them, and more thoroughly.
"""
