"""Tokenizing, loading and corrupting data."""
