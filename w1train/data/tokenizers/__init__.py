"""Tokenizers, and limits on how much they may lengthen a text."""
