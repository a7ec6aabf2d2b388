"""Tokenizers, and limits on what they make of a text."""
