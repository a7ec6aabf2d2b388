"""The numbers of draws of a completion's masks. They are in a module of their own, which needs no torch, for the options of commands."""

DEFAULT_DRAWS = 128
"""LLaDA's number of draws. With masks that are drawn for each token by itself, more than 1,000 draws are needed."""
MAX_DRAWS = 1 << 16
