"""Measurements of the framework, each with its dated report beside it."""
